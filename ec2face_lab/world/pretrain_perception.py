"""Train the miniature's perception models: two face parsers, two CLIPs and an attribute evaluator.

They are the counterparts of FaRL and of OpenAI's CLIP, which the paper takes as given. Parsers and
CLIPs come in two roles: the *guide* (`guiding`) serves as a loss, the *evaluator* (`scoring`) as a
metric; the attribute evaluator is a metric only. No two share faces, architecture, loss or
augmentation. `perception_training` says how they are trained.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import CLASSES, FACER_TO_CELEBAMASK, one_hot, pixel_counts
from ec2face_core.losses import class_weights
from ec2face_core.metrics import RECALL, mask_accuracy
from ec2face_core.perception import CLIP_MEAN, CLIP_STD, FACER_CHANNEL
from ec2face_core.runs import write_json

from ..prepare.captions import captions
from .augmentation import disturb, moved, renamed, soften
from .facts import (
    FactNet,
    balanced_accuracy,
    fact_names,
    fact_targets,
    facts,
    save_facts,
)
from .networks import (
    DilatedParserNet,
    build_mini_clip,
    clip_tokenizer,
    mini_clip_config,
    save_mini_clip,
    save_parser,
)
from .perception_training import Recipe, Role, Training, read_faces
from .retrieval import contrastive_loss, mentioned_facts, retrieval, sigmoid_loss
from .sources import DataSource, FaceBatch

VOCABULARY = 2**30  # number of the first face whose captions and frequencies are looked at

VOCABULARY_SIZE = 720  # tokens at most: an alphabet of 514 and every word of the captions

TEXT_LENGTH = 64  # tokens

SHIFT = 6  # pixels of 128 by which the evaluators' faces are moved at most

SENTENCES = 24  # ways of saying a fact in each style

ROLES = {
    "guiding": Role(
        7_001, (), soften, 1.0, moves=False, rarity=0.4,
        clip={"width": 14, "layers": (1, 2, 2, 1), "text_width": 96, "embed_dim": 96},
    ),
    "scoring": Role(
        8_002,
        (("first", "balanced", 0.4), ("first", "natural", 0.6)),
        disturb, 0.8, moves=True, parser=DilatedParserNet, dice=1.0, sigmoid=True,
        clip={"width": 128, "layers": 5, "text_width": 96, "text_layers": 3, "embed_dim": 128},
    ),
}  # fmt: skip

FACTS = Role(
    9_003, (("first", "balanced", 0.75), ("first", "natural", 0.25)), disturb, 0.6, moves=True,
)  # fmt: skip


RECIPES = {
    "parser": Recipe(block=512, blocks=48, batch=128, updates=8, lr=4e-3),
    "clip": Recipe(block=1024, blocks=128, batch=512, updates=16, lr=1e-3),
    "facts": Recipe(block=512, blocks=64, batch=256, updates=8, lr=2e-3),
}

SAMPLES = {"parser": 24_000, "clip": 60_000, "facts": 30_000}  # faces rendered, if time is no limit


def _bytes(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, as pictures are written."""
    return ((images + 1) * 127.5).round().byte()


def _floats(pixels: Tensor) -> Tensor:
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _augmented(role: Role, images: Tensor) -> Tensor:
    """uint8 images, moved and changed as the role wants it, in [-1, 1]."""
    if role.moves:
        images, _ = moved(images, SHIFT * images.shape[-1] // 128)
    return role.augmentation(_floats(images), role.strength)


# --------------------------------------------------------------------------------- the parsers


def parsing_quality(predicted: Tensor, target: Tensor) -> dict[str, Any]:
    """`mask_accuracy` as JSON values: recall and F1 of the groups, and of the classes that occur.

    predicted, target: label maps `b h w`.
    """
    accuracy = mask_accuracy(predicted, target)
    names = (*RECALL, "F1", "F1_HFA", "F1_NFA", "F1_RFA", "mIoU")
    means = {name: round(float(getattr(accuracy, name)), 2) for name in names}
    present = [i for i in range(len(CLASSES)) if accuracy.support[i]]
    for name, values in (("recall", accuracy.per_class), ("f1", accuracy.f1)):
        means[name] = {CLASSES[i]: round(float(values[i]), 2) for i in present}
    return {**means, "faces": len(target)}


def shared_errors(guide: Tensor, evaluator: Tensor, target: Tensor) -> float:
    """Share of the evaluator's wrong pixels that the guide gets wrong too, in percent.

    Args:
        guide: label maps that the guide parsed, `b h w`.
        evaluator: those of the evaluator.
        target: the true ones.

    Returns:
        The share; NaN if the evaluator makes no mistake.
    """
    wrong = evaluator != target
    return 100 * ((guide != target) & wrong).sum().item() / (wrong.sum().item() or float("nan"))


def train_parser(
    role: Role, path: Path, samples: int, source: DataSource, seconds: float = 0.0
) -> None:
    """Cross-entropy, for the evaluator with soft Dice; writes `path` and its provenance beside it.

    Args:
        role: guide or evaluator.
        path: of the TorchScript file.
        samples: faces to train on.
        source: the faces.
        seconds: if above 0, the training's length instead of `samples`.
    """
    device = source.device
    torch.manual_seed(role.seed)
    net = role.parser(size=source.size)
    counts = pixel_counts(read_faces(source, role, VOCABULARY, 256).label_map).sum(0).cpu()
    # Recall per class is measured later, but probabilities must stay honest: a power of Eq. 10.
    weights = class_weights(counts).pow(role.rarity).float()
    weights = (weights / (weights * counts).sum() * counts.sum()).to(device)
    net.start_from(((counts + 1) / counts.sum())[list(FACER_TO_CELEBAMASK)])
    net.to(device, memory_format=torch.channels_last)
    channel = FACER_CHANNEL.to(device)

    def read(faces: FaceBatch) -> tuple[Tensor, ...]:
        return _bytes(faces.image), faces.label_map.byte()

    def predict(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = net(images / 2 + 0.5)[0]
        return logits[:, channel].float()

    def loss(images: Tensor, label_maps: Tensor) -> Tensor:
        labels = label_maps.long()
        if role.moves:
            both = torch.cat([images, label_maps[:, None]], 1)
            both, mirrored = moved(both, SHIFT * source.size // 128)
            images = both[:, :3]
            labels = renamed(both[:, 3].long(), mirrored)
        logits = predict(role.augmentation(_floats(images), role.strength))
        entropy = F.cross_entropy(logits, labels, weights)
        return entropy + role.dice * dice_loss(logits, labels) if role.dice else entropy

    @torch.no_grad()
    def quality() -> dict[str, Any]:
        measured = {}
        for name, faces in source.held_out().items():
            parsed = torch.cat([predict(part).argmax(1) for part in faces.image.split(64)])
            measured[name] = parsing_quality(parsed, faces.label_map)
        return measured

    training = Training(path, net, read, loss, quality, role, RECIPES["parser"], source)
    record = training.fit(samples, seconds)
    save_parser(net, path)
    write_json(path.with_suffix(".json"), record)


def dice_loss(logits: Tensor, label_map: Tensor) -> Tensor:
    """One minus the soft Dice coefficient, mean over the classes that occur in the batch.

    logits: `b 19 h w`. label_map: `b h w`.
    """
    probabilities = logits.softmax(1)
    target = one_hot(label_map)
    common = (probabilities * target).sum((0, 2, 3))
    support = target.sum((0, 2, 3))
    dice = 2 * common / (probabilities.sum((0, 2, 3)) + support).clamp(min=1)
    present = (support > 0).float()
    return 1 - (dice * present).sum() / present.sum()


# ----------------------------------------------------------------------------------- the CLIPs


def area_under_curve(scores: Tensor, holds: Tensor) -> float | None:
    """How often a face for which the fact holds scores above one for which it does not, in percent.

    None if the fact holds for all or for none. scores: `(b,)`. holds: `(b,)` bool.
    """
    area = 100 * (scores[holds][:, None] > scores[~holds][None]).float().mean().item()
    return None if math.isnan(area) else round(area, 1)


def train_clip(
    role: Role, folder: Path, samples: int, source: DataSource, seconds: float = 0.0
) -> None:
    """A contrastive loss, and beside it a classifier whose weights are sentences of one fact.

    Gender, age and hair alone tell whole captions apart, so the contrastive loss would not teach
    smiles or earrings. Comparing "This person is wearing earrings." with every face does.

    Args:
        role: guide or evaluator.
        folder: of the open_clip model, its tokenizer and its provenance.
        samples: faces to train on.
        source: the faces.
        seconds: if above 0, the training's length instead of `samples`.
    """
    device = source.device
    tokenizer = clip_tokenizer(source.corpus(role.seed, VOCABULARY), VOCABULARY_SIZE, TEXT_LENGTH)
    config = mini_clip_config(len(tokenizer), length=TEXT_LENGTH, **role.clip)
    size = config["vision_cfg"]["image_size"]
    torch.manual_seed(role.seed)
    model = build_mini_clip(config)
    statements = facts(read_faces(source, role, VOCABULARY, 64).attributes)
    bias = torch.full((len(statements),), -1.0)
    prior = nn.ParameterDict({"fact_bias": bias, "fact_scale": torch.tensor(2.3)})
    if role.sigmoid:
        prior["pair_bias"] = torch.tensor(-6.0)
    nets = nn.ModuleDict({"clip": model, "prior": prior}).to(device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def tokens(texts: Sequence[str]) -> Tensor:
        encoded = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=TEXT_LENGTH,
            return_tensors="pt", return_attention_mask=False,
        )  # fmt: skip
        return encoded.input_ids.to(device)

    sayings = torch.stack([
        tokens([c for style in source.styles for c in captions(fact, SENTENCES, 0, style)])
        for fact in statements
    ])  # fmt: skip

    def read(faces: FaceBatch) -> tuple[Tensor, ...]:
        ids = torch.tensor([zlib.crc32(caption.encode()) for caption in faces.captions])
        truth = fact_targets(faces.attributes, statements)
        pixels = _bytes(_shrunk(faces.image, size))
        return pixels, tokens(faces.captions).short(), ids.to(device), truth.to(device)

    def image_features(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return F.normalize(model.encode_image((images / 2 + 0.5 - mean) / std).float(), dim=-1)

    def text_features(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return F.normalize(model.encode_text(ids).float(), dim=-1)

    def loss(images: Tensor, ids: Tensor, same: Tensor, truth: Tensor) -> Tensor:
        saying = torch.randint(sayings.shape[1], (len(statements),), device=device)
        said = sayings[torch.arange(len(statements), device=device), saying]
        image = image_features(_augmented(role, images))
        text, fact = text_features(torch.cat([ids.long(), said])).split([len(ids), len(said)])
        logits = prior["fact_scale"].exp() * image @ fact.T + prior["fact_bias"]
        attributes = F.binary_cross_entropy_with_logits(logits, truth.float())
        similarity = model.logit_scale.exp().clamp(max=100) * image @ text.T
        if role.sigmoid:
            return sigmoid_loss(similarity + prior["pair_bias"], same) + 4 * attributes
        return contrastive_loss(similarity, same) + 4 * attributes

    @torch.no_grad()
    def quality() -> dict[str, Any]:
        measured = {}
        for name, faces in source.held_out().items():
            image = image_features(_shrunk(faces.image, size))
            text = text_features(tokens(faces.captions))
            fact = text_features(sayings[:, 0])
            truth = fact_targets(faces.attributes, statements).to(device)
            columns = zip(fact_names(statements), (image @ fact.T).T, truth.T, strict=True)
            areas = {key: area_under_curve(scores, holds) for key, scores, holds in columns}
            mentions = mentioned_facts(faces.captions, fact_names(statements)).to(device)
            found = retrieval(image, text, faces.captions, mentions, truth)
            measured[name] = {**found, "facts": areas}
        return measured

    training = Training(folder, nets, read, loss, quality, role, RECIPES["clip"], source)
    record = training.fit(samples, seconds)
    save_mini_clip(folder, model.cpu(), config, tokenizer)
    write_json(folder / "provenance.json", record)


def _shrunk(images: Tensor, size: int) -> Tensor:
    """As `ClipScorer` resizes."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(
        images, (size, size), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.clamp(-1, 1)


# ------------------------------------------------------------------------ the attribute evaluator


def train_facts(path: Path, samples: int, source: DataSource, seconds: float = 0.0) -> None:
    """A yes-or-no question for every fact; writes `path` and its provenance beside it.

    Where a fact holds or does not hold rarely, these faces weigh more.

    Args:
        path: of the safetensors file.
        samples: faces to train on.
        source: the faces.
        seconds: if above 0, the training's length instead of `samples`.
    """
    device = source.device
    role = FACTS
    known = read_faces(source, role, VOCABULARY, 2048)
    statements = facts(known.attributes)
    targets = fact_targets(known.attributes, statements).to(device)
    share = targets.float().mean(0).clamp(0.02, 0.98)
    torch.manual_seed(role.seed)
    net = FactNet(fact_names(statements), size=source.size)
    net.to(device, memory_format=torch.channels_last)

    def predict(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return net(images).float()

    def read(faces: FaceBatch) -> tuple[Tensor, ...]:
        return _bytes(faces.image), fact_targets(faces.attributes, statements).to(device)

    def loss(images: Tensor, truth: Tensor) -> Tensor:
        weights = torch.where(truth, 0.5 / share, 0.5 / (1 - share)).sqrt()
        logits = predict(_augmented(role, images))
        return F.binary_cross_entropy_with_logits(logits, truth.float(), weights)

    @torch.no_grad()
    def quality() -> dict[str, Any]:
        net.calibrate(torch.cat([predict(part) for part in known.image.split(256)]), targets)
        measured = {}
        for name, faces in source.held_out().items():
            truth = fact_targets(faces.attributes, statements).to(device)
            held = torch.cat([net.holds(part) for part in faces.image.split(256)])
            measured[name] = facts_quality(net.names, held, truth)
        return measured

    training = Training(path, net, read, loss, quality, role, RECIPES["facts"], source)
    record = training.fit(samples, seconds)
    save_facts(net, path)
    write_json(path.with_suffix(".json"), record)


def facts_quality(names: Sequence[str], predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Balanced accuracy of every fact and its mean, in percent.

    Args:
        names: of the n facts.
        predicted: which facts the net finds, `b n` bool.
        truth: which hold.

    Returns:
        mean, worst, facts (by name; None where a fact holds for every face or for none), faces.
    """
    values = balanced_accuracy(predicted, truth).tolist()
    known = {k: None if math.isnan(v) else round(v, 2) for k, v in zip(names, values, strict=True)}
    numbers = [value for value in known.values() if value is not None]
    mean = round(sum(numbers) / len(numbers), 2)
    return {"mean": mean, "worst": min(numbers), "facts": known, "faces": len(truth)}
