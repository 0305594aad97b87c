"""What the miniature's CLIPs are trained with and measured by: pairs, and sentences of one fact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .synthetic import HAIR_COLOURS, HAIR_LENGTHS, HAIR_STYLES

WORDS = {"hair_colour": HAIR_COLOURS, "hair_style": HAIR_STYLES, "hair_length": HAIR_LENGTHS}


def facts(attributes: dict[str, bool | str]) -> list[dict[str, bool | str]]:
    """Everything that one sentence can say of faces with these keys, one fact each."""
    flags = sorted(key for key, value in attributes.items() if isinstance(value, bool))
    either = [{key: False} for key in ("male", "young") if key in attributes]
    known = {key: values for key, values in WORDS.items() if key in attributes}
    words = [{key: word} for key, values in known.items() for word in values if word != "medium"]
    return [{key: True} for key in flags] + either + words


def fact_targets(attributes: list[dict[str, bool | str]]) -> Tensor:
    """Which of `facts` hold for each face: `(b, n)` in {0, 1}."""
    said = [next(iter(fact.items())) for fact in facts(attributes[0])]
    return torch.tensor([[float(row[key] == value) for key, value in said] for row in attributes])


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, captions: list[str]) -> Tensor:
    """CLIP's symmetric cross-entropy; equal captions share the probability of being the right one.

    image, text: unit features `(b, d)`; scale: the inverse temperature.
    """
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    group = torch.tensor([ids[caption] for caption in captions])
    target = (group[:, None] == group[None]).float()
    target = target / target.sum(1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def retrieval(image: Tensor, text: Tensor, captions: list[str]) -> dict[str, float]:
    """Held-out quality of a CLIP, in percent; equal captions count as right.

    top1, top5: images whose caption is among the nearest; pairs: how often a face is nearer to its
    caption than to another face's; cosine, cosine_other: mean scores of own and other captions.
    """
    similarity = 100 * image @ text.T
    own = similarity.diagonal()
    same = torch.tensor([[a == b for b in captions] for a in captions])
    rank = ((similarity > own[:, None]) & ~same).sum(1)
    wins = (own[:, None] > similarity)[~same].float().mean()
    values = {
        "top1": 100 * (rank < 1).float().mean(), "top5": 100 * (rank < 5).float().mean(),
        "pairs": 100 * wins, "cosine": own.mean(), "cosine_other": similarity[~same].mean(),
    }  # fmt: skip
    return {"candidates": len(own), **{k: round(float(v), 2) for k, v in values.items()}}


def area_under_curve(scores: Tensor, holds: Tensor) -> float:
    """How often a face of which the fact holds scores above one of which it does not."""
    return (scores[holds][:, None] > scores[~holds][None]).float().mean().item()
