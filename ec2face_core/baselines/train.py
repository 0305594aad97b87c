"""Train one comparison system; the same command again resumes it.

    python -m ec2face_core.baselines.train --system TediGAN --out runs/mini/baselines/tedigan

What two systems share is trained once, in `shared` beside the output folder: by the first of them,
or before, which has to be where two are trained at the same time:

    python -m ec2face_core.baselines.train --system TediGAN --out ... --shared
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..commands import add_config_options, chosen, told
from ..config import Config, ConfigError, resolve
from ..journal import read_metrics
from ..launch import end_with_parent
from ..perception import LOCAL_DIR
from ..results import path_digest, provenance
from . import SYSTEMS, build


def spent(run_dir: Path) -> dict[str, dict[str, float]]:
    """Steps and seconds of optimisation of every stage that was trained in a folder, by name."""
    last = {p.parent.name: read_metrics(p.parent) for p in sorted(run_dir.glob("*/metrics.jsonl"))}
    return {
        name: {key: rows[-1][key] for key in ("step", "seconds")}
        for name, rows in last.items()
        if rows
    }


def claim(folder: Path, config: Config, seed: int) -> None:
    """Note what a training stands on, or see that it is what the folder's training stood on.

    Raises:
        ConfigError: the folder holds a training on another autoencoder, CLIP or seed.
    """
    clip = config.perception.clip.removeprefix(LOCAL_DIR)
    about = {
        "seed": seed,
        "autoencoder": path_digest(resolve(config.backbone.path) / "vae"),
        "clip": path_digest(resolve(clip)),
    }
    path = folder / "about.json"
    if path.is_file() and (found := json.loads(path.read_text())) != about:
        raise ConfigError(
            f"{folder} holds a training on {found}, not {about}: delete it, or name another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=2) + "\n")


@told
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; returns the exit code: 0, or 2 for settings or data that cannot work."""
    end_with_parent()
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_core.baselines.train",
        description="Train one comparison system for a given time. Run again to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--system", required=True, choices=list(SYSTEMS), help="row of Table 1")
    parser.add_argument("--shared", action="store_true", help="train only what it shares")
    parser.add_argument(
        "--seconds", type=float, default=0.0,
        help="of one core (0: what the profile gives every system)",
    )  # fmt: skip
    add_config_options(parser)
    parser.add_argument("--seed", type=int, default=42, help="of weights and noise")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and state")
    options = parser.parse_args(arguments)
    from ..datasets import open_dataset

    torch.set_num_threads(options.threads)
    config = chosen(options)
    system = build(options.system, config)
    dataset, shared = open_dataset(config, "train"), options.out.parent / "shared"
    if options.shared:
        if not system.shares:
            raise ConfigError(f"{system.name} shares nothing: leave out --shared")
        claim(shared, config, config.seed)
        system.prepare(shared)
        print(f"shared by {system.name} and others: {shared}")
        return
    budget = options.seconds or system.budget(config)
    claim(options.out, config, options.seed)
    if system.shares:
        claim(shared, config, config.seed)
    system.fit(dataset, options.out, budget, options.seed)
    system.save(options.out)
    before = {stage: how for stage, how in spent(shared).items() if stage in system.shares}
    record = provenance(
        config, system=system.name, seed=options.seed, budget=budget,
        stages=spent(options.out), shared=before,
        parameters=system.parameters(), threads=options.threads,
    )  # fmt: skip
    (options.out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{system.name}: {system.parameters():,} parameters, {options.out}")


if __name__ == "__main__":
    sys.exit(main())
