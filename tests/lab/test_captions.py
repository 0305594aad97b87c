"""Captions are true, varied as the real ones are, and repeatable."""

from __future__ import annotations

import random
import re
import sys

import pytest
import torch

from ec2face_core.attributes import CLASS_ID
from ec2face_lab.prepare.captions import (
    HAIR_COLOURS,
    HAIR_LENGTHS,
    HAIR_STYLES,
    STYLES,
    attributes_from_mask,
    caption_facts,
    captions,
    captions_from_mask,
)

# What a reader takes a word to mean, written apart from the grammar: word -> attribute.
MEANS = {
    "earrings": "earrings",
    "necklace": "necklace",
    "eyeglasses": "eyeglasses",
    "hat": "hat",
    "bald": "bald",
    "bangs": "bangs",
    "receding": "receding_hairline",
    "smiling": "smiling",
    "mouth": "mouth_open",
    "open": "mouth_open",
    "beard": "beard",
    "mustache": "mustache",
    "lipstick": "lipstick",
    "makeup": "heavy_makeup",
    "arched": "arched_eyebrows",
    "bushy": "bushy_eyebrows",
    "nose": "big_nose",
    "lips": "big_lips",
    "narrow": "narrow_eyes",
    "bags": "bags_under_eyes",
    "pale": "pale_skin",
    "rosy": "rosy_cheeks",
    "chubby": "chubby",
    "oval": "oval_face",
}
HAIR = {
    **dict.fromkeys(HAIR_COLOURS, "hair_colour"),
    **dict.fromkeys(HAIR_STYLES, "hair_style"),
    **dict.fromkeys(HAIR_LENGTHS, "hair_length"),
}


def random_face(rng: random.Random) -> dict[str, bool | str]:
    """Every attribute by chance: drawn, false or absent."""
    face: dict[str, bool | str] = {
        key: rng.random() < 0.3 for key in sorted(set(MEANS.values())) if rng.random() < 0.8
    }
    if rng.random() < 0.8:
        face["male"] = rng.random() < 0.5
    if rng.random() < 0.8:
        face["young"] = rng.random() < 0.5
    for key, words in (
        ("hair_colour", HAIR_COLOURS),
        ("hair_style", HAIR_STYLES),
        ("hair_length", HAIR_LENGTHS),
    ):
        if rng.random() < 0.8:
            face[key] = rng.choice(words)
    return face


@pytest.fixture(scope="module")
def faces() -> list[dict[str, bool | str]]:
    rng = random.Random(7)
    return [random_face(rng) for _ in range(300)]


@pytest.mark.parametrize("style", STYLES)
def test_every_word_is_true(faces, style):
    for seed, face in enumerate(faces):
        for text in captions(face, 5, seed, style):
            words = re.findall(r"[a-z]+", text.lower())
            for word in words:
                if word in MEANS:
                    assert face.get(MEANS[word]) is True, (text, face)
                if word in HAIR:
                    assert face.get(HAIR[word]) == word and not face.get("bald"), (text, face)
                if word in ("he", "man"):
                    assert face["male"] is True
                if word in ("she", "woman"):
                    assert face["male"] is False
                if word in ("young", "older"):
                    assert face["young"] is (word == "young")
            assert len(words) <= 28, text
            assert re.fullmatch(r"[A-Z][^.]+\.( [A-Z][^.]+\.)?", text), text
            assert re.search(r"\band and\b|  | ,|,,|\bwith (has|is)\b", text) is None, text


@pytest.mark.parametrize("style", STYLES)
def test_mention_rates_and_length(faces, style):
    said = {"earrings": [], "necklace": [], "hat": [], "colour": []}
    lengths = []
    for seed, face in enumerate(faces):
        for text in captions(face, 10, seed, style):
            words = re.findall(r"[a-z]+", text.lower())
            lengths.append(len(words))
            for key in ("earrings", "necklace", "hat"):
                if face.get(key):
                    said[key].append(key in words)
            if "hair_colour" in face and not face.get("bald"):
                said["colour"].append(face["hair_colour"] in words)
    rates = {key: sum(values) / len(values) for key, values in said.items()}
    for key in ("earrings", "necklace", "hat"):
        assert rates[key] == pytest.approx(0.5, abs=0.06), rates
    assert rates["colour"] == pytest.approx(0.6, abs=0.08), rates
    assert 11 < sum(lengths) / len(lengths) < 16


@pytest.mark.parametrize("style", STYLES)
def test_facts_of_a_caption_are_those_put_in(faces, style, monkeypatch):
    """What the grammar samples is found again, and the noun or pronoun gives the gender."""
    module = sys.modules[captions.__module__]
    sample = module._sample_phrases
    sampled = []

    def spy(facts, rng):
        sampled.append(sample(facts, rng))
        return sampled[-1]

    monkeypatch.setattr(module, "_sample_phrases", spy)
    key_of = {p: key for key, fact in module._FACTS.items() for p in (fact.phrase, fact.detailed)}
    for seed, face in enumerate(faces):
        (text,) = captions(face, 1, seed, style)
        phrases = {phrase for kind in sampled[-1].values() for phrase in kind}
        expected = {
            key_of.get(phrase, phrase) for phrase in phrases if "hair" not in phrase.split()
        }
        expected = {f"{HAIR[word]}={word}" if word in HAIR else word for word in expected}
        words = set(re.findall(r"[a-z]+", text.lower()))
        expected |= {"male"} if words & {"he", "man"} else set()
        expected |= {"female"} if words & {"she", "woman"} else set()
        found = caption_facts(text)
        assert len(found) == len(set(found)) and set(found) == expected, text


def test_facts_of_foreign_captions():
    assert caption_facts("She wears a black hat over brown, wavy hair.") == [
        "hat", "female", "hair_style=wavy", "hair_colour=brown",
    ]  # fmt: skip
    assert caption_facts("There is a thatched house that he likes.") == ["male"]
    assert caption_facts("This person has a medium nose.") == []


def test_vocabulary_is_small_and_shared(faces):
    words = {
        style: {
            word
            for seed, face in enumerate(faces)
            for text in captions(face, 10, seed, style)
            for word in re.findall(r"[a-z]+", text.lower())
        }
        for style in STYLES
    }
    first, second = words["mm-celeba-hq"], words["ffhq-text"]
    assert len(first | second) < 80
    assert len(second - first) <= 6, second - first


def test_repeatable_and_independent_of_count_and_key_order(faces):
    face = faces[0]
    assert captions(face, 4, 3) == captions(face, 10, 3)[:4]
    assert captions(dict(reversed(face.items())), 4, 3) == captions(face, 4, 3)
    assert captions(face, 10, 3) != captions(face, 10, 4)
    assert captions(face, 9, 3, "ffhq-text") != captions(face, 9, 3)
    assert len(set(captions({**face, "hat": True, "smiling": True}, 10, 0))) >= 5
    assert captions({}, 2) == ["This is a person."] * 2


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="hair_color"):
        captions({"hair_color": "red"})
    with pytest.raises(ValueError, match="purple"):
        captions({"hair_colour": "purple"})
    with pytest.raises(ValueError, match="ffhq"):
        captions({}, style="ffhq")


def test_captions_from_a_mask():
    label_map = torch.zeros(64, 64, dtype=torch.int64)
    label_map[20:60, 16:48] = CLASS_ID["skin"]
    label_map[44:48, 24:40] = CLASS_ID["mouth"]
    label_map[40:44, 12:14] = CLASS_ID["ear_r"]
    assert attributes_from_mask(label_map) == {
        "earrings": True,
        "necklace": False,
        "eyeglasses": False,
        "hat": False,
        "mouth_open": True,
        "bald": True,
    }
    label_map[4:20, 12:52] = CLASS_ID["hair"]
    image = torch.zeros(3, 64, 64)
    for colour, rgb in {"blond": (230, 200, 140), "black": (20, 18, 17)}.items():
        image[:, 4:20] = torch.tensor(rgb).view(3, 1, 1) / 127.5 - 1
        found = attributes_from_mask(label_map, image)
        assert found["hair_colour"] == colour and not found["bald"]
    texts = captions_from_mask(label_map, image, count=20)
    assert any("black hair" in text for text in texts)
    assert any("earrings" in text for text in texts)
    assert not any("necklace" in text or "hat" in text.split() for text in texts)
