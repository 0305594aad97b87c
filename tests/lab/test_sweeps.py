"""One setting at a time: what a point is, what is scored, what may be said of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest

from ec2face_core.config import adapter_dir, adapter_name, load_profile
from ec2face_core.losses import beta
from ec2face_lab.__main__ import main
from ec2face_lab.plots import save as results
from ec2face_lab.study import sweeps
from ec2face_lab.study.sweeps import SWEEPS, Point, point_config


@pytest.mark.parametrize("profile", ["smoke", "mini", "paper"])
def test_every_point_is_a_configuration_with_a_folder_of_its_own(profile):
    config = load_profile(profile)
    folders = []
    for sweep, points in SWEEPS.items():
        for name in points:
            other = point_config(config, sweep, name)
            if other is not config:
                folders.append(other.run_dir)
                assert config.run_dir in other.run_dir.parents
                assert other.data == config.data and other.seed == config.seed
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_is_compared_with_the_miniature_as_it_is(sweep):
    config, first = load_profile("mini"), next(iter(SWEEPS[sweep]))
    assert point_config(config, sweep, first) is config


def test_always_is_a_schedule_that_never_fades():
    import torch

    c = load_profile("mini", **SWEEPS["beta"]["always"].settings).loss
    assert beta(torch.linspace(0, 1, 5), c.steepness, c.center).eq(1).all()


def test_a_point_that_differs_in_sampling_alone_has_the_kept_lora(monkeypatch):
    config = load_profile("mini")
    trained = []
    monkeypatch.setattr(sweeps, "retrain", lambda other, *_: trained.append(other.profile))
    sweeps.train_sweeps(config, ["consistency"])
    assert len(trained) > 5 and "mini/sweeps/consistency-sampling" not in trained
    point = sweeps.point_config(config, "consistency", "sampling")
    assert point.sampling.consistency > 0 and point.run_dir != config.run_dir
    assert not Path(point.adapters).is_absolute()  # the folder of a clone may move
    assert adapter_dir(point, "none") == adapter_dir(config, "none")


@pytest.fixture
def swept(tiny_config, tmp_path_factory):
    """A sweep of two points, trained, sampled and scored; kept adapters of two seeds."""
    from ec2face_core.trainer import Trainer

    config = tiny_config.replace(
        profile=str(tmp_path_factory.mktemp("runs") / "sweeps"),
        adapters=str(tmp_path_factory.mktemp("bundle") / "adapters"),
        data={"procedural": True, "validation": 2},
        sampling={"steps": 1, "num_processes": 1},
        evaluation={"bootstrap": 20},
        trainer={"steps": 2},
    )
    points = {
        "own": Point("as it is", "none", {"loss.clip": config.loss.clip}),
        "raw": Point("raw", "none", {"loss.clip": 0.0}),
    }

    def train(other, methods, seeds=1):
        for k, method in itertools.product(range(seeds), methods):
            seeded = other.replace(seed=other.seed + k)
            folder = seeded.run_dir / "training" / adapter_name(seeded, method)
            Trainer(seeded, method, folder).fit()  # which publishes it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "SWEEPS", {"dropout": points, "consistency": points})
        patch.setattr(sweeps, "TRAININGS", {"consistency": 2})
        patch.setattr(sweeps, "retrain", train)
        patch.setattr(sweeps, "trained_seeds", lambda config: 2)
        for seed in (config.seed, config.seed + 1):
            train(config.replace(seed=seed), ("none", "both"))
        earlier = dict.fromkeys(results.COLUMNS, "") | {
            "metric": "RFA",
            "value": 1.0,
            "method": "16",
        }
        kept = [{**earlier, "table": t} for t in ("lora", "lora, minus 16", "dropout", "seeds")]
        file = config.run_dir / "sweeps" / "sweeps.csv"
        file.parent.mkdir(parents=True)
        pd.DataFrame(kept).to_csv(file, index=False)
        path = sweeps.run_sweeps(config, ["dropout"])
        path = sweeps.run_sweeps(config, ["consistency"])
        yield *sweeps.kept_sweeps(config), path


@pytest.mark.slow
def test_rows_of_a_sweep(swept):
    rows, source, path = swept
    assert source == path and path.with_suffix(".json").is_file()
    scores = rows[rows["table"] == "dropout"].set_index(["method", "critic", "metric"])["value"]
    for name in ("own", "raw"):
        assert scores[name, "", "LoRA parameters"] == scores["own", "", "LoRA parameters"] > 0
        assert scores[name, "", "minutes"] > 0 and scores[name, "", "gradient spread"] >= 1
        assert 0 <= scores[name, "independent", "OAA, mask alone"] <= 100
    differences = rows[rows["table"] == "dropout, minus own"].set_index("method")
    assert set(differences.index) == {"raw"} and (differences["n"] <= 2).all()
    of = differences[differences["critic"] == "guiding"].set_index("metric")["value"]
    expected = scores["raw", "guiding", "OAA"] - scores["own", "guiding", "OAA"]
    assert of["OAA"] == pytest.approx(expected, abs=1e-3)
    assert {"none, seed 43", "both, seed 43"} == set(rows[rows["table"] == "seeds"]["method"])
    table = sweeps.sweep_table(rows, "dropout")
    assert list(table.index) == ["as it is", "raw"] and "Text, text alone" in table


@pytest.mark.slow
def test_rows_of_a_sweep_with_several_trainings(swept):
    rows = swept[0]
    scores = rows[rows["table"] == "consistency"].set_index(["method", "critic", "metric"])["value"]
    assert scores["raw", "", "spread of skin"] > 0 and scores["own", "", "Diversity"] > 0
    minus = rows[(rows["table"] == "consistency, minus own") & (rows["critic"] == "independent")]
    gains = minus[minus["metric"] == "Text"].set_index("method")["value"]
    assert list(gains.index) == ["raw", "raw, seed 42", "raw, seed 43"]
    assert gains["raw"] == pytest.approx((gains.iloc[1] + gains.iloc[2]) / 2, abs=1e-4)
    judged = sweeps.judged_points(rows, "consistency")
    assert list(judged["point"]) == ["raw"] and judged["against"][0]
    shown = sweeps.compared(rows, "consistency")[0]
    assert set(shown["method"]) == {"raw"}, "each training alone is not in the figure"
    assert sweeps.plot_sweep(rows, "consistency").axes


@pytest.mark.slow
def test_rows_of_other_sweeps_stay_and_those_of_this_one_are_made_anew(swept):
    earlier = swept[0][swept[0]["method"] == "16"]
    assert sorted(earlier["table"]) == ["lora", "lora, minus 16"]


def test_a_missing_sweep_names_the_remedy(tmp_path):
    config = load_profile("mini", profile=str(tmp_path), adapters=str(tmp_path / "a" / "adapters"))
    with pytest.raises(FileNotFoundError, match="SWEEPS=1"):
        sweeps.kept_sweeps(config)


def test_a_conclusion_needs_more_than_another_seed_brings(monkeypatch):
    points = {"own": Point("own"), "a": Point("A"), "b": Point("B")}
    monkeypatch.setattr(sweeps, "SWEEPS", {"s": points})

    def row(table, method, value, low, high):
        cell = {"table": table, "method": method, "metric": "RFA", "critic": "independent"}
        return cell | {"value": value, "ci_low": low, "ci_high": high}

    rows = pd.DataFrame(
        [
            row("s, minus own", "a", 3.0, 1.0, 5.0),
            row("s, minus own", "b", 1.0, 0.5, 1.5),  # the faces show it, another seed as well
            row("seeds", "none, seed 43", 1.2, 0.0, 2.0),
        ]
    )
    said = sweeps.conclusion(rows, "s", ["RFA"])
    assert said.startswith("Exploratory (one training a point, intervals over faces).")
    assert said.endswith(
        "Differences to own that exclude 0 and exceed the other seeds: RFA: A +3.0."
    )


def test_command_line_lists_the_points(capsys):
    assert main(["sweeps", "--list", "--only", "attention"]) == 0
    assert "attention-decoupled" in capsys.readouterr().out


def test_the_front_of_recall_and_precision(monkeypatch):
    points = {name: Point(name.upper()) for name in "abcd"}
    monkeypatch.setattr(sweeps, "SWEEPS", {"long-tail": points})
    values = {"a": (50, 80, 80), "b": (60, 70, 74), "c": (55, 60, 80), "d": (60, 60, 80)}
    rows = pd.DataFrame(
        [
            {"table": "long-tail", "method": name, "metric": metric, "value": value}
            for name, (recall, ear, neck) in values.items()
            for metric, value in (
                ("RFA", recall),
                ("precision_ear_r", ear),
                ("precision_neck_l", neck),
                ("HFA", 90),
            )
        ]
    ).assign(critic="independent")
    trade = sweeps.rare_trade(rows, "long-tail").set_index("label")
    assert dict(trade["precision"]) == {"A": 80, "B": 72, "C": 70, "D": 70}
    assert list(trade.index[trade["front"]]) == ["A", "B"], "B has D's recall, more precision"
    assert sweeps.plot_sweep(rows, "long-tail").axes


def test_points_with_several_trainings_are_judged(monkeypatch):
    points = {"none": Point("none"), "own": Point("on own paths")}
    monkeypatch.setattr(sweeps, "SWEEPS", {"consistency": points})

    def row(table, method, metric, value, low=None, high=None):
        bounds = {"ci_low": low, "ci_high": high}
        return {"table": table, "method": method, "metric": metric, "value": value} | bounds

    rows = []
    for metric, gain in (("mIoU", 2.0), ("OAA", 1.0), ("HFA", 0.0), ("Text", 1.0)):
        rows.append(row("consistency", "none", metric, 50.0))
        rows.append(row("consistency", "own", metric, 50.0 + gain))
        for name in ("own", *(f"own, seed {k}" for k in (42, 43, 44))):
            low, high = gain - 0.5, gain + 0.5
            rows.append(row("consistency, minus none", name, metric, gain, low, high))
    for method, spread in (("none", 0.5), ("own", 0.5)):
        rows.append(row("consistency", method, "spread of skin", spread))
    frame = pd.DataFrame(rows).assign(critic="independent")
    assert sweeps.judged_points(frame, "consistency")["verdict"].tolist() == ["better"]
    assert "on own paths: better (in all)" in sweeps.conclusion(frame, "consistency")
    frame.loc[frame["metric"].eq("spread of skin") & frame["method"].eq("own"), "value"] = 0.4
    judged = sweeps.judged_points(frame, "consistency")
    assert judged["verdict"].tolist() == ["collapsed"]
    assert judged["against"][0] == "spread of skin is 20.0 % worse"
