"""What each training sample is made of, as a pure function of (seed, global sample index).

Sample number g of a training is the same face, caption, time, noise and dropped conditions whoever
draws it: ranks take different g and so draw different noise, a resumed run goes on as if it had
never stopped, and any number of ranks sees the same samples. No state of a random generator has to
be saved. Every epoch shows each face once (`draws_per_face` times), in an order of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fast.importance import even_timesteps, systematic_sample
from .flow import sample_timesteps
from .latents import LatentCache
from .losses import drop_conditions

BLOCK = 32  # neighbours whose even times and gates are drawn together; whatever a step's size is


@dataclass(frozen=True)
class Draws:
    """The random part of b samples."""

    ids: list[str]
    captions: list[int]  # index of the caption that this sample is told
    t: Tensor  # (b,) in [0, 1]
    noise: Tensor  # b c h w
    keep_text: Tensor  # (b,) bool, Eq. 13
    keep_mask: Tensor  # (b,) bool
    gate: Tensor | None = None  # (b,) weight of the pixel losses: 1/p or 0; None = 1 for all


class SampleStream:
    """The endless sequence of training samples of one seed.

    Args:
        cache: its faces are drawn from.
        seed: other seeds give other sequences.
        drop_probability: p of Eq. 13.
        low_discrepancy_t: times of neighbours cover [0, 1] evenly; all else is as without.
        gate: `t (b,) -> p (b,)`, the probability of a sample's pixel losses; None = 1.
        draws_per_face: as many neighbours show the same face, each with a caption, time, noise and
            dropped conditions of its own.
    """

    def __init__(
        self,
        cache: LatentCache,
        seed: int,
        drop_probability: float,
        low_discrepancy_t: bool = False,
        gate: Callable[[Tensor], Tensor] | None = None,
        draws_per_face: int = 1,
    ) -> None:
        self.cache, self.seed, self.drop_probability = cache, seed, drop_probability
        self.low_discrepancy_t, self.gate, self.draws_per_face = (
            low_discrepancy_t,
            gate,
            draws_per_face,
        )
        self._orders: dict[int, list[int]] = {}  # epoch -> its order of the faces

    def draw(self, indices: Sequence[int]) -> Draws:
        """The samples of these global indices, on the CPU."""
        shape, p = (1, *self.cache.latent_shape), self.drop_probability
        blocks = {index // BLOCK for index in indices}
        even = {k: self._times(k) for k in blocks} if self.low_discrepancy_t else None
        gates = {k: self._gates(k) for k in blocks} if self.gate else None
        ids, captions, parts, gate = [], [], [], []
        for index in indices:
            id, caption, generator = self._begin(index)
            (k, position), t = divmod(index, BLOCK), sample_timesteps(1, generator)
            if even:
                t = even[k][position, None]
            if gates:
                gate.append(gates[k][position])
            keep_text, keep_mask = drop_conditions(1, p, generator)
            ids.append(id)
            captions.append(caption)
            parts.append((t, torch.randn(shape, generator=generator), keep_text, keep_mask))
        together = (torch.cat(part) for part in zip(*parts, strict=True))
        return Draws(ids, captions, *together, torch.stack(gate) if gates else None)

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Only the faces of these samples."""
        return [self._id(index) for index in indices]

    def captions(self, indices: Sequence[int]) -> set[str]:
        """The captions that these samples will be told: what has to be embedded."""
        begun = (self._begin(index) for index in indices)
        return {self.cache.captions(id)[caption] for id, caption, _ in begun}

    def _times(self, block: int) -> Tensor:
        """Times of the samples `block * BLOCK ...`, `(BLOCK,)`."""
        if self.low_discrepancy_t:
            return even_timesteps(BLOCK, self._generator("times", block))
        generators = (self._begin(block * BLOCK + i)[2] for i in range(BLOCK))
        return torch.cat([sample_timesteps(1, generator) for generator in generators])

    def _gates(self, block: int) -> Tensor:
        """Weights of the pixel losses of the samples `block * BLOCK ...`, `(BLOCK,)` float32."""
        p = self.gate(self._times(block).double())
        u = torch.rand((), generator=self._generator("gate", block), dtype=torch.float64)
        return systematic_sample(p, float(u)).div(p).float()

    def _begin(self, index: int) -> tuple[str, int, torch.Generator]:
        """Face, caption, and the generator that goes on to draw the rest."""
        id, generator = self._id(index), self._generator("sample", index)
        count = len(self.cache.captions(id))
        return id, int(torch.randint(count, (), generator=generator)), generator

    def _id(self, index: int) -> str:
        epoch, position = divmod(index // self.draws_per_face, len(self.cache.ids))
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
