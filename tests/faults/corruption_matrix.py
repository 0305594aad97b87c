"""Damage one file at a time and open it: noticed by name, repaired, equal, or silently other.

    python tests/faults/corruption_matrix.py --work DIR [--mutations 200] [--out FILE.json]

A mutation is a flipped bit, another digit, a hole of zeros, a cut, garbage at the end, or nothing
left. Data (faces, masks, captions, manifest) may change on purpose: there the key of caches and
pictures has to change, or the reader refuses the file. Exit code 1: a silent other result, or an
error that does not name the file. About five minutes on two free cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from world import make_world

from ec2face_core.backbone import load_backbone
from ec2face_core.config import Config, UserError, load_config
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.io.lora_file import LORA_FILE, load_mask_lora
from ec2face_core.latents import cache_folder, encode_dataset
from ec2face_core.perception import ClipScorer, FaceParser
from ec2face_core.runs import read_metrics
from ec2face_core.trainer import Trainer
from ec2face_core.training.checkpoints import newest_checkpoint
from ec2face_lab.baselines import SYSTEMS, load
from ec2face_lab.cache import claim, is_whole, read_note
from ec2face_lab.study.pictures import PictureSet
from ec2face_lab.study.png import read_picture

OUTCOMES = ("refused", "repaired", "equal", "other key", "nameless", "SILENT")


@dataclass(frozen=True)
class Target:
    """Something that is opened.

    name: in the summary. file: the one that is damaged. result: opens it and returns a digest of
    what comes out. data: whether an edit may be on purpose.
    """

    name: str
    file: Path
    result: Callable[[], str]
    data: bool = False


# ---------------------------------------------------------------------------------------- mutations


def mutate(content: bytes, kind: str, draw: random.Random) -> bytes:
    """A damaged copy."""
    changed = bytearray(content)
    n = len(content)
    if kind in ("bit", "header bit") and n:
        place = draw.randrange(min(n, 200) if kind == "header bit" else n)
        changed[place] ^= 1 << draw.randrange(8)
    elif kind == "high bits" and n:
        for _ in range(8):
            changed[draw.randrange(n)] ^= 0x80
    elif kind == "digit":
        digits = [i for i, value in enumerate(content) if 48 <= value <= 57]
        if digits:
            place = draw.choice(digits)
            changed[place] = draw.choice([c for c in b"0123456789" if c != content[place]])
    elif kind == "cut":
        changed = changed[: draw.randrange(n)] if n else changed
    elif kind == "empty":
        changed = bytearray()
    elif kind == "zeros" and n:
        start = draw.randrange(max(1, n - 4096))
        end = min(n, start + 4096)
        changed[start:end] = bytes(end - start)
    elif kind == "garbage":
        changed += bytes(draw.randrange(256) for _ in range(64))
    return bytes(changed)


KINDS = ("bit", "header bit", "high bits", "digit", "cut", "empty", "zeros", "garbage")

# ------------------------------------------------------------------------------------------ targets


def digest(*parts: Any) -> str:
    """SHA-256 of tensors and of the text of everything else."""
    total = hashlib.sha256()
    for part in parts:
        values = part.values() if isinstance(part, dict) else [part]
        for value in values:
            tensor = isinstance(value, torch.Tensor)
            content = value.detach().cpu().contiguous().view(-1) if tensor else value
            total.update(content.numpy().tobytes() if tensor else repr(content).encode())
    return total.hexdigest()


def weights_of(config: Config, part: str) -> str:
    """A part of the backbone."""
    module = next(iter(load_backbone(config.backbone, (part,)).modules()))
    return digest({k: v.float() for k, v in module.state_dict().items()})


def captions_of(config: Config) -> str:
    """Tokens of both tokenizers."""
    backbone = load_backbone(config.backbone, ("text",))
    texts = ["She has a hat.", "He smiles."]
    pair = (backbone.tokenizer, backbone.tokenizer_2)
    return digest(*(tokenizer(texts).input_ids for tokenizer in pair))


def lora_of(config: Config) -> str:
    """The LoRA in the transformer."""
    transformer = load_backbone(config.backbone, ("transformer",)).transformer
    load_mask_lora(transformer, Path(config.adapters) / "both")
    return digest({k: v for k, v in transformer.state_dict().items() if "lora_" in k})


def latents_of(config: Config) -> str:
    """Everything in the latent cache, as a training opens it."""
    dataset = open_dataset(config, "train")
    cache = encode_dataset(
        dataset, lambda: load_backbone(config.backbone, ("vae", "text")), config,
        cache_folder(config), progress=False,
    )  # fmt: skip
    batch = cache.batch(cache.ids, [0] * len(cache.ids))
    text = batch["text"]
    parts = [batch[name] for name in ("z", "z_mask", "label_map", "captions")]
    return digest(*parts, text.tokens, text.pooled, cache.label_counts())


def checkpoint_of(folder: Path) -> str:
    """The training state that a resume begins with."""
    found = newest_checkpoint(folder, ("samples", "identity"))
    return digest(*found) if found else "none"


def targets(config: Config) -> list[Target]:
    """Everything that a run of the smoke profile opens."""
    flux = Path(config.backbone.path)
    p = config.perception
    run = config.run_dir / "training" / "both"
    pictures = PictureSet(config, "both", "test", limit=2)
    folder = pictures.generate(progress=False)
    scores = pictures.scores(progress=False)
    del scores
    csv = next((config.run_dir / "scores").glob("*.csv"))
    root = Path(config.data.root)
    latents = cache_folder(config)
    images = next(latents.rglob("images-*.safetensors"))
    texts = next(latents.rglob("text-*.safetensors"))
    clip = Path(p.clip.removeprefix("local-dir:"))
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    note = read_note(folder / "about.json")
    sample = folder / f"{pictures.ids[0]}.png"
    name = FaceDataset(root, "train", config.data.size).ids[0]
    list_of = [
        Target(
            "vae", next((flux / "vae").glob("*.safetensors")), lambda: weights_of(config, "vae")
        ),
        Target("vae config", flux / "vae" / "config.json", lambda: weights_of(config, "vae")),
        Target(
            "transformer", next((flux / "transformer").glob("*.safetensors")),
            lambda: weights_of(config, "transformer"),
        ),
        Target(
            "text encoder", flux / "text_encoder_2" / "model.safetensors",
            lambda: weights_of(config, "text"),
        ),
        Target("tokenizer", flux / "tokenizer" / "tokenizer.json", lambda: captions_of(config)),
        Target("LoRA", Path(config.adapters) / "both" / LORA_FILE, lambda: lora_of(config)),
        Target("parser", Path(p.parser), lambda: digest(_parsed(config))),
        Target(
            "CLIP", clip / "open_clip_model.safetensors", lambda: digest(_clip(config).state_dict())
        ),
        Target("CLIP tokenizer", clip / "tokenizer.json", lambda: digest(_tokens(config))),
        Target("latents", images, lambda: latents_of(config)),
        Target("embeddings", texts, lambda: latents_of(config)),
        Target("checkpoint tensors", checkpoint / "state.safetensors",
               lambda: checkpoint_of(run / "checkpoints")),
        Target("checkpoint JSON", checkpoint / "state.json",
               lambda: checkpoint_of(run / "checkpoints")),
        Target("scores", csv, lambda: csv.read_text() if is_whole(csv) else "made again"),
        Target("picture", sample, lambda: digest(read_picture(sample))),
        Target("about.json", folder / "about.json", lambda: str(claim(folder, note))),
        Target("config.yaml", run / "config.yaml",
               lambda: load_config(run / "config.yaml").digest(), data=True),
        Target("metrics log", run / "metrics.jsonl",
               lambda: digest([row["step"] for row in read_metrics(run)]), data=True),
        *(
            Target(f"face {kind}", root / kind / f"{name}{suffix}", lambda: _faces(config),
                   data=True)
            for kind, suffix in (("image", ".png"), ("mask", ".png"), ("text", ".txt"))
        ),
        Target("manifest", root / "manifest.csv", lambda: _faces(config), data=True),
    ]  # fmt: skip
    bundle = Path(config.adapters).parent / "baselines"
    for system in ("UaC", "ControlNeXt"):
        file = bundle / SYSTEMS[system].partition(".")[0] / "weights.safetensors"
        list_of.append(Target(system, file, lambda s=system: _system(config, s)))
    return list_of


def _parsed(config: Config) -> dict[str, torch.Tensor]:
    return FaceParser(config.perception.parser, config.perception.parser_size).net.state_dict()


def _clip(config: Config) -> Any:
    return ClipScorer(config.perception.clip).model


def _tokens(config: Config) -> torch.Tensor:
    return ClipScorer(config.perception.clip).tokenizer(["She has a hat.", "He smiles."])


def _system(config: Config, name: str) -> str:
    return digest(load(config, name).networks.state_dict())


def _faces(config: Config) -> str:
    dataset = FaceDataset(config.data.root, "train", config.data.size)
    for k in range(len(dataset)):
        dataset[k]
    return dataset.digest("image", "mask", "text", "manifest")


# --------------------------------------------------------------------------------------------- runs


def outcome(target: Target, expected: str) -> tuple[str, str]:
    """What opening a damaged file comes to, and the message."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = target.result()
        except (UserError, OSError, ValueError) as error:
            named = target.file.name in str(error) or target.file.parent.name in str(error)
            return ("refused" if named else "nameless"), str(error)[:200]
        except Exception as error:
            return "nameless", "".join(traceback.format_exception_only(error))[:200]
    told = [str(w.message) for w in caught if "damaged" in str(w.message)]
    if told:
        return "repaired", told[0][:200]
    if result == expected:
        return "equal", ""
    return ("other key" if target.data else "SILENT"), ""


def main() -> int:
    """Run all mutations and print their summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of everything")
    parser.add_argument("--mutations", type=int, default=200)
    parser.add_argument("--only", nargs="+", default=[], help="names of targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the mutations are written as JSON")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    config = make_world(work, steps=4)
    Trainer(config, "both", config.run_dir / "training" / "both").fit()
    everything = targets(config)
    if options.only:
        everything = [target for target in everything if target.name in options.only]
    draw = random.Random(options.seed)
    expected = {target.name: target.result() for target in everything}
    rows = []
    for number in range(options.mutations):
        target = everything[number % len(everything)]
        kind = KINDS[(number // len(everything) + number) % len(KINDS)]
        whole = target.file.read_bytes()
        damaged = mutate(whole, kind, draw)
        if damaged == whole:
            rows.append({"target": target.name, "kind": kind, "outcome": "equal", "message": ""})
            continue
        target.file.write_bytes(damaged)
        try:
            result, message = outcome(target, expected[target.name])
        finally:
            target.file.write_bytes(whole)
        rows.append({"target": target.name, "kind": kind, "outcome": result, "message": message})
        if result in ("SILENT", "nameless"):
            print(f"{result}: {target.name}, {kind}: {message}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{'':20}" + "".join(f"{name:>11}" for name in OUTCOMES))
    for target in everything:
        count = Counter(row["outcome"] for row in rows if row["target"] == target.name)
        print(f"{target.name:20}" + "".join(f"{count[name] or '':>11}" for name in OUTCOMES))
    total = Counter(row["outcome"] for row in rows)
    print(f"{len(rows):<20}" + "".join(f"{total[name]:>11}" for name in OUTCOMES))
    return 1 if total["SILENT"] or total["nameless"] else 0


if __name__ == "__main__":
    sys.exit(main())
