"""Training on faces that are rendered on the fly: what the trainings of perception models share.

Faces are rendered block by block. Every block is used several times, mixed with the newest others,
because rendering takes as long as learning. A training is a function of its arguments, also when it
is interrupted and resumed, as long as the number of samples limits it and not the time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ec2face_core.config import load_profile
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import content_key, provenance

from .networks import MiniParserNet, ParserNet
from .sources import HELD_OUT_SEED, DataSource, FaceBatch, ProceduralFaces
from .training import descend, set_learning_rates, train

Augmentation = Callable[[Tensor, float], Tensor]

Mixture = tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Role:
    """What sets two models of a kind apart.

    Attributes:
        seed: of faces, weights and noise.
        mixture: look, frequencies and share of the parts of a block of procedural faces; empty:
            the source's own.
        augmentation: changes images.
        strength: of the augmentation.
        moves: whether faces are mirrored and shifted as well.
        parser: class of the parser.
        rarity: power of the class weights in the parser's cross-entropy.
        dice: weight of the soft Dice loss beside it.
        clip: differences from `mini_clip_config`.
        sigmoid: whether the CLIP learns by SigLIP's loss instead of CLIP's.
    """

    seed: int
    mixture: Mixture
    augmentation: Augmentation
    strength: float
    moves: bool
    parser: type[ParserNet] = MiniParserNet
    rarity: float = 0.0
    dice: float = 0.0
    clip: dict[str, Any] = field(default_factory=dict)
    sigmoid: bool = False


@dataclass(frozen=True)
class Recipe:
    """How one kind of model is trained.

    Attributes:
        block: faces rendered at once; a step of `train` renders a block.
        blocks: the newest blocks, from which batches are drawn.
        batch: faces of an optimiser step.
        updates: optimiser steps for every block.
        lr: peak learning rate.
    """

    block: int
    blocks: int
    batch: int
    updates: int
    lr: float


class RecentFaces:
    """The newest blocks of an endless sequence of faces, as tensors on its device.

    read: number of a block -> tensors with a row for each face.
    """

    def __init__(self, read: Callable[[int], tuple[Tensor, ...]], blocks: int) -> None:
        self.read = read
        self.blocks = blocks
        self.next = 0
        self.rows = 0
        self.kept: list[Tensor] = []

    def advance(self, number: int) -> None:
        """Make block `number` the newest; what was kept before it is read again if need be."""
        if self.next <= number - self.blocks or self.next == 0:
            self.next = max(0, number - self.blocks + 1)
        while self.next <= number:
            block = self.read(self.next)
            size = len(block[0])
            if not self.kept:
                self.kept = [t.new_empty(self.blocks * size, *t.shape[1:]) for t in block]
            place = self.next % self.blocks * size
            for kept, tensor in zip(self.kept, block, strict=True):
                kept[place : place + size] = tensor
            self.next += 1
            self.rows = min(self.next, self.blocks) * size

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """Random faces, by the device's global generator."""
        rows = torch.randint(self.rows, (count,), device=self.kept[0].device)
        return tuple(tensor[rows] for tensor in self.kept)


@dataclass
class Training:
    """One training: AdamW under a warm-up and a cosine.

    Attributes:
        path: what the caller writes afterwards; it names the checkpoints in `runs/critics`.
        nets: everything that is trained.
        read: faces -> tensors with a row for each, which `loss` takes.
        loss: a batch of these tensors -> scalar.
        quality: measures the nets on held-out faces, as JSON values.
        role: guide or evaluator.
        recipe: sizes and rates.
        source: the faces.
    """

    path: Path
    nets: nn.Module
    read: Callable[[FaceBatch], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    quality: Callable[[], dict[str, Any]]
    role: Role
    recipe: Recipe
    source: DataSource

    def fit(self, samples: int, limit: float) -> dict[str, Any]:
        """Train on `samples` faces, or for `limit` > 0 seconds; returns the provenance."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            self.nets.parameters(), lr=recipe.lr, weight_decay=0.02, betas=(0.9, 0.98), fused=True
        )
        plan = (self.path, _about(self.role), recipe, self.source.name, samples, limit)
        folder = ROOT / "runs" / "critics" / f"{self.path.stem}-{content_key(repr(plan), 8)}"
        faces = RecentFaces(
            lambda n: self.read(read_faces(self.source, self.role, n * recipe.block, recipe.block)),
            recipe.blocks,
        )

        def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
            set_learning_rates(optimizer, progress, warmup=0.08)
            faces.advance(number)
            torch.manual_seed(generator.initial_seed())  # draws and losses use the global ones
            for _ in range(recipe.updates):
                loss = self.loss(*faces.draw(recipe.batch))
                descend(optimizer, loss, clip=1.0)
            return {"loss": loss}

        state = {"nets": self.nets, "optimizer": optimizer}
        self.nets.train()
        seconds = train(
            folder, step, state, self.role.seed, steps=0 if limit else -(-samples // recipe.block),
            seconds=limit, device=self.source.device,
        )  # fmt: skip
        self.nets.eval()
        quality = self.quality()
        shutil.rmtree(folder / "checkpoints")  # the training is complete
        print(f"{self.path.stem}: {seconds:.0f} s, {_brief(quality)}", flush=True)
        return provenance(
            load_profile("mini128"), seconds=seconds, critic=self.path.stem,
            faces_rendered=faces.next * recipe.block,
            faces_seen=faces.next * recipe.updates * recipe.batch,
            role=_about(self.role), recipe=vars(recipe), faces=self.source.name,
            parameters=sum(p.numel() for p in self.nets.parameters()), held_out=quality,
            held_out_seed=HELD_OUT_SEED,
        )  # fmt: skip


def read_faces(source: DataSource, role: Role, start: int, count: int) -> FaceBatch:
    """Faces start ... start + count - 1 of a role."""
    if isinstance(source, ProceduralFaces):
        return source.faces(role.seed, start, count, role.mixture)
    return source.faces(role.seed, start, count)


def _about(role: Role) -> dict[str, Any]:
    """A role as JSON-ready values."""
    values = {k: v.__name__ if callable(v) else v for k, v in vars(role).items()}
    return {k: v for k, v in values.items() if v not in (0.0, {}, ())}


def _brief(quality: dict[str, Any]) -> str:
    """The numbers of the first held-out set."""
    numbers = next((v for v in quality.values() if isinstance(v, dict)), quality)
    return ", ".join(f"{k} {v}" for k, v in numbers.items() if isinstance(v, float))
