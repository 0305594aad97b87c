"""Folders of pictures: a split sampled with one adapter, its references, and grids of seeds.

Chosen here:
- A picture's noise is a function of (sampling.seed, id) alone: it depends neither on the batch nor
  on the order, and a run that was stopped is completed by the same call.
- A folder is named by a digest of all that shapes its pictures (weights, sampling settings,
  captions and masks, this code), so what lies there is never stale.
- Every sampled PNG says in its text chunks that it is synthetic, by which model, and from which
  prompt (as a hash) and seed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ec2face_core.config import VARIANTS, BackboneConfig, Config, ConfigError, adapter_dir, resolve
from ec2face_core.data import FaceDataset, open_dataset, read_image
from ec2face_core.mask_branch import ADAPTER, LORA_FILE
from ec2face_core.perception import LOCAL_DIR
from ec2face_core.runs import parallel, path_digest

from ..baselines import PAPER, SYSTEMS, WEIGHTS, load, systems, trained, weights_dir
from ..baselines.storage import shared_file
from ..cache import claim, code_digest, data_digest

BASE, REAL, ROUND_TRIP = "base", "real", "vae_round_trip"

SOURCES = (*VARIANTS, BASE, REAL, ROUND_TRIP)  # whose pictures a folder can hold

SHAPING = (
    "ec2face_core.attributes",
    "ec2face_core.backbone",
    "ec2face_core.fast.decoupled",
    "ec2face_core.mask_branch",
    "ec2face_core.pipeline",
    "ec2face_lab.study.pictures",
)  # modules that draw

NOTICE = "Synthetic face: not a photograph of a person."


# --------------------------------------------------------------------------- a split's pictures


def generate_split(
    config: Config,
    variant: str,
    split: str,
    out_dir: Path | str | None = None,
    limit: int = 0,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Path:
    """The pictures `{id}.png` of a split, each from its face's mask and manifest caption.

    Args:
        variant: one of `VARIANTS`; `base` (no adapter, text only); or a reference: `real` (the
            faces themselves), `vae_round_trip` (through the autoencoder and back).
        split: test, zero_shot or train.
        out_dir: default `runs/<profile>/images/<split>-<variant>-<digest>`.
        limit: the first faces only; 0 takes `evaluation.limit`, and 0 there means all.
        shard: (rank, number of processes): this process makes every n-th picture.

    Returns:
        The folder. Pictures that are there already are not made again.

    Raises:
        ConfigError: an unknown variant, or a folder with pictures of other weights or settings.
    """
    if variant not in SOURCES:
        raise ConfigError(f"variant {variant!r} does not exist; known: {', '.join(SOURCES)}")
    dataset = open_dataset(config, split)
    key = picture_key(config, variant, dataset)
    folder = resolve(out_dir) if out_dir else split_folder(config, variant, split, key)
    claim(folder, {"key": key, "variant": variant, "split": split, "profile": config.profile})
    rank, world = shard
    own = evaluated_ids(config, dataset, limit)[rank::world]
    if missing := absent(folder, own):
        draw, describe = _painter(config, variant, dataset)
        what = f"{variant}, {split}"
        for names in batches(missing, config.sampling.batch_size, what, progress and rank == 0):
            for name, image in zip(names, draw(names), strict=True):
                save_picture(folder / f"{name}.png", image, describe(name))
    return folder


def missing_pictures(config: Config, variant: str, split: str) -> list[str]:
    """Ids of a split whose pictures `generate_split` would have to make."""
    dataset = open_dataset(config, split)
    folder = split_folder(config, variant, split, picture_key(config, variant, dataset))
    return absent(folder, evaluated_ids(config, dataset))


def absent(folder: Path, names: Sequence[str]) -> list[str]:
    """The names of which the folder has no picture `{name}.png`."""
    return [name for name in names if not (folder / f"{name}.png").is_file()]


def split_folder(config: Config, variant: str, split: str, key: str) -> Path:
    """Where the pictures of a split by a variant or a system lie."""
    return config.run_dir / "images" / f"{split}-{variant}-{key}"


def evaluated_ids(config: Config, dataset: FaceDataset, limit: int = 0) -> list[str]:
    """The ids that count: the first `limit`, else `evaluation.limit`, else all of the dataset."""
    return dataset.ids[: limit or config.evaluation.limit or None]


def picture_seed(config: Config, name: str) -> int:
    """Seed of one picture's noise, from (sampling.seed, name) alone."""
    digest = hashlib.sha256(f"{config.sampling.seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_grid(
    config: Config,
    variant: str,
    name: str,
    prompts: Sequence[str],
    masks: Sequence[Tensor] | Tensor | None = None,
    seeds: int = 6,
    progress: bool = True,
) -> Tensor:
    """Several seeds of each condition, kept as PNG in `runs/<profile>/images/<name>-<digest>`.

    Args:
        name: what the grid is for; part of the pictures' seeds.
        prompts: one text a row; "" for none.
        masks: one label map `h w` a row; None: text alone.

    Returns:
        Images `rows seeds 3 h w` in [-1, 1].
    """
    conditions = hashlib.sha256(json.dumps(list(prompts)).encode())
    conditions.update(b"" if masks is None else np.stack([np.asarray(m) for m in masks]).tobytes())
    key = picture_key(config, variant, None, conditions.hexdigest())
    folder = config.run_dir / "images" / f"{name}-{key}"
    claim(folder, {"key": key, "variant": variant, "grid": name, "profile": config.profile})
    cells = [(row, k) for row in range(len(prompts)) for k in range(seeds)]
    files = {cell: folder / f"{cell[0]:02d}_{cell[1]:02d}.png" for cell in cells}
    missing = [cell for cell in cells if not files[cell].is_file()]
    for some in batches(missing, config.sampling.batch_size, name, progress):
        numbers = [picture_seed(config, f"{name}/{row}/{k}") for row, k in some]
        texts = [prompts[row] for row, _ in some]
        maps = None if masks is None else [masks[row] for row, _ in some]
        images = _sample(config, variant, texts, maps, numbers)
        for cell, image, text, number in zip(some, images, texts, numbers, strict=True):
            save_picture(files[cell], image, _notice(config, variant, text, number))
    images = torch.stack([read_picture(files[cell]) for cell in cells])
    return images.unflatten(0, (len(prompts), seeds))


# ---------------------------------------------------------------------------------- what is drawn


def _painter(
    config: Config, variant: str, dataset: FaceDataset
) -> tuple[Callable[[list[str]], Tensor], Callable[[str], dict[str, str]]]:
    """(ids -> images `b 3 h w` in [0, 1], id -> PNG text chunks) of a source of pictures."""
    if variant == REAL:

        def draw(names: list[str]) -> Tensor:
            return torch.stack([dataset.image(name) for name in names]) / 2 + 0.5

        return draw, lambda name: {"Source": f"Face {name} of {dataset.root.name}."}

    if variant == ROUND_TRIP:
        from ec2face_core.backbone import decode_latents, encode_images, load_backbone

        vae = load_backbone(config.backbone, ("vae",)).vae.to(_device())

        @torch.no_grad()
        def draw(names: list[str]) -> Tensor:
            images = torch.stack([dataset.image(name) for name in names]).to(_device())
            return decode_latents(vae, encode_images(vae, images)) / 2 + 0.5

        chunk = f"Autoencoder round trip of a face of {dataset.root.name}, {config.backbone.path}."
        return draw, lambda name: {"Source": chunk}

    def draw(names: list[str]) -> Tensor:
        texts = [dataset.manifest_caption(name) for name in names]
        masks = None if variant == BASE else [dataset.label_map(name) for name in names]
        return _sample(config, variant, texts, masks, [picture_seed(config, n) for n in names])

    def describe(name: str) -> dict[str, str]:
        seed = picture_seed(config, name)
        return _notice(config, variant, dataset.manifest_caption(name), seed)

    return draw, describe


def _sample(
    config: Config,
    variant: str,
    prompts: list[str],
    masks: Sequence[Tensor] | None,
    seeds: list[int],
) -> Tensor:
    """Images `b 3 h w` in [0, 1]; each has its own stream of noise, drawn on the CPU."""
    if variant == BASE and masks is not None:
        raise ConfigError("the base model has no mask branch: give no masks, or a variant")
    pipe = _pipeline(config.backbone, config.data.size)
    if variant == BASE:
        if getattr(pipe, "loaded", None):
            pipe.transformer.delete_adapters(ADAPTER)
            pipe.loaded = None
    else:
        folder = adapter_dir(config, variant)
        if getattr(pipe, "loaded", None) != (loaded := (str(folder), _adapter(config, variant))):
            pipe.load_mask_lora(folder)
            pipe.loaded = loaded
    precision = config.sampling.mixed_precision
    if precision not in ("no", "bf16"):
        raise ConfigError(f"sampling.mixed_precision {precision!r}: use no or bf16")
    with torch.autocast(_device().type, torch.bfloat16, enabled=precision == "bf16"):
        images = pipe(
            prompts,
            masks,
            num_inference_steps=config.sampling.steps,
            guidance_scale=config.sampling.guidance,
            text_guidance=config.sampling.text_guidance,
            mask_guidance=config.sampling.mask_guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
    return images.float()


@functools.lru_cache(maxsize=1)
def _pipeline(backbone: BackboneConfig, size: int) -> Any:
    """The backbone is loaded once; the variants only change its LoRA."""
    from ec2face_core.backbone import load_backbone
    from ec2face_core.pipeline import EC2FacePipeline

    parts = load_backbone(backbone).components()
    pipe = EC2FacePipeline(**parts, text_length=backbone.text_length, image_size=size)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(_device())


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


# -------------------------------------------------------------------------------- files and names


def save_picture(path: Path, image: Tensor, chunks: dict[str, str]) -> None:
    """Write an image `3 h w` in [0, 1] as PNG with text chunks, in one move."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in chunks.items():
        info.add_itxt(name, text)
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    part = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(pixels.movedim(0, -1).numpy()).save(part, "PNG", pnginfo=info)
    part.replace(path)


def read_picture(path: Path) -> Tensor:
    """An image `3 h w` in [-1, 1]."""
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1) / 127.5 - 1


def load_pictures(folder: Path, names: Sequence[str]) -> Tensor:
    """The pictures `{name}.png` of a folder, `b 3 h w` in [-1, 1]."""
    return torch.stack(list(parallel(read_picture, [folder / f"{n}.png" for n in names])))


def picture_key(
    config: Config, variant: str, dataset: FaceDataset | None, conditions: str = ""
) -> str:
    """Twelve hex digits of all that shapes the pictures of a variant."""
    about = [variant, conditions, data_digest(dataset) if dataset else "", config.data.size]
    if variant != REAL:
        about += [_backbone(config.backbone), code_digest(SHAPING)]
    if variant not in (REAL, ROUND_TRIP):
        s, b = config.sampling, config.backbone
        about += [s.steps, s.guidance, s.text_guidance, s.mask_guidance, s.seed]
        about += [s.mixed_precision]
        about += [b.dtype, b.text_length, _adapter(config, variant)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _backbone(config: BackboneConfig) -> list[str]:
    folder = resolve(config.path)
    parts = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return [config.path, *(path_digest(part) for part in parts)]


def _adapter(config: Config, variant: str) -> str:
    return "" if variant == BASE else path_digest(adapter_dir(config, variant) / LORA_FILE)


def _notice(config: Config, variant: str, prompt: str, seed: int) -> dict[str, str]:
    adapter = f", mask LoRA {variant} {_adapter(config, variant)}" if variant != BASE else ""
    return {
        "Disclaimer": NOTICE,
        "Model": f"EC2Face on {config.backbone.path}{adapter}",
        "Prompt-SHA256": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "Seed": str(seed),
    }


def batches(items: Sequence[Any], size: int, what: str, show: bool) -> Any:
    """Batches with a bar, and none where there is nothing to do."""
    from tqdm.auto import tqdm

    parts = [items[i : i + size] for i in range(0, len(items), size)]
    hidden = not (show and parts)
    return tqdm(parts, desc=what, unit="batch", mininterval=1, disable=hidden)


# modules that several systems stand on, and those of the package
BLOCKS = ("flux", "reading", "storage", "style", "system", "unets")

SYSTEM_SHAPING = (
    "ec2face_core.attributes",
    "ec2face_core.backbone",
    "ec2face_core.fast.decoupled",
    "ec2face_core.mask_branch",
    "ec2face_core.perception",
    "ec2face_core.pipeline",
)


def draw_split(
    config: Config,
    name: str,
    split: str,
    out_dir: Path | str | None = None,
    limit: int = 0,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Path:
    """The pictures `{id}.png` of a split by a comparison system; arguments of `generate_split`.

    Args:
        name: a row of Tables 1 and 2, one of `SYSTEMS`.

    Raises:
        ConfigError: an unknown system, or a folder with pictures of other weights or settings.
        FileNotFoundError: there are no weights; the message names the remedy.
    """
    dataset = open_dataset(config, split)
    key = system_key(config, name, dataset)
    about = {"key": key, "variant": name, "split": split, "profile": config.profile}
    folder = resolve(out_dir) if out_dir else split_folder(config, name, split, key)
    rank, world = shard
    own = evaluated_ids(config, dataset, limit)[rank::world]
    missing = absent(folder, own)
    system = load(config, name) if missing else None  # no folder where there are no weights
    claim(folder, about)
    model = f"{name} in miniature, weights {path_digest(weights_dir(config, name) / WEIGHTS)}"
    show = progress and rank == 0
    for ids in batches(missing, config.sampling.batch_size, f"{name}, {split}", show):
        texts = [dataset.manifest_caption(i) for i in ids]
        masks = torch.stack([dataset.label_map(i) for i in ids])
        seeds = [picture_seed(config, i) for i in ids]
        images = system.generate(texts, masks, [torch.Generator().manual_seed(s) for s in seeds])
        for i, image, text, seed in zip(ids, images, texts, seeds, strict=True):
            prompt = hashlib.sha256(text.encode()).hexdigest()[:16]
            chunks = {"Disclaimer": NOTICE, "Model": model, "Prompt-SHA256": prompt}
            save_picture(folder / f"{i}.png", image, chunks | {"Seed": str(seed)})
    return folder


def weight_files(config: Config, name: str) -> list[Path]:
    """What `load` reads: a system's own weights, and those that it shares, if it does."""
    folder = weights_dir(config, name)
    stages = systems()[name].shares[:1]
    return [folder / WEIGHTS, *(shared_file(folder, stage) for stage in stages)]


def available(config: Config, split: str) -> list[str]:
    """The rows of which there are weights, or scored pictures of this split, in their order.

    On zero-shot faces weights of the newer systems do not count: drawing takes them too long.
    """
    have = [n for n in trained(config) if n in PAPER or split != "zero_shot"]
    return [n for n in SYSTEMS if n in have or official_pictures(config, n, split).is_dir()]


def official_pictures(config: Config, name: str, split: str) -> Path:
    """Where `evaluate --adapter` leaves a link to the pictures that the official code wrote."""
    return config.run_dir / "images" / f"{split}-{name}-official"


def missing_system_pictures(config: Config, name: str, split: str) -> list[str]:
    """Ids of a split whose pictures `draw_split` would have to make."""
    dataset = open_dataset(config, split)
    folder = split_folder(config, name, split, system_key(config, name, dataset))
    return absent(folder, evaluated_ids(config, dataset))


def system_key(config: Config, name: str, dataset: FaceDataset) -> str:
    """Twelve hex digits of all that shapes the pictures of a system."""
    s = config.sampling
    about = [name, data_digest(dataset), config.data.size, s.steps, s.seed]
    about += [s.guidance, s.text_guidance, s.mask_guidance, s.mixed_precision]
    about += [path_digest(path) for path in weight_files(config, name) if path.is_file()]
    about += [path_digest(resolve(config.backbone.path) / part) for part in systems()[name].parts]
    about += [path_digest(resolve(config.perception.clip.removeprefix(LOCAL_DIR)))]
    module = SYSTEMS[name].partition(".")[0]
    blocks = [f"ec2face_lab.baselines.{part}" for part in (*BLOCKS, module)]
    about += [code_digest(blocks), code_digest(SYSTEM_SHAPING)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
