"""The report says what the tables say."""

from __future__ import annotations

import pandas as pd
import pytest

from ec2face_core.config import load_profile
from ec2face_lab.plots.save import save_table
from ec2face_lab.study import report
from ec2face_lab.study.claims import CLAIMS, DIFFERENCES
from ec2face_lab.study.scores import ROLES
from ec2face_lab.study.summary import with_holm
from ec2face_lab.study.sweeps import MINUS, SWEEPS

LABELS = tuple(dict.fromkeys(item.label for item in DIFFERENCES.values()))
METRICS_OF_SWEEPS = ("RFA", "OAA", "HFA", "Text")
OVERLAP = ("F1", "F1_HFA", "F1_RFA", "mIoU")
RARE = ("ear_r", "precision_ear_r", "f1_ear_r", "iou_ear_r")
METRICS = ("Text", "OAA", "HFA", "NFA", "RFA", *OVERLAP, "skin", "hair", *RARE)


@pytest.fixture
def config(tmp_path):
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


def test_leads_stand_beside_the_paper_s(config):
    save_tables(config)
    assert "No system has pictures" in report.report(config)
    behind = rows(["EC²Face - TediGAN"], -2.0, 1.0)
    save_table(pd.concat([rows(["EC²Face - UaC"], 2.0, 1.0), behind]), "table1_lead", config)
    lines = [line for line in report.report(config).splitlines() if "paper +" in line]
    assert lines[0].startswith("| UaC |") and lines[1].startswith("| TediGAN |")
    assert f"F1 +2.0 [1.0, 3.0], paper {62.78 - 18.19:+.2f}: holds" in lines[0]
    assert f"paper {62.78 - 0.61:+.2f}: does not hold" in lines[1]


def test_the_report_says_what_the_tables_say(config):
    save_tables(config)
    text = report.save_report(config).read_text()
    interval = "+2.0 [1.0, 3.0]"
    line = next(line for line in text.splitlines() if "accuracy of rare attributes." in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        "abstract, Table 3", "RFA +9.08", f"RFA {interval}, F1 {interval}", "holds"
    ]  # fmt: skip
    label = "with LTAL - without"
    assert f"| {label} | RFA | {interval} | – | +1.50, +1.50 | {interval} |" in text
    assert f"| earring | {interval} | {interval} | {interval} | {interval} |" in text
    assert "| test | mIoU | 40.0 [38.0, 42.0] | 80.0 | 50 % |" in text
    assert "every edit keeps, accuracy is 35.0 with masks as parsed, and falls to 30.0" in text
    assert "OAA is 40.0 on the zero-shot faces" in text
    assert "300 test faces" in text and "seeds 42-43" in text


def test_every_part_of_the_paper_that_claims_something_is_in_the_report(config):
    save_tables(config)
    text = report.report(config)
    for where in ("abstract", "Sec. 3.5", "Sec. 4.2", "Sec. 4.3", "Sec. 4.4", "App. C", "App. D"):
        assert where in text
    for claim in CLAIMS:
        assert claim.statement in text and claim.statement.endswith(".")


def test_accessories_that_are_found_stand_in_the_report(config):
    save_tables(config)
    assert "without LTAL |" not in report.report(config)
    found = rows(["without_ltal", "with_ltal", "real"], 30.0, 5.0)
    kinds = {"skin": "presence_ear_r", "hair": "false_presence_ear_r", "OAA": "presence_neck_l",
             "RFA": "false_presence_neck_l"}  # fmt: skip
    found = found[found["metric"].isin(kinds)].replace({"metric": kinds})
    save_table(found, "presence_ltal", config)
    cell = "30 where it is, 30 where it is not"
    assert f"| necklace | {cell} | {cell} | {cell} |" in report.report(config)


def test_sweeps_are_answered_in_sentences():
    reference, *others = SWEEPS["dropout"]
    cell = {"source": "ours", "critic": "independent", "n": 200}

    def difference(name, metric, value):
        cells = cell | {"table": f"dropout, {MINUS.format(reference)}", "method": name}
        bounds = {"ci_low": value - 1, "ci_high": value + 1}
        return cells | {"metric": metric, "value": value} | bounds

    rows = pd.DataFrame(
        [difference(name, metric, 3.0 if name == others[0] and metric == "OAA" else 0.1)
         for name in others for metric in METRICS_OF_SWEEPS]
    )  # fmt: skip
    label = SWEEPS["dropout"][others[0]].label
    said = report.sweep_answer(rows, "dropout")
    assert said.endswith(f"OAA changes by +3.0 with “{label}”.")
    assert "No setting differs" in report.sweep_answer(rows.assign(ci_low=-9.0), "dropout")
    assert "SWEEPS=1" in report.sweep_answer(rows[:0], "dropout")


def test_a_table_that_is_missing_is_named(config):
    with pytest.raises(FileNotFoundError, match=r"ablation_differences\.csv is missing: `make rep"):
        report.report(config)
