"""The gates of a bundle: what its networks must be able to do before anything stands on them.

Every gate is a row of `<bundle>/gates.csv`: gate, value, wanted, holds. All are measured on faces
that no network was trained on, by the evaluators, which guide nothing. While a bundle has no base
yet, base and autoencoder are those of the foundation under way, as far as they are trained: the
base is guided as its distillation will be. Gates of what is not there have no value and do not
hold.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, pixel_counts
from ec2face_core.backbone import TextEmbedding, decode_latents, encode_images
from ec2face_core.config import Config
from ec2face_core.flow import follow_path
from ec2face_core.io.paths import resolve
from ec2face_core.mask_branch import predict_velocity
from ec2face_core.metrics import MaskAccuracy, mask_accuracy
from ec2face_core.perception import ClipScorer, FaceParser
from ec2face_core.pipeline import EC2FacePipeline

from ..prepare.captions import caption_facts, captions
from ..world.facts import (
    FactNet,
    balanced_accuracy,
    fact_names,
    fact_targets,
    facts,
    load_facts,
)
from ..world.pretrain import with_trained_vae, work_folder
from ..world.retrieval import mentioned_facts, retrieval
from ..world.sources import STYLE, FaceBatch, Portraits, caption_of, dense_condition

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from pandas import DataFrame

SEED = 91_001  # of faces that nothing is trained on

CHUNK = 32  # faces at once

CONDITIONED = 128  # faces whose dense conditions the base is given

STEPS = 28  # from noise to such a face

DRAWN = 16  # pixels of a class from which it counts as drawn; eyes need half of them

WANTED = {
    "autoencoder: OAA, % of the real images'": 98.0,
    "autoencoder: RFA, % of the real images'": 92.0,
    "autoencoder: F1, % of the real images'": 98.0,
    "autoencoder: F1_RFA, % of the real images'": 92.0,
    **{f"{role} parser: OAA": 97.0 for role in ("guiding", "scoring")},
    **{f"{role} parser: RFA": 92.0 for role in ("guiding", "scoring")},
    **{f"{role} parser: F1": 90.0 for role in ("guiding", "scoring")},
    "parsers: shared errors (at most)": 50.0,
    "captions: top-1 of 384 by a reader who knows every fact": 50.0,
    **{f"{role} CLIP: top-1 of 384 captions": 50.0 for role in ("guiding", "scoring")},
    "attribute evaluator: lowest balanced accuracy": 95.0,
    "base: hats drawn": 90.0,
    "base: eyeglasses drawn": 90.0,
    "base: earrings drawn": 80.0,
    "base: necklaces drawn": 60.0,
    "base: hair colour": 95.0,
    "base: both eyes": 97.0,
    "base: OAA with the albedo as condition": 90.0,
    "base: OAA with regions in random colours as condition": 75.0,
}
"""Gate -> the value that it needs, in percent."""


def measure_gates(
    config: Config, faces: int = 768, prompts: int = 200, device: torch.device | str = "cpu"
) -> DataFrame:
    """All gates of the bundle of a profile.

    Args:
        config: names the bundle's networks.
        faces: held-out faces for autoencoder, parsers and attribute evaluator.
        prompts: captions for the base.
        device: where the networks run.

    Returns:
        Rows gate, value, wanted, holds in the order of WANTED.
    """
    import pandas as pd

    source = Portraits(device)
    parsers = {
        "guiding": FaceParser.from_config(config.perception, False, device),
        "scoring": FaceParser.from_config(config.perception, True, device),
    }
    net = load_facts(resolve(config.perception.scoring_facts), device)
    shown = [source.faces(SEED, i, CHUNK, (("first", "natural", 1.0),)) for i in _starts(faces)]
    values = _perception(shown, parsers, net)
    values |= _retrieval(source, config, device)
    base = resolve(config.backbone.path)
    work = work_folder(base.parent)
    if not base.is_dir() and (work / "base").is_dir():
        base = work / "base"
        sampling = {"guidance": 1.0, "text_guidance": config.sampling.guidance}
        config = config.replace(backbone={"path": str(base)}, sampling=sampling)
    if base.is_dir():
        pipeline = EC2FacePipeline.from_config(config, None).to(device)
        pipeline.set_progress_bar_config(disable=True)
        values |= _round_trip(shown, parsers["scoring"], pipeline.vae)
        values |= _base(source, pipeline, parsers["scoring"], net, prompts)
        values |= _conditions(source, pipeline, parsers["scoring"])
    elif (work / "vae.json").is_file():
        vae = with_trained_vae(source, work).vae.to(device)
        values |= _round_trip(shown, parsers["scoring"], vae)
    rows = []
    for gate, wanted in WANTED.items():
        value = round(values.get(gate, float("nan")), 2)
        holds = value <= wanted if "at most" in gate else value >= wanted
        rows.append({"gate": gate, "value": value, "wanted": wanted, "holds": holds})
    return pd.DataFrame(rows)


def _starts(count: int) -> range:
    return range(0, count, CHUNK)


def _perception(
    shown: list[FaceBatch], parsers: dict[str, FaceParser], net: FactNet
) -> dict[str, float]:
    truth = torch.cat([faces.label_map.cpu() for faces in shown])
    values = {}
    wrong = {}
    for role, parser in parsers.items():
        parsed = _parse(parser, [faces.image for faces in shown])
        accuracy = mask_accuracy(parsed, truth)
        for name in ("OAA", "RFA", "F1"):
            values[f"{role} parser: {name}"] = getattr(accuracy, name)
        wrong[role] = parsed != truth
    both = (wrong["guiding"] & wrong["scoring"]).sum()
    values["parsers: shared errors (at most)"] = 100 * float(both / wrong["scoring"].sum())
    rows = [row for faces in shown for row in faces.attributes]
    holds = torch.cat([net.holds(faces.image).cpu() for faces in shown])
    accuracies = balanced_accuracy(holds, fact_targets(rows, facts(rows)))
    lowest = accuracies[accuracies.isfinite()].min()
    values["attribute evaluator: lowest balanced accuracy"] = float(lowest)
    return values


def _parse(parser: FaceParser, images: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([parser.parse(part).cpu() for part in images])


def _round_trip(shown: list[FaceBatch], parser: FaceParser, vae: AutoencoderKL) -> dict[str, float]:
    truth = torch.cat([faces.label_map.cpu() for faces in shown])
    copies = []
    with torch.no_grad():
        for faces in shown:
            z = encode_images(vae, faces.image)
            copies.append(decode_latents(vae, z).clamp(-1, 1))
    real: MaskAccuracy = mask_accuracy(_parse(parser, [f.image for f in shown]), truth)
    copied = mask_accuracy(_parse(parser, copies), truth)
    return {
        f"autoencoder: {name}, % of the real images'": 100
        * getattr(copied, name)
        / getattr(real, name)
        for name in ("OAA", "RFA", "F1", "F1_RFA")
    }


def _retrieval(source: Portraits, config: Config, device: torch.device | str) -> dict[str, float]:
    parts = [source.faces(SEED + 1, i, CHUNK, (("first", "natural", 1.0),)) for i in _starts(384)]
    texts = [caption for faces in parts for caption in faces.captions]
    rows = [row for faces in parts for row in faces.attributes]
    statements = facts(rows)
    known = (mentioned_facts(texts, fact_names(statements)), fact_targets(rows, statements))
    values = {}
    for role, scoring in (("guiding", False), ("scoring", True)):
        clip = ClipScorer.from_config(config.perception, scoring, device)
        with torch.no_grad():
            image = torch.cat([clip.image_features(faces.image) for faces in parts])
        found = retrieval(image.cpu(), clip.text_features(texts).cpu(), texts, *known)
        values[f"{role} CLIP: top-1 of 384 captions"] = found["top1"]
    values["captions: top-1 of 384 by a reader who knows every fact"] = found["top1_ceiling"]
    return values


def base_prompts(source: Portraits, count: int) -> list[str]:
    """Captions of faces whose accessories are frequent, one of each face."""
    rows = source.sample(SEED + 2, range(count), "first", "balanced").attributes
    return [captions(row, 1, i, STYLE["first"])[0] for i, row in enumerate(rows)]


def _base(
    source: Portraits, pipeline: EC2FacePipeline, parser: FaceParser, net: FactNet, prompts: int
) -> dict[str, float]:
    """What the base draws of what 200 captions without a mask ask for."""
    texts = base_prompts(source, prompts)
    pictures = []
    for i in _starts(len(texts)):
        part = texts[i : i + CHUNK]
        generators = [torch.Generator().manual_seed(i + k) for k in range(len(part))]
        images = pipeline(part, generator=generators, output_type="pt").images
        pictures.append((images * 2 - 1).to(parser.device))
    counts = pixel_counts(_parse(parser, pictures))
    mentioned = [set(caption_facts(text)) for text in texts]

    def drawn(name: str, *fact: str) -> float:
        rows = [i for i, names in enumerate(mentioned) if names & set(fact)]
        return 100 * float((counts[rows, CLASS_ID[name]] >= DRAWN).float().mean())

    colours = [name for name in net.names if name.startswith("hair_colour=")]
    with torch.no_grad():
        logits = torch.cat([net(part).cpu() for part in pictures])
    best = logits[:, [net.names.index(name) for name in colours]].argmax(1).tolist()
    asked = [(i, name) for i, names in enumerate(mentioned) for name in names & set(colours)]
    right = [colours[best[i]] == name for i, name in asked]
    bare = [i for i, names in enumerate(mentioned) if "eyeglasses" not in names]
    eyes = counts[bare][:, [CLASS_ID["l_eye"], CLASS_ID["r_eye"]]].min(1).values >= DRAWN // 2
    return {
        "base: hats drawn": drawn("hat", "hat"),
        "base: eyeglasses drawn": drawn("eye_g", "eyeglasses"),
        "base: earrings drawn": drawn("ear_r", "earrings"),
        "base: necklaces drawn": drawn("neck_l", "necklace"),
        "base: hair colour": 100 * sum(right) / len(right),
        "base: both eyes": 100 * float(eyes.float().mean()),
    }


@torch.no_grad()
def _conditions(
    source: Portraits, pipeline: EC2FacePipeline, parser: FaceParser
) -> dict[str, float]:
    """How much of the faces the base draws when a dense condition shows them.

    The albedo is almost the picture: what is lost here no LoRA gets back. Regions in random colours
    are a mask without a meaning of its colours. Neither has any guidance.
    """
    shown, described = source.scenes(SEED + 3, 0, CONDITIONED)
    texts = [caption_of(description, i) for i, description in enumerate(described)]
    generator = torch.Generator(source.device).manual_seed(SEED)
    values = {}
    for kind, name in (("albedo", "the albedo"), ("regions", "regions in random colours")):
        condition = dense_condition(kind, shown, generator)
        drawn = []
        for i in _starts(CONDITIONED):
            rows = slice(i, i + CHUNK)
            tokens, pooled, _ = pipeline.encode_prompt(texts[rows])
            z_c = encode_images(pipeline.vae, condition[rows])
            velocity = functools.partial(
                predict_velocity, pipeline.transformer, text=TextEmbedding(tokens, pooled),
                mask_latents=z_c,
            )  # fmt: skip
            noise = torch.randn(z_c.shape, generator=generator, device=source.device)
            z = follow_path(velocity, noise, torch.zeros(len(z_c), device=source.device), STEPS)
            drawn.append(decode_latents(pipeline.vae, z).clamp(-1, 1))
        accuracy = mask_accuracy(_parse(parser, drawn), shown.label_map.cpu())
        values[f"base: OAA with {name} as condition"] = accuracy.OAA
    return values
