"""data/paper/table1.csv ... table4.csv: complete, in the long form, consistent in themselves."""

from __future__ import annotations

import pytest

from ec2face_core.attributes import GROUPS, NUM_CLASSES
from ec2face_lab.plots.render_tables import METHODS
from ec2face_lab.plots.save import COLUMNS, paper_table

METHODS_OF = {
    1: ["TediGAN", "UaC", "PixelFace+", "CoDiffusion", "ControlNeXt", "MM2Latent", "EC2Face"],
    2: ["TediGAN", "UaC", "PixelFace+", "CoDiffusion", "ControlNeXt", "MM2Latent", "EC2Face"],
    3: ["without_ltal", "with_ltal"],
    4: ["none", "mask", "text", "both"],
}
METRICS_OF = {
    1: ["Text", "OAA", "HFA", "NFA", "RFA", "LPIPS", "NIQE"],
    2: ["Text", "OAA", "HFA", "NFA", "RFA", "LPIPS", "NIQE"],
    3: ["OAA", "HFA", "NFA", "RFA"],
    4: ["Text", "OAA", "HFA", "NFA", "RFA"],
}
# Rows whose printed OAA is not the mean of 19 per-class accuracies, with what the mean would be.
EXCEPTIONS = {(1, "PixelFace+"): 82.098, (4, "none"): 87.699, (4, "text"): 87.459}


def wide(number: int):
    """Methods down, metrics across."""
    return paper_table(number).pivot(index="method", columns="metric", values="value")


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_cell_of_the_printed_table_is_there_once(number):
    table = paper_table(number)
    assert list(table.columns) == list(COLUMNS)
    assert list(dict.fromkeys(table["method"])) == METHODS_OF[number]
    assert list(dict.fromkeys(table["metric"])) == METRICS_OF[number]
    assert len(table) == len(METHODS_OF[number]) * len(METRICS_OF[number])
    assert not table.duplicated(["method", "metric"]).any()
    assert set(table["table"]) == {f"table{number}"} and set(table["source"]) == {"paper"}
    assert set(table["dataset"]) == {"MM-FFHQ" if number == 2 else "MM-CelebA-HQ"}
    assert set(table["critic"]) == {""} and table[["ci_low", "ci_high", "n"]].isna().all(None)
    assert set(table["method"]) <= set(METHODS)


def test_oaa_is_the_mean_over_19_classes_except_where_listed():
    weight = {group: len(ids) / NUM_CLASSES for group, ids in GROUPS.items()}
    found = {}
    for number in METHODS_OF:
        for method, row in wide(number).iterrows():
            mean = sum(weight[group] * row[group] for group in GROUPS)
            # OAA and the groups are each rounded to 0.005
            if abs(mean - row["OAA"]) > 0.01 + 1e-9:
                found[number, method] = mean
    assert found == pytest.approx(EXCEPTIONS, abs=1e-3)


def test_tables_agree_where_they_print_the_same_system():
    both, main = wide(4).loc["both"], wide(1).loc["EC2Face"]
    assert all(both[metric] == main[metric] for metric in METRICS_OF[4])
    none, ltal = wide(4).loc["none"], wide(3).loc["with_ltal"]
    assert [none[m] - ltal[m] for m in ("OAA", "HFA", "NFA")] == [0, 0, 0]
    assert (none["RFA"], ltal["RFA"]) == (61.62, 61.12)  # the misprint, kept as printed
    gain = ltal["RFA"] - wide(3).loc["without_ltal", "RFA"]
    assert gain == pytest.approx(9.08)  # printed in brackets
