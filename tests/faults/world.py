"""A small world for the fault scripts: its own copy of the bundle, faces, and a configuration."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads ruin shared cores
os.environ.setdefault("GOMP_SPINCOUNT", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ec2face_core.config import Config, load_profile
from ec2face_core.data import open_dataset
from ec2face_core.io.paths import ROOT


def make_world(work: Path, steps: int = 8) -> Config:
    """The smoke profile in `work`: nothing outside is written.

    Args:
        work: folder of everything.
        steps: of a training, with a checkpoint after every second one.
    """
    bundle = work / "bundle"
    if not bundle.is_dir():
        shutil.copytree(ROOT / "data" / "mini", bundle)
    clips = {
        name: f"local-dir:{bundle / folder}"
        for name, folder in (("clip", "clip_guiding"), ("scoring_clip", "clip_scoring"))
    }
    config = load_profile(
        "smoke",
        profile=str(work / "run"),
        adapters=str(bundle / "adapters"),
        data={"root": str(work / "faces"), "zero_shot_root": str(work / "other"), "train": 24},
        backbone={"path": str(bundle / "flux")},
        perception={
            "parser": str(bundle / "parser_guiding.pt"),
            "scoring_parser": str(bundle / "parser_scoring.pt"), **clips,
        },
        trainer={"steps": steps, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
    )  # fmt: skip
    open_dataset(config, "train")
    config.save(work / "config.yaml")
    return config
