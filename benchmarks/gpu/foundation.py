"""The chain of a foundation in one process: autoencoder, pool, transformer, distillation.

    OUT=DIR python benchmarks/gpu/foundation.py VAE FLUX DISTILL POOL

The first three are seconds, POOL is a number of faces whose captions `pretrain captions` writes
meanwhile. START is a FLUX folder whose autoencoder is trained further, or taken as it is where VAE
is 0; with FURTHER=1 its transformer is trained further, too. What a stage made is packed into OUT
as soon as it is there.
"""

from __future__ import annotations

import os
import sys
import tarfile
import time
from pathlib import Path

import torch

from ec2face_core.io.paths import resolve
from ec2face_lab.world import kept, pool, pretrain, pretrain_flux, training
from ec2face_lab.world.sources import Portraits

VAE_BATCH = 64
BATCH = int(os.environ.get("BATCH", "128"))  # of the transformer and of its distillation
PART = 15_000_000  # bytes of a packed file


def main() -> None:
    """Run every stage; a stage that was finished before is not repeated."""
    vae, flux, distill = (float(x) for x in sys.argv[1:4])
    faces = int(sys.argv[4])
    rate = float(os.environ.get("RATE", "1.2e-3"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bundle = resolve("data/mini128")
    work = pretrain.work_folder(bundle)
    work.mkdir(parents=True, exist_ok=True)
    source = Portraits(device)

    training.CHECKPOINT_SECONDS = float(os.environ.get("CHECKPOINT_SECONDS", "240"))
    began = time.monotonic()
    start = resolve(os.environ["START"]) if "START" in os.environ else None
    if not (work / "vae.json").exists():
        guide = bundle / "parser_guiding.pt"
        peak = 1e-3 if start else 2e-3
        if start and not vae:
            kept.restore_autoencoder(start, work)
        else:
            pretrain.train_vae(source, work, 0, VAE_BATCH, vae, parser=guide, lr=peak, start=start)
    pack("vae", work, ["vae.pt", "vae.json"])
    say(began, "autoencoder")
    pool.encode_pool(source, work, faces)
    say(began, "pool")
    while not (work / "captions.pt").exists():
        time.sleep(0.5)
    if not (work / "base.json").exists():
        further = start if os.environ.get("FURTHER") else None
        pretrain_flux.train_flux(source, work, 0, BATCH, rate, flux, further)
    parts = ["transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    pack("base", work, ["base.json", *(f"base/{part}" for part in parts)])
    say(began, "transformer")
    pretrain_flux.distill_guidance(source, bundle, work, 0, BATCH, 5e-4, distill)
    pack("flux", bundle, ["flux"])
    say(began, "distillation")


def pack(name: str, folder: Path, files: list[str]) -> None:
    """Write OUT/<name>.tar, in parts where it is large."""
    out = Path(os.environ["OUT"])
    path = out / f"{name}.tar"
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(folder / file, file)
    data = path.read_bytes()
    if len(data) > PART:
        path.unlink()
        for k in range(0, len(data), PART):
            (out / f"{name}.tar.{k // PART}").write_bytes(data[k : k + PART])


def say(began: float, stage: str) -> None:
    """Print when a stage ended."""
    print(f"{stage} ended after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
