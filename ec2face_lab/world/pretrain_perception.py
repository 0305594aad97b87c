"""Train the miniature's critics: two parsers, two CLIPs.

    python -m ec2face_lab.world.pretrain_perception parser --role guiding --out data/mini
    python -m ec2face_lab.world.pretrain_perception clip --role scoring --out data/mini

The counterpart of FaRL and of OpenAI's CLIP, which the paper takes as given. The roles `guiding`
(serves as a loss) and `scoring` (serves as a metric) share neither faces, seed, widths nor
strength of augmentation. Faces are drawn on the fly from both looks, with balanced and with natural
frequencies, and softened at random so that generated and autoencoded pictures are read as well.
A run is a function of its arguments: batch k draws the same faces and noise after a resume.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import CLASSES, FACER_TO_CELEBAMASK, GROUPS, NUM_CLASSES
from ec2face_core.config import ROOT, load_profile
from ec2face_core.losses import class_weights
from ec2face_core.metrics import mask_accuracy
from ec2face_core.perception import CLIP_MEAN, CLIP_STD, FACER_CHANNEL
from ec2face_core.runs import provenance

from ..prepare.captions import captions
from .networks import (
    MiniParserNet,
    build_mini_clip,
    clip_tokenizer,
    mini_clip_config,
    save_mini_clip,
    save_parser,
)
from .scenes import HAIR_COLOURS, HAIR_LENGTHS, HAIR_STYLES
from .sources import HELD_OUT_SEED, SIZE, Faces, World, add_world_arguments, chosen_world

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


SAMPLES = {"parser": 48_000, "clip": 80_000}  # five and nine minutes on one core

BLOCK = 128  # faces drawn at once; a checkpoint lies between two blocks


@dataclass(frozen=True)
class Role:
    """What sets the two critics of a kind apart. `seed` is that of faces, weights and noise."""

    seed: int
    strength: float  # of the augmentation
    widths: tuple[int, ...]  # of the parser
    clip: dict[str, Any]  # differences from `mini_clip_config`


ROLES = {
    "guiding": Role(7_001, 1.0, (24, 48, 96), {}),
    "scoring": Role(8_002, 0.7, (32, 48, 56, 56), {"layers": (1, 3, 2, 1), "embed_dim": 64}),
}


def augment(images: Tensor, strength: float) -> Tensor:
    """Colour jitter, softening (half the resolution and back), blur and noise, each at random.

    images: [-1, 1], `b 3 h w`. What a generator or an autoencoder does to a face, roughly.
    """
    b = len(images)

    def amount(scale: float, channels: int = 1) -> Tensor:
        return torch.randn(b, channels, 1, 1) * scale * strength

    x = images * (1 + amount(0.12)) * (1 + amount(0.05, 3)) + amount(0.08) + amount(0.04, 3)
    half = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    softness = torch.rand(b, 1, 1, 1) * (torch.rand(b, 1, 1, 1) < 0.5)
    x = torch.lerp(x, torch.where(torch.rand(b, 1, 1, 1) < 0.5, half, blurred), softness)
    noise = torch.rand(b, 1, 1, 1) * (torch.rand(b, 1, 1, 1) < 0.5) * 0.12 * strength
    return (x + noise * torch.randn_like(x)).clamp(-1, 1)


def class_recall(predicted: Tensor, target: Tensor) -> dict[str, Any]:
    """`mask_accuracy` as a JSON object: groups, and the classes that occur."""
    found = mask_accuracy(predicted, target)
    means = {name: round(float(getattr(found, name)), 2) for name in ("OAA", *GROUPS)}
    named = zip(CLASSES, found.per_class, found.support, strict=True)
    classes = {name: round(float(value), 2) if n else None for name, value, n in named}
    return {**means, "classes": classes, "faces": len(target)}


def train_parser(role: Role, path: Path, samples: int, world: World) -> None:
    """Cross-entropy with mild class weights, AdamW, one cycle; writes `path` and its JSON."""
    torch.manual_seed(role.seed)
    net = MiniParserNet(role.widths, SIZE)
    counts = world.faces(role.seed, 2**30, 256).label_map.flatten().bincount(minlength=NUM_CLASSES)
    # recall per class is what counts later, but probabilities must stay honest: ^0.4 of Eq. 10
    weights = class_weights(counts).pow(0.4).float()
    weights = weights / (weights * counts).sum() * counts.sum()
    prior = (counts / counts.sum())[list(FACER_TO_CELEBAMASK)].log()
    with torch.no_grad():  # start from the class frequencies instead of learning them first
        net.head.bias.copy_(prior.repeat_interleave(4))
        net.head.weight.mul_(0.3)
    held_out = world.held_out()

    def predict(images: Tensor) -> Tensor:
        return net(images / 2 + 0.5)[0][:, FACER_CHANNEL]

    def loss(faces: Faces) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = predict(augment(faces.image, role.strength))
        return F.cross_entropy(logits.float(), faces.label_map, weights)

    @torch.no_grad()
    def quality() -> dict[str, Any]:
        return {
            name: class_recall(
                torch.cat([predict(part).argmax(1) for part in faces.image.split(64)]),
                faces.label_map,
            )
            for name, faces in held_out.items()
        }

    run = Run(path, net, loss, quality, role, world, batch=32, rate=4e-3)
    record = run.fit(samples)
    save_parser(net, path)
    _write_json(path.with_suffix(".json"), record)


def train_clip(role: Role, folder: Path, samples: int, world: World) -> None:
    """CLIP's contrastive loss, and beside it a classifier whose weights are sentences of one fact.

    Whole captions are told apart by gender, age and hair alone; that a face smiles or wears
    earrings then stays unread. "This person is wearing earrings." against every face teaches it.
    """
    tokenizer = clip_tokenizer(world.corpus(role.seed, 2**30), vocab_size=800)
    config = mini_clip_config(len(tokenizer), **role.clip)
    torch.manual_seed(role.seed)
    model = build_mini_clip(config)
    told = facts(world.faces(role.seed, 2**30, 8).attributes[0])
    prior = nn.ParameterDict({"bias": torch.full((len(told),), -1.0), "scale": torch.tensor(2.3)})
    nets = nn.ModuleDict({"clip": model, "prior": prior})
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    held_out = next(iter(world.held_out().values()))

    def pixels(images: Tensor) -> Tensor:
        return (images / 2 + 0.5 - mean) / std

    def tokens(texts: list[str]) -> Tensor:
        length = config["text_cfg"]["context_length"]
        padded = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
        return torch.tensor(padded["input_ids"])

    def loss(faces: Faces) -> Tensor:
        seed = int(torch.randint(2**31, ()))
        style = world.styles[int(torch.randint(len(world.styles), ()))]
        sentences = [captions(fact, 1, seed, style)[0] for fact in told]
        image = model.encode_image(pixels(augment(faces.image, role.strength)), normalize=True)
        text = model.encode_text(tokens(faces.captions + sentences), normalize=True)
        text, fact = text.split([len(faces.captions), len(told)])
        logits = prior["scale"].exp() * image @ fact.T + prior["bias"]
        attributes = F.binary_cross_entropy_with_logits(logits, fact_targets(faces.attributes))
        scale = model.logit_scale.exp().clamp(max=100)
        return contrastive_loss(image, text, scale, faces.captions) + 4 * attributes

    @torch.no_grad()
    def quality() -> dict[str, Any]:
        image = model.encode_image(pixels(held_out.image), normalize=True)
        text = model.encode_text(tokens(held_out.captions), normalize=True)
        fact = model.encode_text(tokens([captions(f, 1, 0)[0] for f in told]), normalize=True)
        truth = fact_targets(held_out.attributes).bool()
        areas = {
            " ".join(map(str, *told[i].items())): round(100 * area_under_curve(scores, holds), 1)
            for i, (scores, holds) in enumerate(zip((image @ fact.T).T, truth.T, strict=True))
        }
        return {**retrieval(image, text, held_out.captions), "facts": areas}

    run = Run(folder, nets, loss, quality, role, world, batch=64, rate=2e-3)
    record = run.fit(samples)
    save_mini_clip(folder, model, config, tokenizer)
    _write_json(folder / "provenance.json", record)


@dataclass
class Run:
    """One training: AdamW under one cycle of the rate, a line and a checkpoint every 20 s.

    path: what the caller writes afterwards. loss: `Faces` -> scalar. quality: measured on held-out
    faces. The checkpoint in `runs/critics/` disappears when the training is complete.
    """

    path: Path
    nets: nn.Module
    loss: Callable[[Faces], Tensor]
    quality: Callable[[], dict[str, Any]]
    role: Role
    world: World
    batch: int
    rate: float

    def fit(self, samples: int) -> dict[str, Any]:
        """Train on `samples` faces; returns the provenance."""
        optimizer = torch.optim.AdamW(
            self.nets.parameters(), lr=self.rate, weight_decay=0.02, betas=(0.9, 0.98)
        )
        plan = repr((self.path, self.role, self.world.name, self.batch, self.rate, samples))
        digest = hashlib.sha256(plan.encode()).hexdigest()[:8]  # another plan is another file
        file = ROOT / "runs" / "critics" / f"{self.path.stem}-{digest}.pt"
        seen, seconds = self._resume(file, optimizer)
        last = mark = time.perf_counter()
        loss = torch.tensor(math.nan)
        while seen < samples:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * one_cycle(seen / samples)
            torch.manual_seed(self.role.seed * 1_000_003 + seen)
            self.nets.train()
            for faces in self.world.faces(self.role.seed, seen, BLOCK).split(self.batch):
                loss = self.loss(faces)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
                optimizer.step()
            seen += BLOCK
            now = time.perf_counter()
            seconds, last = seconds + now - last, now
            if now - mark > 20:
                self._report(seen, samples, seconds, loss)
                self._save(file, optimizer, seen, seconds)
                mark = time.perf_counter()
        held_out = self._report(seen, samples, seconds, loss)
        file.unlink(missing_ok=True)
        return provenance(
            load_profile("mini"), seconds=seconds, critic=self.path.stem, faces_seen=seen,
            role=str(self.role), batch=self.batch, learning_rate=self.rate, faces=self.world.name,
            parameters=sum(p.numel() for p in self.nets.parameters()), held_out=held_out,
            held_out_seed=HELD_OUT_SEED,
        )  # fmt: skip

    def _report(self, seen: int, samples: int, seconds: float, loss: Tensor) -> dict[str, Any]:
        self.nets.eval()
        found = self.quality()
        numbers = next((v for v in found.values() if isinstance(v, dict) and "OAA" in v), found)
        brief = ", ".join(f"{k} {v}" for k, v in numbers.items() if isinstance(v, float))
        done = f"{seen}/{samples} faces, {seconds:.0f} s"
        print(f"{self.path.stem}: {done}, loss {loss.item():.4f}, {brief}", flush=True)
        return found

    def _save(self, file: Path, optimizer, seen: int, seconds: float) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        state = {"nets": self.nets.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "seen": seen, "seconds": seconds}, part)
        part.replace(file)

    def _resume(self, file: Path, optimizer) -> tuple[int, float]:
        """(samples seen, seconds) of the checkpoint; (0, 0.0) without one."""
        if not file.exists():
            return 0, 0.0
        state = torch.load(file, weights_only=True)
        self.nets.load_state_dict(state["nets"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"{self.path.stem}: resumes after {state['seen']} faces", flush=True)
        return state["seen"], state["seconds"]


def one_cycle(progress: float, warmup: float = 0.08) -> float:
    """Factor of the learning rate at `progress` in [0, 1]: linear rise, then a half cosine to 0."""
    if progress < warmup:
        return (progress + 0.005) / (warmup + 0.005)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Command line: which critic, which role, how long, and where to."""
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_lab.world.pretrain_perception",
        description="Train one critic of the miniature on one core; resumes if it was stopped.",
    )
    parser.add_argument("kind", choices=("parser", "clip"), help="which network")
    parser.add_argument("--role", choices=tuple(ROLES), required=True, help="guides, or scores")
    add_world_arguments(parser)
    parser.add_argument("--samples", type=int, default=0, help="faces to see; 0 = default of kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    role, (world, out) = ROLES[options.role], chosen_world(parser, options)
    samples = options.samples or SAMPLES[options.kind]
    if options.kind == "parser":
        train_parser(role, out / f"parser_{options.role}.pt", samples, world)
    else:
        train_clip(role, out / f"clip_{options.role}", samples, world)


if __name__ == "__main__":
    main()
