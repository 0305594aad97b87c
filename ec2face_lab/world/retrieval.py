"""Matching faces and captions: the losses that teach it, and how well it works.

A caption mentions a few facts only, so it can be true of several faces, and a perfect reader cannot
always tell whose it is. `best_scores` are those of a reader who knows every fact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prepare.captions import caption_facts


def contrastive_loss(logits: Tensor, caption_ids: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy; equal captions share the probability of being the right one.

    logits: scaled similarities of b images and b captions, `b b`. caption_ids: equal for equal
    captions, `(b,)`.
    """
    target = (caption_ids[:, None] == caption_ids[None]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(logits: Tensor, caption_ids: Tensor) -> Tensor:
    """SigLIP's loss: every pair of an image and a caption is a yes-or-no question.

    logits: scaled and shifted similarities, `b b`. caption_ids: equal for equal captions, `(b,)`.
    """
    target = (caption_ids[:, None] == caption_ids[None]).float()
    total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return total / len(logits)


def mentioned_facts(texts: Sequence[str], names: Sequence[str]) -> Tensor:
    """Which of the facts `names` each caption mentions: `(b, n)` bool."""
    mentioned = [set(caption_facts(text)) for text in texts]
    return torch.tensor([[name in facts for name in names] for facts in mentioned])


def best_scores(mentions: Tensor, truth: Tensor) -> Tensor:
    """How well captions fit faces for a reader who knows all facts, `b b`: faces by captions.

    It is the logarithm of how much likelier a caption is for this face than for any: false facts
    rule it out, rare facts count more, and facts that it could mention but does not count against
    it. How often a true fact is mentioned is estimated from the pairs themselves.

    mentions: facts that the captions mention, `b n` bool. truth: facts that hold, `b n` bool.
    """
    mentioned = mentions.double()
    holds = truth.double()
    share = holds.mean(0).clamp(1e-3, 1)
    rate = (mentioned.sum(0) / holds.sum(0).clamp(min=1)).clamp(0.01, 0.99)
    gain = mentioned * -share.log() - (1 - mentioned) * (1 - rate * share).log()
    silent = (1 - mentioned) * (1 - rate).log()
    false = mentioned @ (1 - holds).T
    return (gain.sum(1, keepdim=True) + silent @ holds.T - 100 * false).T


def retrieval(
    image: Tensor,
    text: Tensor,
    captions: Sequence[str],
    mentions: Tensor | None = None,
    truth: Tensor | None = None,
) -> dict[str, float]:
    """Held-out quality of a CLIP, in percent; equal captions count as right.

    Args:
        image: unit features `(b, d)`.
        text: unit features `(b, d)`.
        captions: of the b pairs.
        mentions: facts that the captions mention, `b n` bool.
        truth: facts that hold for the faces, `b n` bool; with both, two more numbers.

    Returns:
        top1, top5: images whose caption is among the nearest; pairs: how often a face is nearer to
        its caption than to another face's; cosine, cosine_other: mean scores of a face's caption
        and of the others'; candidates: b; true1: images whose nearest caption is true of them;
        top1_ceiling: top1 of a reader who knows every fact.
    """
    similarity = 100 * image @ text.T
    right = similarity.diagonal()
    same = torch.tensor([[a == b for b in captions] for a in captions], device=image.device)
    values = {
        "top1": _rate(similarity, same, 1), "top5": _rate(similarity, same, 5),
        "pairs": (right[:, None] > similarity)[~same].float().mean(),
        "cosine": right.mean() / 100, "cosine_other": similarity[~same].mean() / 100,
    }  # fmt: skip
    if mentions is not None and truth is not None:
        fits = ~((mentions[None] & ~truth[:, None]).any(-1))
        nearest = similarity.argmax(1, keepdim=True)
        values["true1"] = fits.gather(1, nearest).float().mean()
        values["top1_ceiling"] = _rate(best_scores(mentions, truth), same, 1)
    return {"candidates": len(right), **{k: round(100 * float(v), 2) for k, v in values.items()}}


def _rate(scores: Tensor, same: Tensor, first: int) -> Tensor:
    """Share of images whose caption is among the `first`."""
    better = (scores > scores.diagonal()[:, None]) & ~same
    return (better.sum(1) < first).float().mean()
