"""Attribute lists -> captions, in the manner of MM-CelebA-HQ and of FFHQ-Text.

A face is described by a plain mapping (`FaceAttributes`): an absent or false key is never
mentioned, so a caption states only what holds. A small probabilistic grammar draws which facts to
mention and how to order them. Chosen here: accessories are mentioned with probability 1/2 when
present, hair colour 0.6, other facts 0.4-0.6; at most six facts and 28 words a caption, 12-14 on
average (the real captions: 13.5). `captions_from_mask` describes faces that come with a label map
only.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID

FaceAttributes = Mapping[str, "bool | str"]

STYLES: tuple[str, ...] = ("mm-celeba-hq", "ffhq-text")

HAIR_COLOURS: tuple[str, ...] = ("black", "brown", "blond", "red", "gray")

HAIR_STYLES: tuple[str, ...] = ("straight", "wavy", "curly")

HAIR_LENGTHS: tuple[str, ...] = ("short", "medium", "long")

_WORDS = {"hair_colour": HAIR_COLOURS, "hair_style": HAIR_STYLES, "hair_length": HAIR_LENGTHS}

MAX_FACTS = 6

# Without hair none of these can be seen.
_HAIR = frozenset({"hair_length", "hair_style", "hair_colour", "bangs", "receding_hairline"})


class _Fact(NamedTuple):
    kind: str  # which clause says it: wears | has | is | hair | age
    phrase: str  # mm-celeba-hq wording
    detailed: str  # ffhq-text wording
    probability: float  # of being mentioned where it holds


# In order of priority: where a face has too much to say, the last ones go.
_FACTS: dict[str, _Fact] = {
    "earrings": _Fact("wears", "earrings", "earrings", 0.5),
    "necklace": _Fact("wears", "necklace", "a necklace", 0.5),
    "eyeglasses": _Fact("wears", "eyeglasses", "eyeglasses", 0.5),
    "hat": _Fact("wears", "hat", "a hat", 0.5),
    "bald": _Fact("is", "bald", "bald", 0.6),
    "smiling": _Fact("is", "smiling", "smiling", 0.6),
    "mouth_open": _Fact("has", "mouth slightly open", "an open mouth", 0.55),
    "bangs": _Fact("has", "bangs", "bangs", 0.6),
    "beard": _Fact("has", "beard", "a beard", 0.6),
    "mustache": _Fact("has", "mustache", "a mustache", 0.6),
    "lipstick": _Fact("wears", "lipstick", "lipstick", 0.5),
    "heavy_makeup": _Fact("wears", "heavy makeup", "heavy makeup", 0.5),
    "receding_hairline": _Fact("has", "receding hairline", "a receding hairline", 0.5),
    "arched_eyebrows": _Fact("has", "arched eyebrows", "arched eyebrows", 0.5),
    "bushy_eyebrows": _Fact("has", "bushy eyebrows", "bushy eyebrows", 0.5),
    "big_nose": _Fact("has", "big nose", "a big nose", 0.5),
    "big_lips": _Fact("has", "big lips", "big lips", 0.5),
    "narrow_eyes": _Fact("has", "narrow eyes", "narrow eyes", 0.5),
    "bags_under_eyes": _Fact("has", "bags under eyes", "bags under the eyes", 0.5),
    "pale_skin": _Fact("has", "pale skin", "pale skin", 0.5),
    "rosy_cheeks": _Fact("has", "rosy cheeks", "rosy cheeks", 0.5),
    "chubby": _Fact("is", "chubby", "chubby", 0.5),
    "oval_face": _Fact("has", "oval face", "an oval face", 0.45),
}

_ACCESSORIES = ("earrings", "necklace", "eyeglasses", "hat")  # said before hair and age

_HAIR_PROBABILITY = {"hair_length": 0.4, "hair_style": 0.5, "hair_colour": 0.6}

_AGE_PROBABILITY = 0.4

ATTRIBUTES: frozenset[str] = frozenset(_FACTS) | frozenset(_WORDS) | {"male", "young"}


def captions(
    attributes: FaceAttributes, count: int = 10, seed: int = 0, style: str = "mm-celeba-hq"
) -> list[str]:
    """`count` true captions of one face.

    Deterministic by (attributes, seed, style); fewer captions are the first of more. Captions of
    one face may repeat where there is little to say, as the real ones do.

    Args:
        attributes: keys of `ATTRIBUTES`; bool, or a word of `HAIR_COLOURS`, `HAIR_STYLES`,
            `HAIR_LENGTHS`. Absent keys are not mentioned; `medium` hair is not mentioned either.
        style: "mm-celeba-hq" or "ffhq-text" (other wording, same key words).

    Raises ValueError naming an unknown key, word or style.
    """
    if style not in STYLES:
        raise ValueError(f"caption style {style!r} does not exist; known: {STYLES}")
    facts = _facts(attributes, detailed=style == "ffhq-text")
    key = zlib.crc32(repr(sorted((k, str(v)) for k, v in attributes.items())).encode())
    rng = random.Random((seed << 32) ^ key)  # so that faces do not share their sentence patterns
    write = _mm_celeba_hq if style == "mm-celeba-hq" else _ffhq_text
    male = attributes.get("male")
    return [write(_mention(facts, rng), male, rng) for _ in range(count)]


def captions_from_mask(
    label_map: Tensor, image: Tensor | None = None, count: int = 10, seed: int = 0
) -> list[str]:
    """Captions of what a label map shows, for data without captions: `h w` ids -> `count` strings.

    image: `3 h w` in [-1, 1]; adds the hair colour where the pixels are unambiguous.
    """
    return captions(attributes_from_mask(label_map, image), count, seed)


def attributes_from_mask(label_map: Tensor, image: Tensor | None = None) -> dict[str, bool | str]:
    """The attributes that a label map `h w` makes certain, and hair colour from `3 h w` pixels."""
    share = torch.bincount(label_map.flatten(), minlength=len(CLASS_ID)) / label_map.numel()
    seen = {name: bool(share[i] > 2e-4) for name, i in CLASS_ID.items()}
    found: dict[str, bool | str] = {
        "earrings": seen["ear_r"],
        "necklace": seen["neck_l"],
        "eyeglasses": seen["eye_g"],
        "hat": seen["hat"],
        "mouth_open": bool(share[CLASS_ID["mouth"]] > 1.5e-3),  # teeth or more, not a dark line
        "bald": bool(share[CLASS_ID["hair"]] < 5e-3) and not seen["hat"] and seen["skin"],
    }
    if image is not None and share[CLASS_ID["hair"]] > 0.02:
        colour = _hair_colour(image[:, label_map == CLASS_ID["hair"]])
        found |= {"hair_colour": colour} if colour else {}
    return found


def _hair_colour(pixels: Tensor) -> str | None:
    """Name the median colour of hair pixels `(3, n)` in [-1, 1]; None between two names."""
    r, g, b = (float(channel.median() + 1) / 2 for channel in pixels)
    high, low = max(r, g, b), min(r, g, b)
    saturation = (high - low) / max(high, 1e-6)
    if high < 0.16 or (high < 0.22 and saturation < 0.35):
        return "black"
    if saturation < 0.15:
        return "gray" if high > 0.45 else None
    if r < g or r < b:
        return None  # coloured light or dyed
    hue = (g - b) / (high - low)  # 0 red, 1 yellow
    if high > 0.62 and hue > 0.4:
        return "blond"
    if hue < 0.3 and saturation > 0.6 and high > 0.35:
        return "red"
    return "brown" if 0.28 < high < 0.55 and saturation > 0.25 else None


def _facts(attributes: FaceAttributes, detailed: bool) -> list[_Fact]:
    """The facts that hold, with `phrase` in the chosen wording, in order of priority."""
    unknown = sorted(set(attributes) - ATTRIBUTES)
    if unknown:
        raise ValueError(f"unknown face attributes {unknown}; known: {sorted(ATTRIBUTES)}")
    bald = attributes.get("bald", False)
    hair = []
    for key, probability in _HAIR_PROBABILITY.items():
        word = attributes.get(key)
        if word and word not in _WORDS[key]:
            raise ValueError(f"{key}: {word!r} is unknown; known: {_WORDS[key]}")
        if word and word != "medium" and not bald:
            hair.append(_Fact("hair", str(word), str(word), probability))
    if "young" in attributes:
        age = "young" if attributes["young"] else "older"
        hair.append(_Fact("age", age, age, _AGE_PROBABILITY))
    true = [key for key in _FACTS if attributes.get(key) and not (bald and key in _HAIR)]
    worn = [_FACTS[key] for key in true if key in _ACCESSORIES]
    facts = worn + hair + [_FACTS[key] for key in true if key not in _ACCESSORIES]
    return [fact._replace(phrase=fact.detailed) for fact in facts] if detailed else facts


def _mention(facts: Sequence[_Fact], rng: random.Random) -> dict[str, list[str]]:
    """Draw the facts of one caption: phrases by kind, each kind in random order."""
    chosen = [fact for fact in facts if rng.random() < fact.probability][:MAX_FACTS]
    if facts and not chosen:
        chosen = [_pick(facts, rng)]
    said: dict[str, list[str]] = {"wears": [], "has": [], "is": [], "hair": [], "age": []}
    for fact in chosen:
        said[fact.kind].append(fact.phrase)
    if said["hair"]:  # long wavy brown hair: adjectives keep their order
        said["has"].append(" ".join(said["hair"]) + " hair")
    for kind in ("wears", "has", "is"):
        rng.shuffle(said[kind])
    return said


def _mm_celeba_hq(said: dict[str, list[str]], male: bool | None, rng: random.Random) -> str:
    """'She has wavy hair and mouth slightly open. The woman is wearing earrings.'"""
    noun, pronoun = _names(male)
    age = said["age"][0] if said["age"] else ""
    subject = _pick(("The", "This"), rng) + " "
    if age and (said["has"] or said["wears"] or said["is"]) and rng.random() < 0.5:
        subject += f"{age} {noun}"
    else:
        said["is"].extend(said["age"])
        subject = _pick((pronoun, subject + noun, subject + noun, subject + "person"), rng)
    clauses = [
        f"{verb} {_join(said[kind])}"
        for kind, verb in (
            ("is", "is"),
            ("has", "has"),
            ("wears", _pick(("wears", "is wearing"), rng)),
        )
        if said[kind]
    ]
    if not clauses:
        return f"This is a {noun}."
    rng.shuffle(clauses)
    first, rest = clauses[0], clauses[1:]
    if rest and "," not in first and rng.random() < 0.5:
        first += f" and {rest.pop(0)}"
    return _end(f"{subject} {first}", rest, pronoun)


def _ffhq_text(said: dict[str, list[str]], male: bool | None, rng: random.Random) -> str:
    """'A young woman with long brown hair is smiling. She wears earrings.'"""
    noun, pronoun = _names(male)
    subject = f"{said['age'][0]} {noun}" if said["age"] else noun
    article = "an" if subject[0] == "o" else "a"
    main = f"{article} {subject}"
    form = _pick([kind for kind in ("has", "wears") if said[kind]] or [""], rng)
    if form:
        main += (" with " if form == "has" else " wearing ") + _join(said[form])
    rest = [
        f"{verb} {_join(said[kind])}"
        for kind, verb in (("is", "is"), ("has", "has"), ("wears", "wears"))
        if said[kind] and kind != form
    ]
    rng.shuffle(rest)
    if not rest or rng.random() < 0.3:
        return _end(f"There is {main}", rest, pronoun)
    return _end(f"{main[0].upper()}{main[1:]} {rest[0]}", rest[1:], pronoun)


def _names(male: bool | None) -> tuple[str, str]:
    """Noun and pronoun; without the attribute the person stays a person."""
    if male is None:
        return "person", "The person"
    return ("man", "He") if male else ("woman", "She")


def _end(first: str, rest: Sequence[str], pronoun: str) -> str:
    """Close the first sentence and say the remaining clauses in a second one."""
    return f"{first}. {pronoun} {' and '.join(rest)}." if rest else f"{first}."


def _join(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b, and c'."""
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + f", and {items[-1]}"


def _pick(items: Sequence, rng: random.Random):
    return items[int(rng.random() * len(items))]


def celeba_attributes(path: Path) -> dict[str, FaceAttributes]:
    """`CelebAMask-HQ-attribute-anno.txt` -> attributes in the words of `captions`, by id."""
    _, header, *lines = path.read_text(encoding="utf-8").splitlines()
    names, faces = header.split(), {}
    for line in lines:
        file, *values = line.split()
        has = {name: value == "1" for name, value in zip(names, values, strict=True)}
        colours = [c for c in ("black", "blond", "brown", "gray") if has[f"{c.title()}_Hair"]]
        face: dict[str, bool | str] = {key: has[name] for key, name in _CELEBA.items()}
        face["beard"] = not has["No_Beard"] and not has["5_o_Clock_Shadow"]
        if len(colours) == 1:
            face["hair_colour"] = colours[0]
        if has["Wavy_Hair"] != has["Straight_Hair"]:
            face["hair_style"] = "wavy" if has["Wavy_Hair"] else "straight"
        faces[Path(file).stem] = face
    return faces


_CELEBA = {  # our key -> CelebA's name
    "male": "Male",
    "young": "Young",
    "bald": "Bald",
    "bangs": "Bangs",
    "receding_hairline": "Receding_Hairline",
    "smiling": "Smiling",
    "mouth_open": "Mouth_Slightly_Open",
    "eyeglasses": "Eyeglasses",
    "hat": "Wearing_Hat",
    "earrings": "Wearing_Earrings",
    "necklace": "Wearing_Necklace",
    "lipstick": "Wearing_Lipstick",
    "mustache": "Mustache",
    "heavy_makeup": "Heavy_Makeup",
    "arched_eyebrows": "Arched_Eyebrows",
    "bushy_eyebrows": "Bushy_Eyebrows",
    "big_nose": "Big_Nose",
    "big_lips": "Big_Lips",
    "narrow_eyes": "Narrow_Eyes",
    "bags_under_eyes": "Bags_Under_Eyes",
    "pale_skin": "Pale_Skin",
    "rosy_cheeks": "Rosy_Cheeks",
    "chubby": "Chubby",
    "oval_face": "Oval_Face",
}
