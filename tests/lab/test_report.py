"""The report says what the tables say."""

from __future__ import annotations

import pandas as pd
import pytest

from ec2face_core.config import load_profile
from ec2face_lab.plots.save import save_table
from ec2face_lab.study import report
from ec2face_lab.study.report import Measured
from ec2face_lab.study.scores import ROLES
from ec2face_lab.study.summary import with_holm

LABELS = tuple(dict.fromkeys(claim.label for claim in report.CLAIMS))
OVERLAP = ("F1", "F1_HFA", "F1_RFA", "mIoU")
RARE = ("ear_r", "precision_ear_r", "f1_ear_r", "iou_ear_r")
METRICS = ("Text", "OAA", "HFA", "NFA", "RFA", *OVERLAP, "skin", "hair", *RARE)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "kept_sweeps", lambda config: (None, None))
    monkeypatch.setattr(report, "conclusion", lambda rows, sweep: f"what {sweep} says")
    return load_profile("mini", profile=str(tmp_path / "run"))


def rows(methods, value: float, half: float, seeds: str = "42-43") -> pd.DataFrame:
    cell = {"value": value, "ci_low": value - half, "ci_high": value + half}
    cell |= {"dataset": "faces", "n": 300, "seeds": seeds}
    return pd.DataFrame(
        [
            {"method": method, "metric": metric, "critic": critic} | cell
            for method in methods
            for metric in METRICS
            for critic in ROLES
        ]
    )


def save_tables(config, value: float = 2.0, f1: float | None = None) -> None:
    table = rows(LABELS, value, 1.0)
    if f1 is not None:
        other = rows(LABELS, f1, 1.0)
        of_f1 = table["metric"].str.startswith("F1")
        table = pd.concat([table[~of_f1], other[other["metric"].str.startswith("F1")]])
    save_table(with_holm(table.reset_index(drop=True)), "ablation_differences", config)
    alone = [f"{label}, seed {seed}" for label in LABELS for seed in (42, 43)]
    save_table(rows(alone, 1.5, 1.0), "ablation_seeds", config)
    edits = rows(["dilated"], 30, 1), rows(["as parsed"], 35, 1)
    save_table(pd.concat(edits), "hand_drawn", config)
    for name in ("table1", "table2"):
        parts = (rows(["EC2Face"], 40, 2), rows(["real"], 80, 2))
        save_table(pd.concat(parts), name, config)


def test_verdicts():
    holds = Measured(1.0, 0.1, 2.0, (0.5, 1.5))
    some = Measured(1.0, 0.1, 2.0, (-0.5, 2.5))
    unclear = Measured(1.0, -0.1, 2.0)
    below = Measured(-1.0, -2.0, -0.1)
    assert report.verdict([holds]) == "holds"
    assert report.verdict([some]) == "not for every seed"
    assert report.verdict([unclear]) == "inconclusive"
    assert report.verdict([below]) == "does not hold"
    assert report.verdict([Measured(-0.2, -0.4, 0.0)], bound=-0.5) == "holds"
    assert report.verdict([Measured(-0.7, -0.8, -0.6)], bound=-0.5) == "does not hold"
    assert report.verdict([holds, holds], p=0.04) == "holds"
    assert report.verdict([holds, holds], p=0.06) == "not after Holm's adjustment"
    assert report.verdict([holds, unclear]) == "in recall only; F1: inconclusive"
    assert report.verdict([below, holds]) == "in F1 only; recall: does not hold"
    assert report.verdict([unclear, below]) == "does not hold"
    assert report.verdict([some, unclear]) == "inconclusive"


def test_leads_stand_beside_the_paper_s(config):
    save_tables(config)
    assert "No system has pictures" in report.report(config)
    behind = rows(["EC²Face - TediGAN"], -2.0, 1.0)
    save_table(pd.concat([rows(["EC²Face - UaC"], 2.0, 1.0), behind]), "table1_lead", config)
    lines = [line for line in report.report(config).splitlines() if "paper +" in line]
    assert lines[0].startswith("| UaC |") and lines[1].startswith("| TediGAN |")
    assert f"F1_RFA +2.00 [+1.00, +3.00], paper {62.78 - 18.19:+.2f}: holds" in lines[0]
    assert f"paper {62.78 - 0.61:+.2f}: does not hold" in lines[1]


def test_the_paper_s_differences_are_its_tables(config):
    paper = report.paper_differences().set_index(["method", "metric"])["value"]
    assert paper["with LTAL - without", "RFA"] == pytest.approx(61.12 - 52.04)
    assert paper["mask - none", "OAA"] == pytest.approx(88.59 - 87.64)
    assert paper["text - none", "Text"] == pytest.approx(27.22 - 26.12)


def test_the_report_says_what_the_tables_say(config):
    save_tables(config)
    text = report.save_report(config).read_text()
    line = next(line for line in text.splitlines() if "lifts the rare attributes" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    interval = "+2.00 [+1.00, +3.00]"
    assert cells[1:] == ["RFA", "+9.08", interval, "–", "+1.50, +1.50", interval, "holds"]
    assert f"|  | F1_RFA |  | {interval} | – | +1.50, +1.50 | {interval} |  |" in text
    assert f"| earring | {interval} | {interval} | {interval} | {interval} |" in text
    assert "Intervals are over faces; the trainings are held fixed." in text
    assert "| test | mIoU | 40.00 [38.00, 42.00] | 80.00 | 50 % |" in text
    assert "| test | RFA | 40.00 [38.00, 42.00] | 80.00 | 50 % |" in text
    assert "every edit keeps: 35.0 with parsed masks, at worst 30.0 (dilated)" in text
    assert "what beta says" in text and "OAA 40.0 on the zero-shot faces" in text
    assert "300 test faces, training seeds 42-43" in text
    save_tables(config, value=-2.0)
    assert report.report(config).count("does not hold") == len(report.CLAIMS)
    save_tables(config, f1=0.5)
    in_attributes = sum(claim.metric != "Text" for claim in report.CLAIMS)
    said = report.report(config)
    # F1 is above the bound of one claim, -0.5, but not above 0
    assert said.count("in recall only; F1: inconclusive |") == in_attributes


def test_accessories_that_are_found_stand_in_the_report(config):
    save_tables(config)
    assert "without LTAL |" not in report.report(config)
    found = rows(["without_ltal", "with_ltal", "real"], 30.0, 5.0)
    kinds = {"skin": "presence_ear_r", "hair": "false_presence_ear_r", "OAA": "presence_neck_l",
             "RFA": "false_presence_neck_l"}  # fmt: skip
    found = found[found["metric"].isin(kinds)].replace({"metric": kinds})
    save_table(found, "presence_ltal", config)
    assert "| necklace | 30.0, 30.0 | 30.0, 30.0 | 30.0, 30.0 |" in report.report(config)


def test_a_table_that_is_missing_is_named(config):
    with pytest.raises(FileNotFoundError, match=r'ablation_differences\.csv.*ONLY="06 07 12"'):
        report.report(config)
