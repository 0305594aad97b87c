"""Notebook 00: provenance of the bundle, and sentences that say what the numbers say."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import torch

from ec2face_lab.study import foundation_quality
from ec2face_lab.study.scores import ROLES


def test_provenance_of_a_bundle(tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "config.json").write_text('{"model": 1}')
    about = '{"seconds": 120, "commit": "0123456789", "parameters": {"samples": 5, "role": "x"}}'
    (tmp_path / "flux" / "provenance.json").write_text(about)
    (tmp_path / "parser.json").write_text(about)
    (tmp_path / "parser.pt").write_bytes(b"0" * 2**20)
    table = foundation_quality.bundle_provenance(str(tmp_path)).set_index("part")
    assert table.loc["parser.pt", "MB"] == 1 and table.loc["flux", "minutes"] == 2
    assert table.loc["flux", "samples"] == 5 and table.loc["flux", "commit"] == "0123456"


def test_sentences_of_the_foundation():
    quality = pd.DataFrame(
        [{"metric": "PSNR (dB)", "value": 27.04, "ci_low": 26.9, "ci_high": 27.2, "n": 300}]
    )
    assert "27.0 PSNR (dB) [26.9, 27.2], n = 300" in foundation_quality.describe_round_trip(quality)
    cells = [("OAA", 95.0), ("hair", 97.0), ("neck_l", 80.0)]
    rows = pd.DataFrame([{"critic": c, "metric": m, "value": v} for c in ROLES for m, v in cells])
    assert "independent 95.0 (worst: necklace 80)" in foundation_quality.describe_parsers(rows)


class Reader:
    """A CLIP whose image feature is the picture's value, and whose text feature is the row."""

    device = "cpu"

    def image_features(self, images):
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()

    def text_features(self, texts):
        return torch.eye(3)[: len(texts)]


def test_sentence_of_text_pictures(monkeypatch):
    models = SimpleNamespace(clips={"independent": Reader()})
    monkeypatch.setattr(foundation_quality, "perception_models", lambda config: models)
    images = torch.zeros(3, 2, 3, 1, 1)
    images[1], images[2, 0] = 1, 2  # the sixth picture shows the first caption
    said = foundation_quality.describe_text_pictures(None, images, ["a", "b", "c"])
    assert "own caption 83.3, with the other rows' 8.3; 83 %" in said
