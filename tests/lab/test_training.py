"""The laboratory's training loop: limits, resuming, learning rates, the moving average."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from ec2face_core.config import ConfigError
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import read_metrics
from ec2face_lab.world import training
from ec2face_lab.world.ranks import share_of


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def checkpoints_at_every_step(monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)


def test_a_time_limit_counts_all_runs(tmp_path, monkeypatch):
    clock = iter(range(100))
    seen = []
    monkeypatch.setattr(training.time, "process_time", lambda: float(next(clock)))  # 1 s a step

    def step(number, progress, generator):
        seen.append((number, progress, int(generator.initial_seed())))
        if number == 2 and len(seen) == 3:
            raise Killed
        return {"loss": 0.0}

    state = {"net": torch.nn.Linear(2, 2)}
    with pytest.raises(Killed):
        training.train(tmp_path / "stage", step, state, 3, seconds=5.0)
    assert training.train(tmp_path / "stage", step, state, 3, seconds=5.0) == 5.0
    numbers, progress, seeds = zip(*seen, strict=True)
    assert numbers == (0, 1, 2, 2, 3, 4), "two steps before, and three of the five seconds left"
    assert progress == pytest.approx((0, 0.2, 0.4, 0.4, 0.6, 0.8))
    assert seeds[2] == seeds[3] and len(set(seeds)) == 5
    training.train(tmp_path / "stage", step, state, 3, seconds=5.0)
    assert len(seen) == 6, "nothing is left to spend"


def test_a_training_needs_a_limit(tmp_path):
    state = {"net": torch.nn.Linear(2, 2)}
    with pytest.raises(ConfigError, match=r"stage has no limit.*--seconds"):
        training.train(tmp_path / "stage", lambda *_: {"loss": 0.0}, state, 3)


@pytest.mark.parametrize("fused", [False, True])
def test_resuming_is_bitwise_identical(tmp_path, fused):
    def run(folder, stop: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        average = training.moving_average(net, lambda updates: 0.5)
        optimizer = torch.optim.AdamW(net.parameters(), 0.1, fused=fused)

        def step(number, progress, generator):
            if stop and number == stop:
                raise Killed
            training.set_learning_rates(optimizer, progress, warmup=0.25)
            loss = net(torch.randn(2, 2, 5, 5, generator=generator)).square().mean()
            training.descend(optimizer, loss, clip=1.0)
            average.update_parameters(net)
            return {"loss": loss}

        state = {"net": net, "average": average, "optimizer": optimizer}
        training.train(folder, step, state, 7, steps=6, evaluate=lambda: {"quality": 1.0})
        return net.state_dict() | average.state_dict()

    straight = run(tmp_path / "straight")
    with pytest.raises(Killed):
        run(tmp_path / "killed", stop=4)
    resumed = run(tmp_path / "killed")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    rows = read_metrics(tmp_path / "killed")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["quality"] == 1.0


def test_warm_up_hold_and_cosine():
    rates = [training.warmup_cosine(step, 100, 2.0, warmup=10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0 and rates[100] == pytest.approx(0.0)
    assert rates[55] == pytest.approx(1.0), "half of the cosine"
    held = [training.warmup_cosine(step, 100, 2.0, warmup=10, hold=0.6) for step in range(101)]
    assert held[9:61] == [2.0] * 52
    assert held[70] == pytest.approx(1 + math.cos(math.pi / 4)) and held[100] == pytest.approx(0.0)


def test_peaks_are_the_rates_at_construction():
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    for progress in (0.0, 0.51):
        training.set_learning_rates(optimizer, progress)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.5, 0.05])


def test_the_moving_average_lags_behind_and_buffers_do_not():
    net = torch.nn.BatchNorm1d(1)
    average = training.moving_average(net, lambda updates: updates / (updates + 1))
    expected = []
    for value in (1.0, 2.0, 6.0):
        net.weight.data.fill_(value)
        net.running_mean.fill_(value)
        average.update_parameters(net)
        expected.append(value)
        mean = sum(expected) / len(expected)  # this decay makes it the mean of all updates
        assert average.module.weight.item() == pytest.approx(mean)
        assert average.module.running_mean.item() == value


RANK = """
import sys
from pathlib import Path
import torch
from ec2face_lab.world import training
from ec2face_lab.world.ranks import join_ranks, rank_of, share_of

join_ranks()
folder = Path(sys.argv[1])
net = torch.nn.Linear(3, 1, bias=False)
torch.nn.init.zeros_(net.weight)
optimizer = torch.optim.SGD(net.parameters(), 0.1)

def step(number, progress, generator):
    x = torch.randn(share_of(8), 3, generator=generator)
    loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
    training.descend(optimizer, loss)
    return {"loss": loss}

training.train(folder / "run", step, {"net": net}, 3, steps=int(sys.argv[2]))
torch.save(net.weight, folder / f"{rank_of()[0]}.pt")
"""


@pytest.mark.slow
def test_ranks_descend_their_mean_gradient_and_resume(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for steps in (2, 5):
        subprocess.run([*torchrun, str(script), str(tmp_path), str(steps)], cwd=ROOT, check=True)
    weight = torch.zeros(1, 3)
    for number in range(5):
        gradient = torch.zeros(1, 3)
        for rank in range(2):
            generator = torch.Generator().manual_seed(3 * 1_000_003 + number + rank * 10**15)
            x = torch.randn(4, 3, generator=generator)
            error = x @ weight.T - x.sum(1, keepdim=True)
            gradient += 2 * (error * x).mean(0, keepdim=True) / 2
        weight -= 0.1 * gradient
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt").allclose(weight, atol=1e-6)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_ranks_must_share_a_step_equally(monkeypatch, tmp_path):
    monkeypatch.setattr("ec2face_lab.world.ranks.rank_of", lambda: (0, 3))
    with pytest.raises(ConfigError, match="3 ranks cannot share a step of 16 samples"):
        share_of(16)
    monkeypatch.setattr(training, "rank_of", lambda: (0, 2))
    with pytest.raises(ConfigError, match="not --seconds"):
        training.train(tmp_path, lambda *_: {}, {}, 3, seconds=1.0)
