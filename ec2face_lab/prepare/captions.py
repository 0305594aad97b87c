"""Captions from lists of attributes, in the manner of MM-CelebA-HQ and of FFHQ-Text.

A face is described by a mapping (`FaceAttributes`). An absent or false key is never mentioned, so a
caption states only what holds. A small probabilistic grammar samples which facts to mention and in
which order. Accessories are mentioned with probability 1/2 when present, hair colour with 0.6,
other facts with 0.4-0.6; a caption has at most six facts and 28 words, 12-14 on average (the real
captions: 13.5). `captions_from_mask` describes faces that come with a label map only;
`caption_facts` reads a caption's facts back.
"""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID
from ec2face_core.io.report import DataError
from ec2face_core.io.texts import LINE_END, read_text

T = TypeVar("T")
FaceAttributes = Mapping[str, "bool | str"]

STYLES: tuple[str, ...] = ("mm-celeba-hq", "ffhq-text")
HAIR_COLOURS: tuple[str, ...] = ("black", "brown", "blond", "red", "gray")
HAIR_STYLES: tuple[str, ...] = ("straight", "wavy", "curly")
HAIR_LENGTHS: tuple[str, ...] = ("short", "medium", "long")
HAIR_WORDS: dict[str, tuple[str, ...]] = {
    "hair_colour": HAIR_COLOURS,
    "hair_style": HAIR_STYLES,
    "hair_length": HAIR_LENGTHS,
}
MAX_FACTS = 6


class _Fact(NamedTuple):
    kind: str  # of its clause: wears | has | is | hair | age
    phrase: str  # mm-celeba-hq wording
    detailed: str  # ffhq-text wording
    probability: float  # of being mentioned where it holds


# In order of priority: a face with too many facts loses the last ones.
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

_ACCESSORIES = ("earrings", "necklace", "eyeglasses", "hat")  # take precedence over hair and age
_HAIR = {  # in the order of the adjectives: words, probability of being mentioned
    "hair_length": (HAIR_LENGTHS, 0.4),
    "hair_style": (HAIR_STYLES, 0.5),
    "hair_colour": (HAIR_COLOURS, 0.6),
}
_OPPOSITE = {"male": "female", "young": "older"}  # what a caption says where they are false
_AGE_PROBABILITY = 0.4
_NEEDS_HAIR = {*_HAIR, "bangs", "receding_hairline"}  # invisible on a bald head

ATTRIBUTES: frozenset[str] = frozenset(_FACTS) | frozenset(_HAIR) | {"male", "young"}

_CELEBA = {  # our key -> CelebA's name
    **{key: key.title() for key in (*_FACTS, "male", "young") if key != "beard"},
    **{key: f"Wearing_{key.title()}" for key in ("hat", "earrings", "necklace", "lipstick")},
    "mouth_open": "Mouth_Slightly_Open",
}

_CELEBA_MORE = (  # names that two of our keys are made of
    "No_Beard", "5_o_Clock_Shadow", "Wavy_Hair", "Straight_Hair", "Black_Hair", "Blond_Hair",
    "Brown_Hair", "Gray_Hair",
)  # fmt: skip


def captions(
    attributes: FaceAttributes, count: int = 10, seed: int = 0, style: str = "mm-celeba-hq"
) -> list[str]:
    """`count` true captions of one face.

    They are a function of (attributes, seed, style); fewer captions are the first of more. Captions
    of one face may repeat where there are few facts, as the real ones do.

    Args:
        attributes: keys of `ATTRIBUTES`; bool, or a word of `HAIR_COLOURS`, `HAIR_STYLES`,
            `HAIR_LENGTHS`. Absent keys are not mentioned; `medium` hair is not mentioned either.
        count: number of captions.
        seed: another one gives other captions.
        style: "mm-celeba-hq" or "ffhq-text" (other wording, same key words).

    Raises:
        ValueError: an unknown key, word or style, which the message names.
    """
    if style not in STYLES:
        raise ValueError(f"caption style {style!r} does not exist; known: {STYLES}")
    facts = _facts(attributes, detailed=style == "ffhq-text")
    key = zlib.crc32(repr(sorted((k, str(v)) for k, v in attributes.items())).encode())
    rng = random.Random((seed << 32) ^ key)  # so that faces do not share their sentence patterns
    write = _mm_celeba_hq if style == "mm-celeba-hq" else _ffhq_text
    male = attributes.get("male")
    return [write(_sample_phrases(facts, rng), male, rng) for _ in range(count)]


def captions_from_mask(
    label_map: Tensor, image: Tensor | None = None, count: int = 10, seed: int = 0
) -> list[str]:
    """Captions of what a label map shows, for data without captions.

    Args:
        label_map: ids `(h, w)`.
        image: `(3, h, w)` in [-1, 1]; adds the hair colour where the pixels are unambiguous.
        count: number of captions.
        seed: another one gives other captions.
    """
    return captions(attributes_from_mask(label_map, image), count, seed)


def attributes_from_mask(label_map: Tensor, image: Tensor | None = None) -> dict[str, bool | str]:
    """The attributes that a label map `h w` makes certain, and hair colour from `3 h w` pixels."""
    pixels = torch.bincount(label_map.flatten(), minlength=len(CLASS_ID))
    share = {name: pixels[i] / label_map.numel() for name, i in CLASS_ID.items()}
    visible = {name for name in CLASS_ID if share[name] > 2e-4}
    attributes: dict[str, bool | str] = {
        "earrings": "ear_r" in visible,
        "necklace": "neck_l" in visible,
        "eyeglasses": "eye_g" in visible,
        "hat": "hat" in visible,
        "mouth_open": bool(share["mouth"] > 1.5e-3),  # teeth or more, not a dark line
        "bald": bool(share["hair"] < 5e-3) and "hat" not in visible and "skin" in visible,
    }
    if image is not None and share["hair"] > 0.02:
        colour = _hair_colour(image[:, label_map == CLASS_ID["hair"]])
        attributes |= {"hair_colour": colour} if colour else {}
    return attributes


def fact_name(key: str, value: bool | str) -> str:
    """The name of a fact: `eyeglasses`, `female`, `older`, `hair_colour=black`."""
    return _OPPOSITE[key] if value is False else key if value is True else f"{key}={value}"


def caption_facts(caption: str) -> list[str]:
    """Names of the facts that a caption in either style mentions, in the order of the tables."""
    text = caption.lower()
    found = [name for name, pattern in _patterns().items() if pattern.search(text)]
    hair = " ".join(_hair_pattern().findall(text))
    return found + [
        fact_name(key, word)
        for key, (words, _) in _HAIR.items()
        for word in words
        if word in hair and word != "medium"
    ]


@functools.cache
def _hair_pattern() -> re.Pattern[str]:
    """The adjectives directly before "hair"."""
    words = "|".join(word for words, _ in _HAIR.values() for word in words)
    return re.compile(rf"\b((?:(?:{words}),? )+)hair\b")


@functools.cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """What mentions each fact but those of the hair."""
    phrases = {key: (fact.phrase, fact.detailed) for key, fact in _FACTS.items()}
    phrases |= {"male": ("he", "man"), "female": ("she", "woman")}
    phrases |= {age: (age,) for age in ("young", "older")}
    return {name: re.compile(rf"\b(?:{'|'.join(words)})\b") for name, words in phrases.items()}


def celeba_attributes(path: Path) -> dict[str, FaceAttributes]:
    """`CelebAMask-HQ-attribute-anno.txt` -> attributes in the words of `captions`, by id.

    Raises:
        DataError: it is no such table; the message names the line.
    """
    try:
        lines = [line.split() for line in LINE_END.split(read_text(path))]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    names = lines[1] if len(lines) > 1 else []
    unknown = sorted({*_CELEBA.values(), *_CELEBA_MORE} - set(names))
    if unknown:
        raise DataError(f"{path}: line 2 has no column {', '.join(unknown[:3])}")
    faces: dict[str, FaceAttributes] = {}
    for number, cells in enumerate(lines[2:], start=3):
        if not cells:
            continue
        file, *values = cells
        if len(values) != len(names) or not {*values} <= {"1", "-1", "0"}:
            raise DataError(f"{path}: line {number} is no file and {len(names)} times 1 or -1")
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


def _hair_colour(pixels: Tensor) -> str | None:
    """Name the median colour of hair pixels `(3, n)` in [-1, 1]; None between two names."""
    r, g, b = (float(channel.median() + 1) / 2 for channel in pixels)
    high = max(r, g, b)
    low = min(r, g, b)
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
    """The facts that hold, with `phrase` in the requested wording, in order of priority."""
    unknown = sorted(set(attributes) - ATTRIBUTES)
    if unknown:
        raise ValueError(f"unknown face attributes {unknown}; known: {sorted(ATTRIBUTES)}")
    bald = attributes.get("bald", False)
    others = []
    for key, (words, probability) in _HAIR.items():
        word = attributes.get(key)
        if word and word not in words:
            raise ValueError(f"{key}: {word!r} is unknown; known: {words}")
        if word and word != "medium" and not bald:
            others.append(_Fact("hair", str(word), str(word), probability))
    if "young" in attributes:
        age = "young" if attributes["young"] else "older"
        others.append(_Fact("age", age, age, _AGE_PROBABILITY))
    true = [key for key in _FACTS if attributes.get(key) and not (bald and key in _NEEDS_HAIR)]
    worn = [_FACTS[key] for key in true if key in _ACCESSORIES]
    facts = worn + others + [_FACTS[key] for key in true if key not in _ACCESSORIES]
    return [fact._replace(phrase=fact.detailed) for fact in facts] if detailed else facts


def _sample_phrases(facts: Sequence[_Fact], rng: random.Random) -> dict[str, list[str]]:
    """Sample the facts of one caption: phrases by kind, each kind in random order."""
    selected = [fact for fact in facts if rng.random() < fact.probability][:MAX_FACTS]
    if facts and not selected:
        selected = [_pick(facts, rng)]
    phrases: dict[str, list[str]] = {"wears": [], "has": [], "is": [], "hair": [], "age": []}
    for fact in selected:
        phrases[fact.kind].append(fact.phrase)
    if phrases["hair"]:  # long wavy brown hair: adjectives keep their order
        phrases["has"].append(" ".join(phrases["hair"]) + " hair")
    for kind in ("wears", "has", "is"):
        rng.shuffle(phrases[kind])
    return phrases


def _mm_celeba_hq(phrases: dict[str, list[str]], male: bool | None, rng: random.Random) -> str:
    """'She has wavy hair and mouth slightly open. The woman is wearing earrings.'"""
    noun, pronoun = _names(male)
    subject = _pick(("The", "This"), rng) + " "
    age = phrases["age"]
    if age and (phrases["has"] or phrases["wears"] or phrases["is"]) and rng.random() < 0.5:
        subject += f"{age[0]} {noun}"
    else:
        phrases["is"].extend(age)
        subject = _pick((pronoun, subject + noun, subject + noun, subject + "person"), rng)
    verbs = {"is": "is", "has": "has", "wears": _pick(("wears", "is wearing"), rng)}
    clauses = _clauses(phrases, verbs)
    if not clauses:
        return f"This is a {noun}."
    rng.shuffle(clauses)
    first = clauses.pop(0)
    if clauses and "," not in first and rng.random() < 0.5:
        first += f" and {clauses.pop(0)}"
    return _sentences(f"{subject} {first}", clauses, pronoun)


def _ffhq_text(phrases: dict[str, list[str]], male: bool | None, rng: random.Random) -> str:
    """'A young woman with long brown hair is smiling. She wears earrings.'"""
    noun, pronoun = _names(male)
    subject = " ".join([*phrases["age"], noun])
    main = f"{'an' if subject[0] == 'o' else 'a'} {subject}"
    form = _pick([kind for kind in ("has", "wears") if phrases[kind]] or [""], rng)
    if form:
        main += (" with " if form == "has" else " wearing ") + _join(phrases[form])
    verbs = {kind: kind for kind in ("is", "has", "wears") if kind != form}
    clauses = _clauses(phrases, verbs)
    rng.shuffle(clauses)
    if not clauses or rng.random() < 0.3:
        return _sentences(f"There is {main}", clauses, pronoun)
    return _sentences(f"{main[0].upper()}{main[1:]} {clauses[0]}", clauses[1:], pronoun)


def _names(male: bool | None) -> tuple[str, str]:
    """Noun and pronoun; without the attribute `male` they are neutral."""
    if male is None:
        return "person", "The person"
    return ("man", "He") if male else ("woman", "She")


def _clauses(phrases: Mapping[str, list[str]], verbs: Mapping[str, str]) -> list[str]:
    return [f"{verb} {_join(phrases[kind])}" for kind, verb in verbs.items() if phrases[kind]]


def _sentences(first: str, clauses: Sequence[str], pronoun: str) -> str:
    """Close the first sentence and put the remaining clauses into a second one."""
    return f"{first}. {pronoun} {' and '.join(clauses)}." if clauses else f"{first}."


def _join(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b, and c'."""
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + f", and {items[-1]}"


def _pick(items: Sequence[T], rng: random.Random) -> T:
    return items[int(rng.random() * len(items))]
