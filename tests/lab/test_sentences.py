"""Sentences say what their numbers say."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from ec2face_core.attributes import CLASS_ID
from ec2face_lab.study import ablation, faces, foundation_quality, gradients, long_tail, reliability, unimodal


def test_sentences_of_the_foundation():
    quality = pd.DataFrame(
        [{"metric": "PSNR (dB)", "value": 27.04, "ci_low": 26.9, "ci_high": 27.2, "n": 300}]
    )
    assert "27.0 PSNR (dB) [26.9, 27.2], n = 300" in sentences.about_round_trip(quality)
    cells = [("OAA", 95.0), ("hair", 97.0), ("neck_l", 80.0)]
    rows = pd.DataFrame(
        [{"critic": c, "metric": m, "value": v} for c in sentences.CRITICS for m, v in cells]
    )
    assert "independent 95.0 (worst: necklace 80)" in sentences.about_parsers(rows)


def test_sentences_of_the_long_tail():
    frequency = pd.DataFrame({"class": ["skin", "ear_r", "hat"], "pixel_share": [30.0, 0.1, 0.0]})
    assert "skin has 300 times the pixels of earring" in sentences.about_frequency(frequency)
    reductions = pd.DataFrame(
        [
            ("ear_r", "max", 100.0, 0.0), ("ear_r", "mean", 40.0, 5.0),
            ("ear_r", "nearest", 30.0, 25.0),
        ],
        columns=["class", "reduction", "kept", "lost"],
    )  # fmt: skip
    said = sentences.about_reductions(reductions)
    assert "earrings: mean 40 %, nearest 30 % (lost in 5 % and 25 % of the faces)" in said


def test_sentences_of_the_schedule():
    fits = pd.DataFrame(
        {
            "source": ["configured", "a", "b"],
            "steepness": [10.0, 4.0, 6.0],
            "center": [0.4, 0.5, 0.7],
            "strongest_at": [0.3, 0.4, 0.6],
        }
    )
    assert "centers 0.50 to 0.70 (configured 0.4)" in sentences.about_fits(fits)
    assert "at t = 0.30 as configured, at 0.40 to 0.60" in sentences.about_gradient_factor(fits)


def test_sentence_of_a_run(tmp_path):
    rows = [{"step": i, "unweighted_flow": 1.0 - 0.1 * i} for i in range(8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = sentences.about_training(tmp_path)
    assert "0.950 over the first 2 steps, 0.350 over the last 2" in said


class Critic:
    """Reads a picture's first plane as its parse, and its mean as its feature."""

    device = "cpu"

    def parse(self, images):
        return images[:, 0].long()

    def image_features(self, images):
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()

    def text_features(self, texts):
        return torch.eye(3)[: len(texts)]


@pytest.fixture
def critic(monkeypatch):
    critics = type("Critics", (), {k: {"independent": Critic()} for k in ("parsers", "clips")})
    monkeypatch.setattr(sentences, "load_critics", lambda config: critics)


def test_sentence_of_rare_parts(critic):
    maps = torch.ones(2, 4, 4, dtype=torch.long)
    maps[0, 0] = CLASS_ID["ear_r"]
    pictures = maps[:, None].expand(-1, 3, -1, -1).float().clone()
    pictures[0, :, 0, :3] = 0  # three of the four earring pixels are missing
    assert "25 % of the earrings; 100 %" in sentences.about_rare_parts(None, maps, pictures)


def test_sentence_of_text_pictures(critic):
    images = torch.zeros(3, 2, 3, 1, 1)
    images[1], images[2, 0] = 1, 2  # the sixth picture shows the first caption
    said = sentences.about_text_pictures(None, images, ["a", "b", "c"])
    assert "own caption 83.3, with the other rows' 8.3; 83 %" in said


def test_sentence_of_one_condition():
    values = {
        "Text, text alone": 44,
        "OAA, mask alone": 80,
        "Text, EC2Face": 45,
        "OAA, EC2Face": 82,
    }
    rows = pd.DataFrame(
        [{"critic": "independent", "metric": m, "value": float(v)} for m, v in values.items()]
    )
    assert "Text score 44.0 from text alone, 45.0 from both" in sentences.about_one_condition(rows)
