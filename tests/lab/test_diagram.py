"""Fig. 1 prints the facts that it is given."""

from __future__ import annotations

import numpy as np
from figure_checks import assert_legible, texts

from ec2face_core.attributes import CLASSES, NUM_CLASSES
from ec2face_core.config import LossConfig
from ec2face_lab.plots.diagram import framework_diagram


def facts() -> dict:
    parts = ("text_encoder", "text_encoder_2", "vae", "transformer", "clip", "parser")
    return {
        "names": dict.fromkeys(parts, "Module"),
        "parameters": dict.fromkeys(parts, 2_300_000) | {"lora": 216_000},
        "tokens": {"text": 32, "noise": 64, "mask": 64},
        "blocks": (2, 4),
        "rank": 16,
        "loss": LossConfig(alpha_text=0.25, center=0.3),
        "weights": dict(zip(CLASSES, np.geomspace(0.1, 500, NUM_CLASSES), strict=True)),
        "t": 0.3,
        "caption": "She wears earrings. " * 9,
        "pictures": {k: np.ones((4, 4, 3)) for k in ("image", "mask", "estimate", "weights")},
    }


def test_the_diagram_is_legible():
    assert_legible(lambda: framework_diagram(facts()))


def test_the_diagram_prints_the_facts_that_it_is_given():
    printed = "\n".join(texts(framework_diagram(facts())))
    for fact in ("rank 16", "216 k", "9.4 %", "= 160 tokens", "4 single", "0.25", "$t_c$=0.3"):
        assert fact in printed, fact
    assert "necklace" in printed or "cloth" in printed  # classes of the weights' bars
