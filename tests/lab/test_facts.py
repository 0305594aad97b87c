"""The attribute evaluator: its facts, its measures, its file."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from ec2face_lab.world.facts import (
    FactNet,
    balanced_accuracy,
    fact_names,
    fact_targets,
    facts,
    load_facts,
    save_facts,
)

ROW = {
    "male": True, "hat": False, "young": True, "hair_colour": "red", "hair_style": "wavy",
    "hair_length": "long",
}  # fmt: skip


def test_fact_targets_name_every_fact():
    flags, either = [0, 1, 1], [0, 0]  # hat, male, young; not male, not young
    colours, styles, lengths = [0, 0, 0, 1, 0], [0, 1, 0], [0, 1]  # medium length is never said
    held = flags + either + colours + styles + lengths
    assert fact_targets([ROW], facts([ROW])).int().tolist() == [held]
    names = fact_names(facts([ROW]))
    assert len(names) == len(held)
    assert [name for name, holds in zip(names, held, strict=True) if holds] == [
        "male", "young", "hair_colour=red", "hair_style=wavy", "hair_length=long",
    ]  # fmt: skip
    assert {"female", "older", "hat"} < set(names)


def test_a_fact_that_cannot_be_seen_does_not_hold():
    hidden = {**ROW, "hair_colour": ""}
    del hidden["hair_length"]
    statements = facts([hidden, ROW])
    assert statements == facts([ROW]), "one face that shows it is enough"
    names = fact_names(statements)
    held = fact_targets([hidden], statements)[0]
    assert not any(held[i] for i, name in enumerate(names) if "colour" in name or "length" in name)


def test_balanced_accuracy_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(50, 3, generator=generator) < 0.3
    predicted = torch.rand(50, 3, generator=generator) < 0.4
    truth[:, 2] = False
    values = balanced_accuracy(predicted, truth)
    for i in range(2):
        expected = 100 * balanced_accuracy_score(truth[:, i], predicted[:, i])
        assert values[i].item() == pytest.approx(expected)
    assert math.isnan(values[2])


def test_calibration_finds_the_best_threshold():
    net = FactNet(["a", "b"], widths=(8, 8), size=32)
    logits = torch.tensor([[-2.0, 1.0], [-1.0, 2.0], [0.5, 3.0], [3.0, 4.0], [4.0, 5.0]])
    truth = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]).bool()
    net.calibrate(logits, truth)
    assert net.thresholds.tolist() == [1.75, 2.5]
    best = balanced_accuracy(logits > net.thresholds, truth)
    for threshold in torch.linspace(-3, 6, 30):
        assert (balanced_accuracy(logits > threshold, truth) <= best).all()


def test_a_saved_net_sees_the_same(tmp_path):
    torch.manual_seed(0)
    net = FactNet(["hat", "hair_colour=red"], widths=(8, 16), size=32)
    net(torch.rand(4, 3, 32, 32))  # the BatchNorms see a few images
    net.eval()
    net.calibrate(torch.randn(6, 2), torch.rand(6, 2) < 0.5)
    save_facts(net, tmp_path / "facts.safetensors")
    loaded = load_facts(tmp_path / "facts.safetensors")
    assert loaded.names == net.names and loaded.size == 32
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(loaded(images), net(images), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(loaded.thresholds, net.thresholds, atol=2e-3, rtol=2e-3)
    assert loaded.holds(torch.rand(2, 3, 64, 64)).shape == (2, 2), "other sizes are resized"
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    with pytest.raises(FileNotFoundError):
        load_facts(tmp_path / "none.safetensors")
