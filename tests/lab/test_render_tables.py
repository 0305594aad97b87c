"""Tables in Markdown and LaTeX: the paper beside ours, footnotes, escapes."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from figure_checks import some_rows

from ec2face_core.config import load_profile
from ec2face_lab.plots.render_tables import decimals
from ec2face_lab.plots.save import save_table


@pytest.fixture
def config(tmp_path):
    return load_profile("mini", profile=str(tmp_path / "run"), evaluation={"lpips": "alex"})


def blocks(markdown: str) -> dict[str, list[list[str]]]:
    """Title ('' for the first) -> lines of cells, the header first, of each table."""
    found = {}
    title = ""
    for part in markdown.split("\n\n")[1:]:
        if part.startswith("| "):
            lines = [line.strip("|").split("|") for line in part.splitlines()]
            found[title] = [
                [cell.strip() for cell in line] for line in lines if "---" not in line[0]
            ]
        title = part
    return found


def row(block: list[list[str]], start: str) -> dict[str, str]:
    """The line of a table whose first cell starts with a text, by heading."""
    line = next(line for line in block if line[0].startswith(start))
    return dict(zip(block[0], line, strict=True))


def test_one_value_a_cell_and_the_paper_the_intervals_and_the_guides_apart(config):
    markdown = save_table(some_rows(), "table1", config, caption="There are 300 faces.").read_text()
    assert markdown.startswith("**Table 1.** EC²Face and the comparison systems are scored")
    tables = blocks(markdown)
    mine = row(tables[""], "EC²Face")
    assert mine == {"Method": "EC²Face (ours)", "OAA (%) ↑": "71.2", "LPIPS ↓": "0.31"}
    assert row(tables[""], "n")["OAA (%) ↑"] == "300"
    assert [line[0] for line in tables[""]] == [
        "Method",
        "EC²Face (ours)",
        "real images (ceiling)",
        "n",
    ]
    paper = tables["The paper's numbers, at its own scale."]
    assert (
        row(paper, "EC²Face")["OAA (%) ↑"] == "88.64" and row(paper, "EC²Face")["NIQE ↓"] == "3.55"
    )
    assert row(paper, "TediGAN")["OAA (%) ↑"] == "66.58"
    intervals = tables["95 % intervals of the first table."]
    assert row(intervals, "EC²Face")["OAA (%) ↑"] == "[70.50, 72.00]"
    guides = tables["Scored by the guiding models, which training optimises."]
    assert row(guides, "EC²Face")["OAA (%) ↑"] == "76.5"
    classes = tables["Recall of each class in percent."]
    assert row(classes, "earring") == {
        "Class": "earring", "Group": "RFA", "n": "80", "EC²Face (ours)": "55.5"
    }  # fmt: skip
    order = [line[0] for line in paper[1:]]
    assert order[0] == "TediGAN" and order[-1] == "EC²Face (ours)"


@pytest.mark.parametrize(
    ("half", "places"), [(0.72, 2), (5.0, 1), (34.0, 0), (0.034, 3), (1.0, 1), (0.0, 2), (1e-9, 5)]
)
def test_an_interval_says_how_many_digits_are_significant(half, places):
    assert decimals(half) == places
    if 0 < half < 1e3 and places < 5:
        assert 10 <= half * 10**places < 100


def test_differences_have_a_sign_and_digits_of_their_own(config):
    rows = some_rows().head(1).assign(source="ours", critic="independent")
    wide = rows.assign(method="a - b", value=13.16, ci_low=10.25, ci_high=16.98)
    narrow = rows.assign(method="c - b", value=-0.0004, ci_low=-0.0006, ci_high=-0.0002)
    text = save_table(pd.concat([wide, narrow]), "ablation_differences", config).read_text()
    assert "| a - b | +13.2 |" in text and "| c - b | -0.00040 |" in text
    assert "| a - b | [10.2, 17.0] |" in text and "-0.000 " not in text


def test_latex_is_escaped_and_complete(config):
    path = save_table(some_rows(), "table4", config, caption="100 % of a_b.")
    latex = path.with_suffix(".tex").read_text()
    assert r"100 \% of a\_b." in latex and r"\label{tab:table4}" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 5
    assert not re.search(r"(?<!\\)[%_]", latex) and not set("²↑↓–") & set(latex)
    for block in re.findall(r"\\toprule\n(.*?)\\bottomrule", latex, re.S):
        counts = {line.count("&") for line in block.splitlines() if line.endswith(r"\\")}
        assert len(counts) == 1


def test_the_misprint_of_table_4_is_flagged(config):
    markdown = save_table(some_rows(method="none", metric="OAA").head(1), "table4", config)
    assert "61.62" in markdown.read_text() and "require 61.12" in markdown.read_text()


def test_notes_say_what_the_intervals_are_over(config):
    alone = save_table(some_rows(), "table1", config).read_text()
    assert "The intervals are over faces, with the trainings held fixed" in alone
    rows = some_rows()
    rows.loc[0, ["joint_low", "joint_high", "p_holm"]] = [69.5, 73.0, 0.04]
    text = save_table(rows, "table1", config)
    latex = text.with_suffix(".tex").read_text()
    text = text.read_text()
    assert "| 71.2 † |" in text and r"$\dagger$" in latex and "| [69.5, 73.0] |" in text
    assert "are over faces and trainings;" in text and "after Holm's adjustment" in text
    rows = some_rows(ci_low=1.0, ci_high=2.0).assign(joint_low=[0.5] + 4 * [None])
    text = save_table(rows.assign(joint_high=rows["joint_low"] + 2), "d", config).read_text()
    assert "faces and trainings, or over faces alone where there is one training" in text


def test_f1_stands_beside_recall_and_the_rest_below(config):
    more = some_rows().head(1)
    names = ("F1", "mIoU", "F1_RFA", "KID", "Diversity", "presence_hat", "false_presence_hat")
    rows = pd.concat([some_rows(), *(more.assign(metric=name) for name in names)])
    tables = blocks(save_table(rows, "table1", config).read_text())
    assert tables[""][0][:4] == ["Method", "OAA (%) ↑", "F1 (%) ↑", "mIoU (%) ↑"]
    further = ["Method", "F1 of RFA (%) ↑", "KID ↓", "Diversity"]
    assert tables["Further scores."][0] == further
    found = tables["How often a class is found."]
    assert found[0] == ["Method", "hat where the mask has it (%)", "hat where it has none (%)"]
    assert row(found, "n")["hat where it has none (%)"] == "300"


def test_other_tables_have_no_numbers_of_the_paper(config):
    text = save_table(some_rows(), "ablation_differences", config).read_text()
    assert text.startswith("Variants differ in one part;") and "paper" not in text


HOSTILE = r"a|b_$x$ <script> \input{/etc/passwd} ~^#&% [link](http://x)"


def test_names_of_folders_are_data(config):
    """The method of `evaluate --images DIR` is a folder's name."""
    rows = some_rows().head(3).assign(method=HOSTILE, source="ours")
    path = save_table(rows, "evaluation", config)
    for block in path.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1
    markdown = path.read_text()
    assert r"a\|b\_" in markdown and r"\<script\>" in markdown and r"\[link\](" in markdown
    latex = path.with_suffix(".tex").read_text()
    assert r"\textbackslash{}input\{/etc/passwd\}" in latex and r"\input{" not in latex
    assert r"\$x\$" in latex and r"\textasciitilde{}\textasciicircum{}\#\&\%" in latex
