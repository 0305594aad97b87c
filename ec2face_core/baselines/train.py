"""Train one comparison system; the same command again resumes it.

    python -m ec2face_core.baselines.train --system TediGAN --out runs/mini/baselines/tedigan

What several systems share is trained once, in `shared` beside the output folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import Config, ConfigError, load_profile
from ..launch import end_with_parent
from .system import System

# row of Tables 1 and 2 -> where its class is
SYSTEMS: dict[str, str] = {
    "TediGAN": "tedigan.TediGAN",
    "UaC": "uac.UaC",
    "PixelFace+": "pixelface.PixelFace",
    "CoDiffusion": "codiffusion.CoDiffusion",
    "ControlNeXt": "controlnext.ControlNeXt",
    "MM2Latent": "mm2latent.MM2Latent",
}
SECONDS = 720.0  # of optimisation, all stages of a system together, shared networks apart


def build(name: str, config: Config) -> System:
    """The untrained system of a row.

    Raises:
        ConfigError: there is no such row; the message lists them.
    """
    if name not in SYSTEMS:
        raise ConfigError(f"system {name!r} does not exist; known: {', '.join(SYSTEMS)}")
    module, _, cls = SYSTEMS[name].rpartition(".")
    return getattr(importlib.import_module(f"{__package__}.{module}"), cls)(config)


def spent(run_dir: Path) -> dict[str, dict[str, float]]:
    """Steps and seconds of optimisation of every stage that was trained in a folder, by name."""
    found = {}
    for journal in sorted(run_dir.glob("*/metrics.jsonl")):
        last = json.loads(journal.read_text().splitlines()[-1])
        found[journal.parent.name] = {key: last[key] for key in ("step", "seconds")}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for settings or data that cannot work."""
    end_with_parent()
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_core.baselines.train",
        description="Train one comparison system by wall time. Run again to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--system", required=True, choices=list(SYSTEMS), help="row of Table 1")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of optimisation")
    parser.add_argument("--profile", default="mini", help="profile: smoke or mini")
    parser.add_argument("--seed", type=int, default=42, help="of weights and noise")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and state")
    options = parser.parse_args(arguments)
    from ..datasets import DataError, open_dataset
    from ..results import provenance

    torch.set_num_threads(options.threads)
    try:
        config = load_profile(options.profile)
        system = build(options.system, config)
        system.fit(open_dataset(config, "train"), options.out, options.seconds, options.seed)
    except (ConfigError, DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    system.save(options.out)
    record = provenance(
        config, system=system.name, seed=options.seed, budget=options.seconds,
        stages=spent(options.out), shared=spent(options.out.parent / "shared"),
        parameters=system.parameters(), threads=options.threads,
    )  # fmt: skip
    (options.out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{system.name}: {system.parameters():,} parameters, {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
