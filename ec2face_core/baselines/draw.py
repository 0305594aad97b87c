"""A split drawn by a comparison system: a folder of `{id}.png`, as `generate.py` makes them.

Each picture is drawn from its face's mask and manifest caption, with the noise that (sampling.seed,
id) decides; a folder is named by a digest of all that shapes its pictures, and a run that was
stopped is completed by the same call.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from ..config import Config, resolve
from ..datasets import FaceDataset, open_dataset
from ..generate import (
    NOTICE,
    absent,
    batches,
    claim,
    code_digest,
    data_digest,
    evaluated_ids,
    picture_seed,
    save_picture,
    split_folder,
)
from ..perception import LOCAL_DIR
from ..results import path_digest
from . import PAPER, SYSTEMS, WEIGHTS, load, systems, trained, weights_dir
from .storage import shared_file

# modules that several systems stand on, and those of the package
BLOCKS = ("flux", "reading", "storage", "style", "system", "unets")
SHAPING = ("attributes", "backbone", "conditioning", "decoupled", "lora", "perception", "pipeline")


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
    here, module = Path(__file__).parent, SYSTEMS[name].partition(".")[0]
    about += [path_digest(here / f"{part}.py") for part in (*BLOCKS, module)]
    about += [code_digest(SHAPING)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
