"""A training that one can watch: trackers, drawn faces, loadable checkpoints, averages, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ec2face_core import train
from ec2face_core.config import Config, ConfigError, load_profile
from ec2face_core.fast.memory import check_memory, needed_memory
from ec2face_core.io.lora_file import LORA_FILE, read_mask_lora
from ec2face_core.io.paths import ROOT
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_core.runs import VALIDATION_FILE, read_metrics
from ec2face_core.trainer import Trainer
from ec2face_core.training.ema import AveragedLora
from ec2face_lab import launch


@pytest.fixture(scope="module")
def watched(tiny_config: Config, tmp_path_factory) -> Trainer:
    """Four steps with everything switched on."""
    config = tiny_config.replace(
        data={"validation": 0},
        trainer={
            "tracker": "tensorboard", "validate_every": 2, "validation_faces": 3, "ema": 0.9,
        },
        sampling={"steps": 2},
    )  # fmt: skip
    trainer = Trainer(config, "none", tmp_path_factory.mktemp("run") / "watched")
    trainer.fit()
    return trainer


def test_faces_are_drawn_and_scored(watched):
    rows = read_metrics(watched.run_dir, VALIDATION_FILE)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert -100 <= row["validation_text"] <= 100
        assert 0 <= row["validation_recall"] <= 100 and 0 <= row["validation_f1"] <= 100
        sheet = Image.open(watched.run_dir / "validation" / f"step_{row['step']:06d}.png")
        assert sheet.size == (3 * 64, 2 * 64) and "synthetic" in sheet.text["Source"]


def test_drawing_changes_no_training(watched, tiny_config, tmp_path):
    """Nor does the tracker; the average is of the same LoRA."""
    plain = tiny_config.replace(trainer={"ema": 0.9})
    Trainer(plain, "none", tmp_path).fit()
    ours, theirs = (load_file(run / "final" / LORA_FILE) for run in (watched.run_dir, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_log_and_the_tracker(watched):
    rows = read_metrics(watched.run_dir)
    assert len(rows) == 4 and all(0.1 < row["peak_memory_gb"] < 100 for row in rows)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (watched.run_dir / "tracking").rglob("events*")
                 if path.parent.name == "tracking"}  # fmt: skip
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"total", "lr", "samples_per_second", "validation_f1"} <= set(tags)
    assert [e.step for e in events.Scalars("total")] == [1, 2, 3, 4]
    assert events.Scalars("total")[0].value == pytest.approx(rows[0]["total"], rel=1e-5)


def test_a_tracker_that_is_missing_is_told(tiny_config, tmp_path):
    config = tiny_config.replace(trainer={"tracker": "wandb"})
    with pytest.raises(ConfigError, match="`pip install wandb` first"):
        Trainer(config, "none", tmp_path).fit()


def test_every_checkpoint_is_a_lora(watched, tiny_config):
    pipe = EC2FacePipeline.from_config(tiny_config, None)
    pipe.set_progress_bar_config(disable=True)
    for step in (2, 4):
        folder = watched.run_dir / "checkpoints" / f"step_{step:06d}"
        pipe.load_mask_lora(folder)
        assert read_mask_lora(folder).size == 64 and (folder / "README.md").is_file()
        assert json.loads((folder / "provenance.json").read_text())["parameters"]["steps"] == step
    last, final = (load_file(f / LORA_FILE) for f in (folder, watched.run_dir / "final"))
    assert all(torch.equal(last[name], final[name]) for name in final)


def test_the_average_is_what_is_kept(watched):
    """Of the parameters after each step, with decay min(0.9, (1 + n) / (10 + n))."""
    p = torch.nn.Parameter(torch.tensor([1.0]))
    average = AveragedLora([p], 0.9)
    expected = 1.0
    for step in range(1, 200):
        p.data.fill_(step)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.in_use():
        assert float(p) == pytest.approx(expected, rel=1e-5) and expected < 195
    assert float(p) == 199
    final = load_file(watched.run_dir / "final" / LORA_FILE)
    named = watched.transformer.named_parameters()
    current = {n.replace(".mask", ""): p for n, p in named if ".lora_B" in n}
    pairs = [(final[f"transformer.{n}"], p) for n, p in current.items()]
    assert pairs and all(not torch.equal(kept, p) for kept, p in pairs)
    off = AveragedLora([p], 0.0)
    off.update(1)
    with off.in_use():
        assert float(p) == 199 and off.tensors(["p"]) == {}


def test_a_resumed_average_is_bitwise_the_same(watched, tiny_config, tmp_path):
    config = tiny_config.replace(trainer={"ema": 0.9})
    Trainer(config.replace(trainer={"steps": 2}), "none", tmp_path).fit()
    Trainer(config, "none", tmp_path).fit()
    ours, theirs = (load_file(run / "final" / LORA_FILE) for run in (watched.run_dir, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_texts_in_memory_train_alike(watched, tiny_config, tmp_path):
    config = tiny_config.replace(
        data={"texts": "memory", "cache": str(tmp_path / "cache")}, trainer={"ema": 0.9}
    )
    Trainer(config.replace(trainer={"steps": 2}), "none", tmp_path / "run").fit()
    Trainer(config, "none", tmp_path / "run").fit()
    assert not list((tmp_path / "cache").rglob("text-*"))
    ours, theirs = (
        load_file(run / "final" / LORA_FILE) for run in (watched.run_dir, tmp_path / "run")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_step_with_a_checkpoint(tiny_config, tmp_path, monkeypatch, sent):
    config = tiny_config.replace(trainer={"checkpoint_every": 100, "steps": 50})
    config.save(tmp_path / "config.yaml")
    update = Trainer.update
    setup = Trainer.setup
    before = []  # what signals do before the first step

    def watched(self):
        before.extend((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))
        setup(self)

    def interrupted(self):
        if self.steps_done == 2:
            os.kill(os.getpid(), sent)
        update(self)

    monkeypatch.setattr(Trainer, "setup", watched)
    monkeypatch.setattr(Trainer, "update", interrupted)
    with pytest.raises(SystemExit) as end:
        train.main(
            ["--config", str(tmp_path / "config.yaml"), "--variant", "none",
             "--run-dir", str(tmp_path / "run")]
        )  # fmt: skip
    assert before == [signal.SIG_DFL] * 2  # they end it at once
    assert end.value.code == 128 + sent
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003"]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_ends_both(tiny_config, tmp_path):
    config = tiny_config.replace(
        trainer={"checkpoint_every": 1000, "steps": 1000, "num_processes": 2, "batch_size": 1}
    )
    config.save(tmp_path / "config.yaml")
    arguments = ("--config", str(tmp_path / "config.yaml"), "--variant", "none")
    command = launch.command_line(
        "ec2face_core.train", *arguments, "--run-dir", str(tmp_path / "run"), num_processes=2
    )
    start = {"cwd": ROOT, "env": launch.child_environment(2) | {"OMP_NUM_THREADS": "1"}}
    import psutil

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **start) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                ranks = [
                    child for child in psutil.Process(process.pid).children(recursive=True)
                    if "--run-dir" in child.cmdline()
                ]  # fmt: skip
                ranks[-1].send_signal(signal.SIGINT)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert process.returncode == 1 and checkpoint.name >= "step_000003"
    assert read_metrics(tmp_path / "run")[-1]["step"] == int(checkpoint.name[-6:])


# ------------------------------------------------------------------------------- memory of the GPU


@pytest.fixture
def flux(tmp_path):
    """The settings of FLUX.1-dev's networks, without weights."""
    transformer = {
        "_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": True,
        "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,
        "num_layers": 19, "num_single_layers": 38, "pooled_projection_dim": 768,
    }  # fmt: skip
    vae = {"block_out_channels": [128, 256, 512, 512]}
    for name, values in (("transformer", transformer), ("vae", vae)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    return load_profile("paper", **{"backbone.path": str(tmp_path)})


def test_the_default_fits_the_papers_gpus(flux, monkeypatch):
    card = SimpleNamespace(total_memory=85.0e9)  # an A100 of 80 GiB
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    gpu = torch.device("cuda")
    check_memory(flux, gpu)
    assert needed_memory(flux) == pytest.approx(70e9, rel=0.05)
    four = flux.replace(trainer={"batch_size": 4, "accumulation": 1})
    assert needed_memory(four) == pytest.approx(99e9, rel=0.05)
    with pytest.raises(ConfigError, match=r"about 9\d GB .* has 85: lower trainer\.batch_size"):
        check_memory(four, gpu)
    check_memory(four, torch.device("cpu"))
    check_memory(four.replace(trainer={"gradient_checkpointing": True}), gpu)
    assert needed_memory(flux.replace(**{"trainer.shard": True})) < 50e9


def test_running_out_of_memory_names_the_settings(monkeypatch, tiny_config, tmp_path, capsys):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Trainer, "setup", full)
    tiny_config.save(tmp_path / "config.yaml")
    code = train.main(
        ["--config", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    )
    assert code == 2
    assert "lower trainer.batch_size and raise trainer.accumulation" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_accelerates_own_configuration_is_refused(tiny_config, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=f"{name} is set"):
        Trainer(tiny_config, "none", tmp_path).fit()


@pytest.mark.slow
def test_all_variants_by_one_command(tiny_config, tmp_path, capsys):
    config = tiny_config.replace(profile=str(tmp_path / "runs"), trainer={"steps": 1})
    config.save(tmp_path / "config.yaml")
    arguments = ["--config", str(tmp_path / "config.yaml"), "--variant", "all"]
    assert train.main(arguments) == 0
    names = {path.name for path in (tmp_path / "runs" / "adapters").iterdir()}
    assert names == {"without_ltal", "none", "mask", "text", "both"}
    assert train.main([*arguments, "--run-dir", str(tmp_path / "x")]) == 2
    assert "--run-dir is of one variant" in capsys.readouterr().err
