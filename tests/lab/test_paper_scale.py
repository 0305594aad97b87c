"""The paper profile from raw downloads to tables, on a FLUX repository of the real layout.

Everything is tiny and random, and nothing else differs from the run that a user with the weights
starts: the same commands, `profile=paper`, other paths.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ec2face_core.attributes import CLASSES
from ec2face_core.config import Config, load_profile
from ec2face_core.data import FaceDataset
from ec2face_core.io.paths import CODE, ROOT
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_core.runs import read_metrics
from ec2face_lab import launch
from ec2face_lab.__main__ import main
from ec2face_lab.commands.prepare import prepare
from ec2face_lab.plots.save import read_rows, save_table
from ec2face_lab.prepare.inventory import CLIP, FARL, FLUX, MM_CELEBA
from ec2face_lab.study.tables import table_rows

FACES, TRAIN = 16, 14
SIZE = 48  # the photos have 128 px, the autoencoder's own size is 64, the parser reads 64


@pytest.fixture(scope="module")
def downloads(tmp_path_factory, tiny_faces) -> Path:
    """CelebA-HQ images, CelebAMask-HQ part files and MM-CelebA-HQ captions, as unpacked."""
    folder = tmp_path_factory.mktemp("downloads")
    raw, texts = folder / "CelebAMask-HQ", folder / "multi-modal-celeba/text/celeba-caption"
    parts = raw / "CelebAMask-HQ-mask-anno" / "0"
    for kind in (raw / "CelebA-HQ-img", parts, texts):
        kind.mkdir(parents=True)
    faces = FaceDataset(tiny_faces, None, limit=FACES)
    for i, name in enumerate(faces.ids):
        pixels = ((faces.image(name) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((128, 128)).save(raw / f"CelebA-HQ-img/{i}.jpg")
        labels = faces.label_map(name).numpy()
        for number, part in enumerate(CLASSES):
            if number and (labels == number).any():
                drawn = np.where(labels == number, 255, 0).astype(np.uint8)
                Image.fromarray(drawn).convert("RGB").save(parts / f"{i:05d}_{part}.png")
        (texts / f"{i}.txt").write_text("\n".join(faces[i].captions) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_backbone_dir, tiny_critics_dir) -> Config:
    base = tmp_path_factory.mktemp("paper")
    parser, clip = str(tiny_critics_dir / "parser.pt"), f"local-dir:{tiny_critics_dir / 'clip'}"
    return load_profile(
        "paper",
        profile=str(base / "runs"),
        adapters=str(base / "adapters"),
        data={"root": str(base / "faces"), "size": SIZE, "train": TRAIN, "test": FACES - TRAIN},
        backbone={"path": str(tiny_backbone_dir), "dtype": "float32", "text_length": 40},
        perception={
            "parser": parser, "scoring_parser": parser, "clip": clip, "scoring_clip": clip,
            "parser_size": 64,
        },
        trainer={"steps": 8, "num_processes": 2, "checkpoint_every": 2, "log_every": 1},
        sampling={"steps": 2, "batch_size": 1},
        evaluation={"lpips": "alex-random", "niqe_block": 16, "niqe_refit": True, "bootstrap": 50},
    )  # fmt: skip


@pytest.mark.slow
def test_from_raw_downloads_to_a_table(downloads, config, tmp_path):
    states = {found.need: found.state for found in prepare(config, downloads)}
    assert {states[need] for need in (MM_CELEBA, FLUX, CLIP)} == {"there"}
    assert states[FARL] == "incomplete"  # a random parser: its classes are in no order
    path, training = tmp_path / "config.yaml", config.run_dir / "training" / "both"
    config.save(path)
    arguments = ["--config", str(path)]
    start = {"cwd": ROOT, "env": launch.child_environment(2) | {"OMP_NUM_THREADS": "1"}}

    # two ranks cache the latents and train; both are killed, and the same command resumes
    command = launch.command_line("ec2face_core.train", *arguments, num_processes=2)
    kill_after = random.randrange(3, 7)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, **start
    ) as process:
        for line in process.stdout:
            if line.startswith(f"step {kill_after}/"):
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL and not (training / "final").exists()
    subprocess.run(command, check=True, **start)
    assert [row["step"] for row in read_metrics(training)] == list(range(1, 9))
    pipe = EC2FacePipeline.from_pretrained(config.backbone.path)
    pipe.load_mask_lora(config.run_dir / "adapters" / "both")  # where training has put it
    assert (pipe.config.image_size, pipe.config.text_length) == (SIZE, 40)

    # generation and scoring, each sharded over two ranks, then one process that does nothing anew
    sampling = ("--config", str(path), "--method", "both", "--split", "test")
    command = launch.command_line("ec2face_lab", "generate", *sampling, num_processes=2)
    subprocess.run(command, check=True, **start)
    pictures = sorted(config.run_dir.glob("images/test-both-*/*.png"))
    assert [picture.stem for picture in pictures] == ["14", "15"]
    made = [picture.stat().st_mtime_ns for picture in pictures]
    command = launch.command_line("ec2face_lab", "evaluate", *sampling, num_processes=2)
    subprocess.run(command, check=True, **start)
    scored = {path: path.stat().st_mtime_ns for path in config.run_dir.glob("scores/*.csv")}
    assert scored and not [*config.run_dir.glob("scores/*.parts")]
    assert main(["evaluate", *sampling]) == 0
    assert {path: path.stat().st_mtime_ns for path in scored} == scored
    assert [picture.stat().st_mtime_ns for picture in pictures] == made
    rows = read_rows(config.run_dir / "evaluation" / "test-both.csv")
    assert set(rows[rows["critic"] != "guiding"]["metric"]) >= {"Text", "OAA", "LPIPS", "NIQE"}
    assert set(rows[rows["metric"] == "OAA"]["n"]) == {FACES - TRAIN}

    table = table_rows(config, "table1", {"EC2Face": "both", "real": "real"})
    text = save_table(table, "table1", config, caption="A tiny FLUX.").read_text()
    assert "TediGAN" in text and "EC²Face" in text


@pytest.mark.slow
def test_the_printed_commands_lead_to_every_table_and_figure(downloads, config, tmp_path):
    """Train all variants on two ranks, then run all notebooks; nothing is copied in between."""
    root = tmp_path / "root"  # another repository root: runs/ and figures/ are made there
    (root / "data").mkdir(parents=True)
    for name in ("paper", "mini"):
        (root / "data" / name).symlink_to(CODE / "data" / name)
    prepared = config.replace(**{"data.root": str(root / "faces")})
    assert {f.need: f.state for f in prepare(prepared, downloads)}[MM_CELEBA] == "there"
    zero_shot = root / "zero-shot"  # stands for MM-FFHQ, which needs the real FaRL
    shutil.copytree(root / "faces", zero_shot)
    settings = {
        "data.root": str(root / "faces"), "data.zero_shot_root": str(zero_shot),
        "data.size": SIZE, "data.train": TRAIN, "data.test": FACES - TRAIN, "data.zero_shot": FACES,
        "backbone.path": config.backbone.path, "backbone.dtype": "float32",
        "backbone.text_length": 40, "perception.parser": config.perception.parser,
        "perception.scoring_parser": config.perception.scoring_parser,
        "perception.clip": config.perception.clip,
        "perception.scoring_clip": config.perception.scoring_clip, "perception.parser_size": 64,
        "trainer.steps": 2, "trainer.num_processes": 2, "trainer.log_every": 1,
        "sampling.steps": 2, "sampling.batch_size": 2, "sampling.num_processes": 2,
        "evaluation.lpips": "alex-random", "evaluation.niqe_block": 16,
        "evaluation.niqe_refit": "true", "evaluation.bootstrap": 20,
    }  # fmt: skip
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    start = {
        "cwd": CODE,
        "env": launch.child_environment(2) | {"OMP_NUM_THREADS": "1", "EC2FACE_ROOT": str(root)},
    }
    everything = ["--profile", "paper", "--variant", "all"]
    command = launch.command_line("ec2face_core.train", *everything, *given, num_processes=2)
    subprocess.run(command, check=True, **start)
    reproduce = ["-m", "ec2face_lab", "reproduce", "--profile", "paper"]
    few = ["-p", "faces", "2", "-p", "steps", "1", "-p", "count", "2"]
    done = subprocess.run(
        [sys.executable, *reproduce, *given, *few], stdout=subprocess.PIPE, text=True, **start
    )
    print(done.stdout)
    assert done.returncode == 0
    made = {path.name for path in root.glob("**/figures/**/*") if path.is_file()}
    assert {f"table{k}.csv" for k in range(1, 5)} <= made
    assert {f"fig{k}.png" for k in range(1, 9)} <= made
