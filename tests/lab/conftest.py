"""The paper profile in small, as files: raw downloads and weights; and pictures by a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from face_files import coloured, detect, label_map, save_colour_parser
from PIL import Image
from safetensors.numpy import save_file

from ec2face_core.attributes import CLASSES
from ec2face_core.config import Config, adapter_dir, load_profile

if TYPE_CHECKING:
    from ec2face_lab.study.pictures import PictureSet

SIZE = 32
SPLITS = {"train": 3, "test": 2, "zero_shot": 3}
SHARDS = {"transformer": ("diffusion_pytorch_model", 3), "text_encoder_2": ("model", 2)}
SINGLES = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}


def flux_repository(folder: Path) -> Path:
    """The files of black-forest-labs/FLUX.1-dev, with one small tensor a shard."""

    def write(path: str, content: dict) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))

    write("model_index.json", {"_class_name": "FluxPipeline"})
    write("scheduler/scheduler_config.json", {})
    for name in ("tokenizer", "tokenizer_2"):
        write(f"{name}/tokenizer_config.json", {})
    write("tokenizer/vocab.json", {})
    (folder / "tokenizer_2" / "spiece.model").touch()
    for name, stem in SINGLES.items():
        write(f"{name}/config.json", {})
        save_file({"w": np.ones(8, np.float32)}, folder / name / f"{stem}.safetensors")
    for name, (stem, n) in SHARDS.items():
        write(f"{name}/config.json", {})
        files = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        for i, file in enumerate(files):
            save_file({f"layer.{i}": np.ones(8, np.float32)}, folder / name / file)
        index = {"weight_map": {f"layer.{i}": file for i, file in enumerate(files)}}
        write(f"{name}/{stem}.safetensors.index.json", index)
    return folder


@pytest.fixture
def flux_folder(tmp_path) -> Path:
    """A whole `flux_repository`."""
    return flux_repository(tmp_path / "FLUX.1-dev")


@pytest.fixture
def downloads(tmp_path) -> Path:
    """CelebAMask-HQ, MM-CelebA-HQ's texts, FFHQ-Text and the detector, as they are unpacked."""
    folder = tmp_path / "downloads"
    raw = folder / "CelebAMask-HQ"
    texts = folder / "multi-modal-celeba/text/celeba-caption"
    annotation = raw / "CelebAMask-HQ-mask-anno" / "0"
    ffhq = folder / "FFHQ-Text"
    empty = (raw / "CelebA-HQ-img", annotation, texts, ffhq / "Image", ffhq / "Text")
    for path in (*empty, folder / "weights"):
        path.mkdir(parents=True)
    for k in range(SPLITS["train"] + SPLITS["test"]):
        ids = label_map(SIZE, k % 2)
        coloured(ids).save(raw / "CelebA-HQ-img" / f"{k}.jpg", quality=100, subsampling=0)
        for number in np.unique(ids[ids > 0]):
            part = np.where(ids == number, 255, 0).astype(np.uint8)
            path = annotation / f"{k:05d}_{CLASSES[number]}.png"
            Image.fromarray(part).convert("RGB").save(path)
        (texts / f"{k}.txt").write_text(f"Face {k}.\nAnother.\n")
    for name in ("00007", "01234", "69999"):
        coloured(label_map(SIZE), 1).save(ffhq / "Image" / f"{name}.png")
        (ffhq / "Text" / f"{name}.txt").write_text(f"A woman, {name}.\nShe smiles.\n")
    torch.save({"weight": torch.zeros(2)}, folder / "weights/mobilenet0.25_Final.pth")
    return folder


@pytest.fixture
def no_hub(tmp_path, monkeypatch) -> None:
    """Caches in `tmp_path`, and nobody logged in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


@pytest.fixture
def paper_config(tmp_path, flux_folder, no_hub, monkeypatch) -> Config:
    """The paper profile with every weight in its place; data roots and caches in `tmp_path`."""
    detector = "ec2face_lab.commands.prepare.face_detector"
    monkeypatch.setattr(detector, lambda path, device: detect)
    parser = save_colour_parser(tmp_path / "parser.pt")
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "open_clip_config.json").write_text("{}")
    save_file({"w": np.ones(4, np.float32)}, clip / "open_clip_model.safetensors")
    return load_profile(
        "paper",
        data={
            "root": str(tmp_path / "roots" / "faces"), "size": SIZE, **SPLITS,
            "zero_shot_root": str(tmp_path / "roots" / "foreign"),
        },
        backbone={"path": str(flux_folder)},
        perception={
            "parser": str(parser), "scoring_parser": str(parser), "parser_size": SIZE,
            "clip": f"local-dir:{clip}", "scoring_clip": f"local-dir:{clip}",
        },
        evaluation={"lpips": "alex-random", "niqe_refit": True},
    )  # fmt: skip


@pytest.fixture(scope="session")
def sampled_config(tiny_config) -> Config:
    """Two steps, 12 training faces (so small NIQE blocks), and a LoRA with weights."""
    from ec2face_core.backbone import load_backbone
    from ec2face_core.io.lora_file import save_mask_lora
    from ec2face_core.mask_branch import add_mask_lora

    config = tiny_config.replace(
        sampling={"steps": 2, "batch_size": 3, "num_processes": 1},
        evaluation={"niqe_block": 16, "bootstrap": 50},
    )
    transformer = load_backbone(config.backbone, ("transformer",)).transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in add_mask_lora(transformer, config.lora):
            torch.nn.init.normal_(p, std=0.2)
    length = config.backbone.text_length
    save_mask_lora(transformer, adapter_dir(config, "both"), config.lora, length)
    return config


@pytest.fixture(scope="session")
def sampled(sampled_config) -> PictureSet:
    """The test faces by the method `both`."""
    from ec2face_lab.study.pictures import PictureSet

    pictures = PictureSet(sampled_config, "both", "test")
    pictures.generate(progress=False)
    return pictures
