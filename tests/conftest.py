"""Shared small worlds: a random backbone, procedural faces, perception models, a configuration.

Everything is built once a session in a temporary folder; nothing needs `data/mini`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads ruin shared cores
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from pathlib import Path

import pytest
import torch

from ec2face_core.config import Config, load_profile

torch.set_num_threads(2)

TRAIN, TEST = 12, 4


@pytest.fixture(scope="session")
def tiny_faces(tmp_path_factory) -> Path:
    """Root of 12 training and 4 test faces, 64 px, ten captions each."""
    from ec2face_lab.world.sources import write_dataset

    root = tmp_path_factory.mktemp("data") / "faces"
    write_dataset(root, seed=7, splits={"train": TRAIN, "test": TEST}, size=64, progress=False)
    return root


@pytest.fixture(scope="session")
def tiny_corpus(tiny_faces) -> list[str]:
    """Every caption of `tiny_faces`."""
    files = sorted((tiny_faces / "text").glob("*.txt"))
    return [line for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_backbone_dir(tmp_path_factory, tiny_corpus) -> Path:
    """FluxPipeline folder of the miniature's architecture at random weights, float16."""
    from ec2face_lab.world.networks import save_backbone, tiny_backbone

    folder = tmp_path_factory.mktemp("bundle") / "flux"
    save_backbone(tiny_backbone(tiny_corpus, seed=1), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_critics_dir(tmp_path_factory, tiny_corpus) -> Path:
    """Folder with a random parser.pt and a random CLIP in clip/."""
    from ec2face_lab.world import networks

    folder = tmp_path_factory.mktemp("critics")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        networks.save_parser(networks.MiniParserNet((8, 16)), folder / "parser.pt")
        tokenizer = networks.clip_tokenizer(tiny_corpus)
        model_config = networks.mini_clip_config(len(tokenizer), text_width=64, embed_dim=32)
        model = networks.build_mini_clip(model_config)
        networks.save_mini_clip(folder / "clip", model, model_config, tokenizer)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, tiny_faces, tiny_backbone_dir, tiny_critics_dir) -> Config:
    """The mini profile on these small worlds; its `run_dir` is a temporary folder, too."""
    critics = {
        "parser": str(tiny_critics_dir / "parser.pt"),
        "scoring_parser": str(tiny_critics_dir / "parser.pt"),
        "clip": f"local-dir:{tiny_critics_dir / 'clip'}",
        "scoring_clip": f"local-dir:{tiny_critics_dir / 'clip'}",
    }
    return load_profile(
        "mini",
        # an absolute profile is its own run_dir: nothing is written into the repository
        profile=str(tmp_path_factory.mktemp("runs") / "tiny"),
        adapters=str(tmp_path_factory.mktemp("adapters")),
        data={"root": str(tiny_faces), "train": TRAIN, "test": TEST},
        backbone={"path": str(tiny_backbone_dir)},
        lora={"rank": 4, "alpha": 4.0},
        sampling={"mixed_precision": "no"},  # which would depend a little on the batch
        perception=critics,
        trainer={
            "steps": 4, "batch_size": 2, "learning_rate": 1e-3, "warmup": 2,
            "schedule": "constant", "log_every": 1, "checkpoint_every": 2,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(tiny_config: Config, tmp_path_factory):
    """A trainer in float32, conditions dropped often, strong guidance; its LoRA is not zero."""
    from ec2face_core.trainer import Trainer

    config = tiny_config.replace(
        loss={"alpha_text": 500.0, "alpha_mask": 500.0},
        trainer={"mixed_precision": "no", "drop_probability": 0.4, "batch_size": 4},
    )
    trainer = Trainer(config, "both", tmp_path_factory.mktemp("run") / "exact")
    trainer.setup()
    generator = torch.Generator().manual_seed(0)
    for p in trainer.parameters:
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return trainer
