"""Train one comparison system; the same command again resumes it.

    python -m ec2face_lab.baselines.train --system TediGAN --out runs/mini/baselines/tedigan

What two systems share is trained once, in `shared` beside the output folder: by the first of them,
or before, which has to be where two are trained at the same time:

    python -m ec2face_lab.baselines.train --system TediGAN --out ... --shared
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ec2face_core.config import ConfigError, add_config_options, cli, config_from_args, resolve
from ec2face_core.runs import provenance, read_metrics
from ec2face_core.train import end_with_parent

from . import SYSTEMS, build
from .origin import claim, origin, shared_origin
from .storage import shared_file


def spent(run_dir: Path) -> dict[str, dict[str, float]]:
    """Steps and seconds of optimisation of every stage that was trained in a folder, by name."""
    last = {p.parent.name: read_metrics(p.parent) for p in sorted(run_dir.glob("*/metrics.jsonl"))}
    return {
        name: {key: rows[-1][key] for key in ("step", "seconds")}
        for name, rows in last.items()
        if rows
    }


@cli
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; returns the exit code: 0, or 2 for settings or data that cannot work."""
    end_with_parent()
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_lab.baselines.train",
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
    from ec2face_core.data import open_dataset

    torch.set_num_threads(options.threads)
    config, out = config_from_args(options), resolve(options.out)
    system, shared = build(options.system, config), out.parent / "shared"
    if system.shares:
        if not shared_file(out, system.shares[0]).is_file():
            claim(shared, shared_origin(config))
        system.prepare(shared)
    if options.shared:
        if not system.shares:
            raise ConfigError(f"{system.name} shares nothing: leave out --shared")
        print(f"shared by {system.name} and others: {shared}")
        return
    seconds = options.seconds or system.budget(config)
    about = origin(config, type(system), out, seconds, options.seed)
    claim(out, about)
    system.fit(open_dataset(config, "train"), out, seconds, options.seed)
    system.save(out)
    before = {stage: how for stage, how in spent(shared).items() if stage in system.shares}
    record = provenance(
        config, system=system.name, seed=options.seed, budget=seconds, stands_on=about,
        stages=spent(out), shared=before,
        parameters=system.parameters(), threads=options.threads,
    )  # fmt: skip
    (out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{system.name}: {system.parameters():,} parameters, {out}")


if __name__ == "__main__":
    sys.exit(main())
