"""Verdicts, and what tables say about each claim of the paper."""

from __future__ import annotations

import pandas as pd
import pytest

from ec2face_core.config import load_profile
from ec2face_lab.baselines import PAPER
from ec2face_lab.plots.save import save_table
from ec2face_lab.study.agreement import compare, distances
from ec2face_lab.study.claims import CLAIMS, DIFFERENCES, judged, leads, paper_differences
from ec2face_lab.study.verdicts import Measured, Results, interval, verdict

KEYS = {claim.key for claim in CLAIMS}
METRICS = ("Text", "OAA", "HFA", "NFA", "RFA", "F1", "F1_HFA", "F1_NFA", "F1_RFA", "NIQE", "LPIPS")
LABELS = tuple(dict.fromkeys(item.label for item in DIFFERENCES.values()))


@pytest.fixture
def config(tmp_path, monkeypatch):
    config = load_profile("mini", profile=str(tmp_path / "run"))
    monkeypatch.setattr(type(config), "published_dir", tmp_path / "published")
    return config


def rows(methods, value: float, half: float = 1.0, metrics=METRICS, **columns) -> pd.DataFrame:
    cell = {"value": value, "ci_low": value - half, "ci_high": value + half, "n": 300}
    cell |= {"dataset": "faces", "critic": "independent", "seeds": "42"} | columns
    return pd.DataFrame(
        [{"method": method, "metric": metric} | cell for method in methods for metric in metrics]
    )


def save_everything(config, gain: float = 2.0) -> None:
    """Tables in which EC²Face gains as much in every difference, and is lower in NIQE and LPIPS."""
    save_table(rows(LABELS, gain), "ablation_differences", config)
    alone = [f"{label}, seed {seed}" for label in LABELS for seed in (42, 43)]
    save_table(rows(alone, gain), "ablation_seeds", config)
    minus = [f"EC²Face - {name}" for name in PAPER]
    lead = rows(minus, gain)
    lower = lead["metric"].isin(["NIQE", "LPIPS"])
    lead.loc[lower, ["value", "ci_low", "ci_high"]] = (-gain, -gain - 1, -gain + 1)
    for name in ("table1", "table2"):
        save_table(lead, f"{name}_lead", config)
    ours, others = rows(["EC2Face"], 60 + gain), rows(list(PAPER), 30.0)
    save_table(pd.concat([ours, others]), "table1", config)


def test_verdicts():
    holds = Measured(1.0, 0.1, 2.0, (0.5, 1.5))
    some = Measured(1.0, 0.1, 2.0, (-0.5, 2.5))
    unclear = Measured(1.0, -0.1, 2.0)
    below = Measured(-1.0, -2.0, -0.1)
    assert verdict([holds]) == "holds"
    assert verdict([some]) == "not for every seed"
    assert verdict([unclear]) == "inconclusive"
    assert verdict([below]) == "does not hold"
    assert verdict([Measured(-0.2, -0.4, 0.0)], bound=-0.5) == "holds"
    assert verdict([Measured(-0.7, -0.8, -0.6)], bound=-0.5) == "does not hold"
    assert verdict([holds, holds], p=0.04) == "holds"
    assert verdict([holds, holds], p=0.06) == "not after Holm's adjustment"
    assert verdict([holds, unclear]) == "in recall only; F1: inconclusive"
    assert verdict([below, holds]) == "in F1 only; recall: does not hold"
    assert verdict([unclear, below]) == "does not hold"
    assert verdict([some, unclear]) == "inconclusive"


def test_intervals_show_significant_digits():
    assert interval(Measured(13.16, 10.25, 16.98)) == "+13.2 [10.2, 17.0]"
    assert interval(Measured(83.2, 82.51, 83.95), sign=False) == "83.20 [82.51, 83.95]"
    assert interval(Measured(-0.0004, -0.0006, -0.0002)) == "-0.00040 [-0.00060, -0.00020]"


def test_the_paper_s_differences_are_its_tables():
    paper = paper_differences().set_index(["method", "metric"])["value"]
    assert paper["with LTAL - without", "RFA"] == pytest.approx(61.12 - 52.04)
    assert paper["mask - none", "OAA"] == pytest.approx(88.59 - 87.64)
    assert paper["text - none", "Text"] == pytest.approx(27.22 - 26.12)
    numbers = {claim.key: claim.paper for claim in CLAIMS}
    assert numbers["lead-rare"] == f"RFA {62.78 - 33.40:+.2f}"
    assert numbers["quality-niqe"] == f"NIQE {3.55 - 3.74:+.2f}"
    assert numbers["most-metrics"] == "6 of 7"  # its LPIPS is 0.51, TediGAN's 0.49


def test_gains_everywhere_uphold_every_claim_that_the_tables_can_judge(config):
    save_everything(config)
    answers = judged(Results(config, config.figure_dir))
    said = {key: answer.verdict for key, answer in answers.items()}
    assert said.pop("parameters") == "does not hold"  # of the miniature's small base
    assert said.pop("quality-lpips") == "not tested"
    assert set(said.values()) == {"holds"} and len(said) == 20
    best = answers["lead-rare"].ours
    assert best.startswith("RFA +2.0 [1.0, 3.0], F1 +2.0") and "best other" in best


def test_losses_everywhere_refute_them(config):
    save_everything(config, gain=-40.0)
    said = {k: a.verdict for k, a in judged(Results(config, config.figure_dir)).items()}
    assert "holds" not in said.values()
    assert said["lead-rare"] == "does not hold: it leads 0 of 6"
    assert said["both-all"] == said["doubles-rare"] == "does not hold"


def test_niqe_is_better_when_lower(config):
    save_everything(config)
    results = Results(config, config.figure_dir)
    assert leads(results, "table1_lead", "NIQE")["UaC"].verdict == "holds"
    assert leads(results, "table1_lead", "NIQE")["UaC"].cells["NIQE"].value == -2.0
    assert leads(results, "table1_lead", "OAA")["UaC"].verdict == "holds"


def test_what_no_table_shows_is_not_judged(config):
    assert set(judged(Results(config, config.figure_dir))) == {"parameters", "quality-lpips"}


def one_condition(config, low: float) -> None:
    alone = rows(["both"], low + 1, metrics=["OAA, mask alone", "Text, text alone"])
    save_table(alone, "one_condition", config)


def test_one_condition(config):
    save_everything(config)
    results = lambda c: judged(Results(c, c.figure_dir))  # noqa: E731
    one_condition(config, low=60.0)  # 95 % of 62 are 58.9
    assert results(config)["mask-alone"].verdict == "holds"
    one_condition(config, low=50.0)
    assert results(config)["mask-alone"].verdict == "does not hold"
    assert "the pictures are the base model's" in results(config)["text-alone"].ours
    everywhere = config.replace(lora={"tokens": "all"})
    assert results(everywhere)["text-alone"].verdict == "does not hold"


# ------------------------------------------------------------------- against what is published


def test_a_run_is_compared_with_what_is_published(config):
    assert "nothing is published" in compare(config).text
    save_everything(config)
    config.figure_dir.rename(config.published_dir)
    save_everything(config)
    same = compare(config)
    cells = distances(config)
    assert len(cells) == sum(len(pd.read_csv(p).query("source == 'ours'")) for p in
                             config.figure_dir.glob("*.csv"))  # fmt: skip
    assert (cells["distance"] == 0).all() and not same.changed
    assert "verdicts: 22 of 22 are the published ones" in same.text


def test_distances_are_shares_of_the_interval_and_changed_verdicts_are_named(config):
    save_everything(config)
    config.figure_dir.rename(config.published_dir)
    save_everything(config)
    save_table(pd.concat([rows(["EC2Face"], 62.3), rows([*PAPER], 30.0)]), "table1", config)
    cells = distances(config).query("table == 'table1' and method == 'EC2Face'")
    assert cells["distance"].to_numpy() == pytest.approx(0.3)  # half an interval is 1 point
    said = compare(config)
    assert not said.changed and "largest difference in points: 0.30 (table1, EC2Face" in said.text
    assert f"within 50%   {len(METRICS):8,}" in said.text
    save_table(rows(LABELS, 0.5), "ablation_differences", config)
    found = compare(config)
    assert found.changed["ltal-rare"] == ("holds", "inconclusive")
    assert "CHANGED  Long-tail learning raises the accuracy of rare attributes." in found.text
    assert f"further      {len(METRICS) * len(LABELS):8,}" in found.text
    assert "    ablation_differences, " in found.text


def test_cells_without_an_interval_are_compared_by_value(config):
    bare = rows(["EC2Face"], 50.0).assign(ci_low=None, ci_high=None)
    save_table(bare, "table1", config)
    config.figure_dir.rename(config.published_dir)
    save_table(bare.assign(value=50.25), "table1", config)
    assert distances(config)["distance"].to_numpy() == pytest.approx(0.5)


def test_cells_of_one_side_are_counted(config):
    save_everything(config)
    config.figure_dir.rename(config.published_dir)
    save_everything(config)
    save_table(rows(LABELS[:-1], 2.0), "ablation_differences", config)
    assert f"in one only  {len(METRICS):8,}" in compare(config).text
