"""What each training sample is made of, as a pure function of (seed, global sample index).

Sample number g of a training is the same face, caption, time, noise and dropped conditions whoever
draws it: ranks take different g and so draw different noise, a resumed run goes on as if it had
never stopped, and any number of ranks sees the same samples. No state of a random generator has to
be saved. Every epoch shows each face once, in an order of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import sample_timesteps
from .latents import LatentCache
from .losses import drop_conditions


@dataclass(frozen=True)
class Draws:
    """The random part of b samples."""

    ids: list[str]
    captions: list[int]  # index of the caption that this sample is told
    t: Tensor  # (b,) in [0, 1]
    noise: Tensor  # b c h w
    keep_text: Tensor  # (b,) bool, Eq. 13
    keep_mask: Tensor  # (b,) bool


class SampleStream:
    """The endless sequence of training samples of one seed.

    Args:
        cache: its faces are drawn from.
        seed: other seeds give other sequences.
        drop_probability: p of Eq. 13.
    """

    def __init__(self, cache: LatentCache, seed: int, drop_probability: float) -> None:
        self.cache, self.seed, self.drop_probability = cache, seed, drop_probability
        self._orders: dict[int, list[int]] = {}  # epoch -> its order of the faces

    def draw(self, indices: Sequence[int]) -> Draws:
        """The samples of these global indices, on the CPU."""
        shape, p = (1, *self.cache.latent_shape), self.drop_probability
        ids, captions, parts = [], [], []
        for index in indices:
            id, caption, generator = self._begin(index)
            t = sample_timesteps(1, generator)
            keep_text, keep_mask = drop_conditions(1, p, generator)
            ids.append(id)
            captions.append(caption)
            parts.append((t, torch.randn(shape, generator=generator), keep_text, keep_mask))
        return Draws(ids, captions, *(torch.cat(part) for part in zip(*parts, strict=True)))

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Only the faces of these samples."""
        return [self._id(index) for index in indices]

    def captions(self, indices: Sequence[int]) -> set[str]:
        """The captions that these samples will be told: what has to be embedded."""
        begun = (self._begin(index) for index in indices)
        return {self.cache.captions(id)[caption] for id, caption, _ in begun}

    def _begin(self, index: int) -> tuple[str, int, torch.Generator]:
        """Face, caption, and the generator that goes on to draw the rest."""
        id, generator = self._id(index), self._generator("sample", index)
        count = len(self.cache.captions(id))
        return id, int(torch.randint(count, (), generator=generator)), generator

    def _id(self, index: int) -> str:
        epoch, position = divmod(index, len(self.cache.ids))
        if epoch not in self._orders:
            order = torch.randperm(
                len(self.cache.ids), generator=self._generator("epoch", epoch)
            ).tolist()
            last = self._orders.get(epoch - 1)  # a step may lie in two epochs
            self._orders = {epoch: order} | ({epoch - 1: last} if last else {})
        return self.cache.ids[self._orders[epoch][position]]

    def _generator(self, purpose: str, index: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{purpose}/{index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
