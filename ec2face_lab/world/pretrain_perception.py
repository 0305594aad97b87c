"""Train the miniature's perception models: two face parsers and two CLIPs.

They are the counterparts of FaRL and of OpenAI's CLIP, which the paper takes as given. Each kind
comes in two roles: the *guide* (`guiding`) serves as a loss, the *evaluator* (`scoring`) as a
metric. The two share neither faces, seed, widths nor strength of augmentation. Faces are rendered
on the fly in both looks, with balanced and with natural frequencies, and softened at random, so
that the models can also read generated and autoencoded pictures. A training is a function of its
arguments, also when it is interrupted and resumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import CLASSES, FACER_TO_CELEBAMASK, GROUPS, pixel_counts
from ec2face_core.config import ROOT, load_profile
from ec2face_core.losses import class_weights
from ec2face_core.metrics import mask_accuracy
from ec2face_core.perception import CLIP_MEAN, CLIP_STD, FACER_CHANNEL
from ec2face_core.runs import content_key, provenance, write_json

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
from .sources import HELD_OUT_SEED, SIZE, DataSource, FaceBatch
from .training import descend, set_learning_rates, train

WORDS = {"hair_colour": HAIR_COLOURS, "hair_style": HAIR_STYLES, "hair_length": HAIR_LENGTHS}

SAMPLES = {"parser": 48_000, "clip": 80_000}  # five and nine minutes on one core

BLOCK = 128  # faces rendered at once; a step of `train` goes through all of them

VOCABULARY = 2**30  # number of the first face whose captions and frequencies are looked at


@dataclass(frozen=True)
class Role:
    """What sets the two models of a kind apart. `seed` is that of faces, weights and noise."""

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

    It imitates roughly what a generator or an autoencoder does to a face.

    images: `b 3 h w` in [-1, 1].
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


@dataclass
class Training:
    """One training: AdamW under a warm-up and a cosine.

    Attributes:
        path: what the caller writes afterwards; it names the checkpoints in `runs/critics`.
        nets: everything that is trained.
        loss: a batch of faces -> scalar.
        quality: measures the nets on held-out faces, as JSON values.
        role: guide or evaluator.
        source: the faces.
        batch: faces of an optimiser step.
        lr: peak learning rate.
    """

    path: Path
    nets: nn.Module
    loss: Callable[[FaceBatch], Tensor]
    quality: Callable[[], dict[str, Any]]
    role: Role
    source: DataSource
    batch: int
    lr: float

    def fit(self, samples: int) -> dict[str, Any]:
        """Train on `samples` faces; returns the provenance."""
        optimizer = torch.optim.AdamW(
            self.nets.parameters(), lr=self.lr, weight_decay=0.02, betas=(0.9, 0.98)
        )
        plan = (self.path, self.role, self.source.name, self.batch, self.lr, samples)
        folder = ROOT / "runs" / "critics" / f"{self.path.stem}-{content_key(repr(plan), 8)}"

        def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
            set_learning_rates(optimizer, progress, warmup=0.08)
            torch.manual_seed(generator.initial_seed())  # the loss uses the global generator
            faces = self.source.faces(self.role.seed, number * BLOCK, BLOCK)
            for part in faces.split(self.batch):
                loss = self.loss(part)
                descend(optimizer, loss, clip=1.0)
            return {"loss": loss}

        state = {"nets": self.nets, "optimizer": optimizer}
        steps = -(-samples // BLOCK)
        self.nets.train()
        seconds = train(folder, step, state, self.role.seed, steps=steps)
        self.nets.eval()
        quality = self.quality()
        shutil.rmtree(folder / "checkpoints")  # the training is complete
        print(f"{self.path.stem}: {seconds:.0f} s, {_brief(quality)}", flush=True)
        return provenance(
            load_profile("mini"), seconds=seconds, critic=self.path.stem, faces_seen=steps * BLOCK,
            role=str(self.role), batch=self.batch, learning_rate=self.lr, faces=self.source.name,
            parameters=sum(p.numel() for p in self.nets.parameters()), held_out=quality,
            held_out_seed=HELD_OUT_SEED,
        )  # fmt: skip


def _brief(quality: dict[str, Any]) -> str:
    """The numbers of the first held-out set."""
    numbers = next((v for v in quality.values() if isinstance(v, dict) and "OAA" in v), quality)
    return ", ".join(f"{k} {v}" for k, v in numbers.items() if isinstance(v, float))


# --------------------------------------------------------------------------------- the parsers


def class_recall(predicted: Tensor, target: Tensor) -> dict[str, Any]:
    """`mask_accuracy` as JSON values: the groups, and the classes that occur."""
    accuracy = mask_accuracy(predicted, target)
    means = {name: round(float(getattr(accuracy, name)), 2) for name in ("OAA", *GROUPS)}
    named = zip(CLASSES, accuracy.per_class, accuracy.support, strict=True)
    classes = {name: round(float(value), 2) if n else None for name, value, n in named}
    return {**means, "classes": classes, "faces": len(target)}


def train_parser(role: Role, path: Path, samples: int, source: DataSource) -> None:
    """Cross-entropy with mild class weights; writes `path` and its provenance beside it.

    Args:
        role: guide or evaluator.
        path: of the TorchScript file.
        samples: faces to train on.
        source: the faces.
    """
    torch.manual_seed(role.seed)
    net = MiniParserNet(role.widths, SIZE)
    counts = pixel_counts(source.faces(role.seed, VOCABULARY, 256).label_map).sum(0)
    # Recall per class is measured later, but probabilities must stay honest: Eq. 10 to the 0.4.
    weights = class_weights(counts).pow(0.4).float()
    weights = weights / (weights * counts).sum() * counts.sum()
    prior = (counts / counts.sum())[list(FACER_TO_CELEBAMASK)].log()
    with torch.no_grad():  # begin with the class frequencies instead of learning them first
        net.head.bias.copy_(prior.repeat_interleave(4))
        net.head.weight.mul_(0.3)

    def predict(images: Tensor) -> Tensor:
        return net(images / 2 + 0.5)[0][:, FACER_CHANNEL]

    def loss(faces: FaceBatch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = predict(augment(faces.image, role.strength))
        return F.cross_entropy(logits.float(), faces.label_map, weights)

    @torch.no_grad()
    def quality() -> dict[str, Any]:
        recalls = {}
        for name, faces in source.held_out().items():
            parsed = torch.cat([predict(part).argmax(1) for part in faces.image.split(64)])
            recalls[name] = class_recall(parsed, faces.label_map)
        return recalls

    training = Training(path, net, loss, quality, role, source, batch=32, lr=4e-3)
    record = training.fit(samples)
    save_parser(net, path)
    write_json(path.with_suffix(".json"), record)


# ----------------------------------------------------------------------------------- the CLIPs


def facts(attributes: dict[str, bool | str]) -> list[dict[str, bool | str]]:
    """Everything that one sentence can say of faces with these keys, one fact each."""
    flags = sorted(key for key, value in attributes.items() if isinstance(value, bool))
    either = [{key: False} for key in ("male", "young") if key in attributes]
    known = {key: values for key, values in WORDS.items() if key in attributes}
    words = [{key: word} for key, values in known.items() for word in values if word != "medium"]
    return [{key: True} for key in flags] + either + words


def fact_targets(attributes: list[dict[str, bool | str]]) -> Tensor:
    """Which of `facts` hold for each face: `(b, n)` in {0, 1}."""
    pairs = [next(iter(fact.items())) for fact in facts(attributes[0])]
    return torch.tensor([[float(row[key] == value) for key, value in pairs] for row in attributes])


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, captions: list[str]) -> Tensor:
    """CLIP's symmetric cross-entropy; equal captions share the probability of being the right one.

    Args:
        image: unit features `(b, d)`.
        text: unit features `(b, d)`.
        scale: the inverse temperature.
        captions: of the b pairs.
    """
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    group = torch.tensor([ids[caption] for caption in captions])
    target = (group[:, None] == group[None]).float()
    target = target / target.sum(1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def retrieval(image: Tensor, text: Tensor, captions: list[str]) -> dict[str, float]:
    """Held-out quality of a CLIP, in percent; equal captions count as right.

    Args:
        image: unit features `(b, d)`.
        text: unit features `(b, d)`.
        captions: of the b pairs.

    Returns:
        top1, top5: images whose caption is among the nearest; pairs: how often a face is nearer to
        its caption than to another face's; cosine, cosine_other: mean scores of a face's caption
        and of the others'; candidates: b.
    """
    similarity = 100 * image @ text.T
    right = similarity.diagonal()
    same = torch.tensor([[a == b for b in captions] for a in captions])
    rank = ((similarity > right[:, None]) & ~same).sum(1)
    wins = (right[:, None] > similarity)[~same].float().mean()
    values = {
        "top1": 100 * (rank < 1).float().mean(), "top5": 100 * (rank < 5).float().mean(),
        "pairs": 100 * wins, "cosine": right.mean(), "cosine_other": similarity[~same].mean(),
    }  # fmt: skip
    return {"candidates": len(right), **{k: round(float(v), 2) for k, v in values.items()}}


def area_under_curve(scores: Tensor, holds: Tensor) -> float:
    """How often a face for which the fact holds scores above one for which it does not."""
    return (scores[holds][:, None] > scores[~holds][None]).float().mean().item()


def train_clip(role: Role, folder: Path, samples: int, source: DataSource) -> None:
    """CLIP's contrastive loss, and beside it a classifier whose weights are sentences of one fact.

    Gender, age and hair alone tell whole captions apart, so the contrastive loss would not teach
    smiles or earrings. Comparing "This person is wearing earrings." with every face does.

    Args:
        role: guide or evaluator.
        folder: of the open_clip model, its tokenizer and its provenance.
        samples: faces to train on.
        source: the faces.
    """
    tokenizer = clip_tokenizer(source.corpus(role.seed, VOCABULARY), vocab_size=800)
    config = mini_clip_config(len(tokenizer), **role.clip)
    torch.manual_seed(role.seed)
    model = build_mini_clip(config)
    statements = facts(source.faces(role.seed, VOCABULARY, 8).attributes[0])
    bias = torch.full((len(statements),), -1.0)
    prior = nn.ParameterDict({"bias": bias, "scale": torch.tensor(2.3)})
    nets = nn.ModuleDict({"clip": model, "prior": prior})
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    held_out = next(iter(source.held_out().values()))

    def image_features(images: Tensor) -> Tensor:
        return model.encode_image((images / 2 + 0.5 - mean) / std, normalize=True)

    def text_features(texts: list[str]) -> Tensor:
        length = config["text_cfg"]["context_length"]
        padded = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
        return model.encode_text(torch.tensor(padded["input_ids"]), normalize=True)

    def loss(faces: FaceBatch) -> Tensor:
        seed = int(torch.randint(2**31, ()))
        style = source.styles[int(torch.randint(len(source.styles), ()))]
        sentences = [captions(fact, 1, seed, style)[0] for fact in statements]
        image = image_features(augment(faces.image, role.strength))
        text, fact = text_features(faces.captions + sentences).split(
            [len(faces.captions), len(statements)]
        )
        logits = prior["scale"].exp() * image @ fact.T + prior["bias"]
        attributes = F.binary_cross_entropy_with_logits(logits, fact_targets(faces.attributes))
        scale = model.logit_scale.exp().clamp(max=100)
        return contrastive_loss(image, text, scale, faces.captions) + 4 * attributes

    @torch.no_grad()
    def quality() -> dict[str, Any]:
        image = image_features(held_out.image)
        text = text_features(held_out.captions)
        fact = text_features([captions(statement, 1, 0)[0] for statement in statements])
        truth = fact_targets(held_out.attributes).bool()
        areas = {}
        columns = zip(statements, (image @ fact.T).T, truth.T, strict=True)
        for statement, scores, holds in columns:
            name = " ".join(map(str, *statement.items()))
            areas[name] = round(100 * area_under_curve(scores, holds), 1)
        return {**retrieval(image, text, held_out.captions), "facts": areas}

    training = Training(folder, nets, loss, quality, role, source, batch=64, lr=2e-3)
    record = training.fit(samples)
    save_mini_clip(folder, model, config, tokenizer)
    write_json(folder / "provenance.json", record)
