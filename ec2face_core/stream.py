"""The training samples as a pure function of (seed, global sample index).

Sample number g of a training has the same face, caption, time, noise and dropped conditions on
whichever rank it is computed. So ranks that take different g get different noise, any number of
ranks sees the same samples, and a resumed run continues the same sequence: no state of a random
generator has to be saved. Every epoch shows each face `repeats` times, in an order of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attributes import GROUPS
from .config import UserError
from .fast.importance import low_discrepancy_timesteps, systematic_sample
from .flow import sample_timesteps
from .latents import LatentCache
from .losses import drop_conditions

OFTEN = 50  # shows of every caption in the mean, beyond which none is left out
BLOCK = 32  # consecutive samples whose spread times and sampled pixel losses are drawn together


@dataclass(frozen=True)
class Samples:
    """The random part of b training samples."""

    ids: list[str]
    caption_indices: list[int]  # among the face's captions
    t: Tensor  # (b,) in [0, 1]
    noise: Tensor  # b c h w
    keep_text: Tensor  # (b,) bool, Eq. 13
    keep_mask: Tensor  # (b,) bool
    pixel_weight: Tensor | None = None  # (b,) weight of the pixel losses, 1/p or 0; None: 1 for all

    def __getitem__(self, rows: Tensor) -> Samples:
        """Some of the samples, by their numbers."""
        numbers = rows.tolist()
        return Samples(
            [self.ids[i] for i in numbers],
            [self.caption_indices[i] for i in numbers],
            self.t[rows],
            self.noise[rows],
            self.keep_text[rows],
            self.keep_mask[rows],
            None if self.pixel_weight is None else self.pixel_weight[rows],
        )


class SampleStream:
    """The endless sequence of training samples of one seed.

    Args:
        cache: an opened latent cache, whose faces are shown.
        seed: other seeds give other sequences.
        drop_probability: p of Eq. 13.
        low_discrepancy_t: the times of consecutive samples cover [0, 1] evenly.
        pixel_probability: `t (b,) -> p (b,)`, the probability of a sample's pixel losses; None: 1.
        repeats: number of consecutive samples that show the same face, each with a caption, time,
            noise and dropped conditions of its own.
        rare_faces: share of samples whose face is drawn from those with a rare class (RFA) instead.

    Raises:
        UserError: rare faces are asked for, and there are none.
    """

    def __init__(
        self,
        cache: LatentCache,
        seed: int,
        drop_probability: float,
        low_discrepancy_t: bool = False,
        pixel_probability: Callable[[Tensor], Tensor] | None = None,
        repeats: int = 1,
        rare_faces: float = 0.0,
    ) -> None:
        self.cache = cache
        self.seed = seed
        self.drop_probability = drop_probability
        self.low_discrepancy_t = low_discrepancy_t
        self.pixel_probability = pixel_probability
        self.repeats = repeats
        self.rare_faces = rare_faces
        self._rare = cache.ids_with(GROUPS["RFA"]) if rare_faces else []
        if rare_faces and not self._rare:
            raise UserError("trainer.rare_faces: no training face has a rare class; set it to 0")
        self._orders: dict[int, list[int]] = {}  # epoch -> its order of the faces

    def sample(self, indices: Sequence[int]) -> Samples:
        """The samples of these global indices, on the CPU."""
        shape = (1, *self.cache.latent_shape)
        ids: list[str] = []
        caption_indices: list[int] = []
        parts: list[tuple[Tensor, ...]] = []
        for index in indices:
            id, caption, generator = self._face_caption_generator(index)
            t = sample_timesteps(1, generator)
            keep_text, keep_mask = drop_conditions(1, self.drop_probability, generator)
            noise = torch.randn(shape, generator=generator)
            ids.append(id)
            caption_indices.append(caption)
            parts.append((t, noise, keep_text, keep_mask))
        t, noise, keep_text, keep_mask = (torch.cat(part) for part in zip(*parts, strict=True))
        if self.low_discrepancy_t:
            t = self._from_blocks(self._times, indices)
        pixel_weight = None
        if self.pixel_probability is not None:
            pixel_weight = self._from_blocks(self._pixel_weights, indices)
        return Samples(ids, caption_indices, t, noise, keep_text, keep_mask, pixel_weight)

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Face ids of these samples."""
        return [self._id(index) for index in indices]

    def captions(self, indices: Sequence[int]) -> set[str]:
        """The captions of these samples, which have to be embedded; all of them if that is safe.

        A training that shows every caption many times is not gone through sample by sample.
        """
        everything = {c for id in self.cache.ids for c in self.cache.captions(id)}
        if len(indices) > OFTEN * len(everything):
            return everything
        starts = (self._face_caption_generator(index) for index in indices)
        return {self.cache.captions(id)[caption] for id, caption, _ in starts}

    def _from_blocks(self, values: Callable[[int], Tensor], indices: Sequence[int]) -> Tensor:
        """The values of these samples, which are drawn for `BLOCK` neighbours at a time."""
        blocks = {block: values(block) for block in {index // BLOCK for index in indices}}
        return torch.stack([blocks[index // BLOCK][index % BLOCK] for index in indices])

    def _times(self, block: int) -> Tensor:
        """Times of the samples `block * BLOCK ...`, `(BLOCK,)`."""
        if self.low_discrepancy_t:
            return low_discrepancy_timesteps(BLOCK, self._generator("times", block))
        generators = (self._face_caption_generator(block * BLOCK + i)[2] for i in range(BLOCK))
        return torch.cat([sample_timesteps(1, generator) for generator in generators])

    def _pixel_weights(self, block: int) -> Tensor:
        """Weights of the pixel losses of the samples `block * BLOCK ...`, `(BLOCK,)` float32."""
        assert self.pixel_probability is not None
        p = self.pixel_probability(self._times(block).double())
        u = torch.rand((), generator=self._generator("gate", block), dtype=torch.float64)
        return systematic_sample(p, float(u)).div(p).float()

    def _face_caption_generator(self, index: int) -> tuple[str, int, torch.Generator]:
        """Face, caption, and the generator that draws the rest of the sample."""
        id = self._id(index)
        generator = self._generator("sample", index)
        count = len(self.cache.captions(id))
        return id, int(torch.randint(count, (), generator=generator)), generator

    def _id(self, index: int) -> str:
        if self.rare_faces:
            generator = self._generator("rare", index // self.repeats)
            if torch.rand((), generator=generator) < self.rare_faces:
                return self._rare[int(torch.randint(len(self._rare), (), generator=generator))]
        epoch, position = divmod(index // self.repeats, len(self.cache.ids))
        if epoch not in self._orders:
            generator = self._generator("epoch", epoch)
            order = torch.randperm(len(self.cache.ids), generator=generator).tolist()
            # a step may lie in two epochs, so the one before is kept
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = order
        return self.cache.ids[self._orders[epoch][position]]

    def _generator(self, purpose: str, index: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{purpose}/{index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
