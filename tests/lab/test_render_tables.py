"""Tables in Markdown and LaTeX: the paper beside ours, footnotes, escapes."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from figure_checks import some_rows

from ec2face_core.config import load_profile
from ec2face_lab.plots.save import save_table


@pytest.fixture
def config(tmp_path):
    return load_profile("mini", profile=str(tmp_path / "run"), evaluation={"lpips": "alex"})


def cells(markdown: str, start: str) -> list[str]:
    """The cells of the first Markdown line that starts with a text."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_puts_the_paper_beside_ours(config):
    markdown = save_table(some_rows(), "table1", config, caption="Substitutes.").read_text()
    assert markdown.startswith("**Table 1.** Substitutes.")
    header = cells(markdown, "Method")
    mine = cells(markdown, "EC²Face")
    row = dict(zip(header, mine, strict=True))
    assert row["Critic"] == "independent" and row["n"] == "300"
    assert row["OAA (%) ↑"] == "71.23 [70.50, 72.00]" and row["paper: OAA"] == "88.64"
    assert row["LPIPS ↓"] == "0.314" and row["paper: NIQE"] == "3.55"
    assert "HFA (%) ↑" not in row and "paper: HFA" in row, "a column of dashes says nothing"
    other = dict(zip(header, cells(markdown, " | guiding"), strict=True))
    assert other["OAA (%) ↑"] == "76.50" and other["paper: OAA"] == "" and other["LPIPS ↓"] == "–"
    rival = dict(zip(header, cells(markdown, "TediGAN"), strict=True))
    assert rival["OAA (%) ↑"] == "–" and rival["paper: OAA"] == "66.58"
    assert cells(markdown, "earring") == ["earring", "RFA", "80", "55.50"]
    order = [markdown.index(name) for name in ("TediGAN", "MM2Latent", "EC²Face", "real images")]
    assert order == sorted(order)


def test_latex_is_escaped_and_complete(config):
    path = save_table(some_rows(), "table4", config, caption="100 % of a_b.")
    latex = path.with_suffix(".tex").read_text()
    assert r"100 \% of a\_b." in latex and r"\label{tab:table4}" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert not re.search(r"(?<!\\)[%_]", latex) and not set("²↑↓–") & set(latex)
    for block in re.findall(r"\\toprule\n(.*?)\\bottomrule", latex, re.S):
        counts = {line.count("&") for line in block.splitlines() if line.endswith(r"\\")}
        assert len(counts) == 1


def test_the_misprint_of_table_4_is_flagged(config):
    markdown = save_table(some_rows(method="none", metric="OAA").head(1), "table4", config)
    assert "61.62" in markdown.read_text() and "require 61.12" in markdown.read_text()


def test_notes_say_what_the_brackets_are_over(config):
    alone = save_table(some_rows(), "table1", config).read_text()
    assert "interval over faces (trainings held fixed)" in alone
    rows = some_rows()
    rows.loc[0, ["joint_low", "joint_high", "p_holm"]] = [69.5, 73.0, 0.04]
    text = save_table(rows, "table1", config)
    latex = text.with_suffix(".tex").read_text()
    text = text.read_text()
    assert "| 71.23 [69.50, 73.00] † |" in text and r"$\dagger$" in latex
    assert "interval over faces and trainings; –" in text and "after Holm's adjustment" in text
    rows = some_rows(ci_low=1.0, ci_high=2.0).assign(joint_low=[0.5] + 4 * [None])
    text = save_table(rows.assign(joint_high=rows["joint_low"] + 2), "d", config).read_text()
    assert "faces and trainings, or over faces alone where there is one training" in text


def test_f1_stands_beside_recall_and_the_rest_below(config):
    more = some_rows().head(1)
    names = ("F1", "mIoU", "F1_RFA", "KID", "Diversity", "presence_hat", "false_presence_hat")
    rows = pd.concat([some_rows(), *(more.assign(metric=name) for name in names)])
    blocks = save_table(rows, "table1", config).read_text().split("\n\n")
    heads = [block.splitlines()[0] for block in blocks if block.startswith("| ")]
    assert "| OAA (%) ↑ | F1 (%) ↑ | mIoU (%) ↑ |" in heads[0]
    assert heads[1] == "| Method | Critic | n | F1 of RFA (%) ↑ | KID ↓ | Diversity |"
    assert heads[2].endswith(
        "| hat found where the mask has it (%) | hat found where it has none (%) |"
    )
    assert heads[3].startswith("| Class")
    assert "| 71.23 of 300 [70.50, 72.00] | 71.23 of 300 [70.50, 72.00] |" in blocks[3]


def test_other_tables_have_no_paper_columns(config):
    text = save_table(some_rows(), "ablation_differences", config).read_text()
    assert text.startswith("**Ablation differences.**") and "paper" not in text


HOSTILE = r"a|b_$x$ <script> \input{/etc/passwd} ~^#&% [link](http://x)"


def test_names_of_folders_are_data(config):
    """The method of `evaluate --images DIR` is a folder's name."""
    rows = some_rows().head(3).assign(method=HOSTILE, source="ours")
    path = save_table(rows, "evaluation", config)
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(columns) == 1
    markdown = path.read_text()
    assert r"a\|b\_" in markdown and r"\<script\>" in markdown and r"\[link\](" in markdown
    latex = path.with_suffix(".tex").read_text()
    assert r"\textbackslash{}input\{/etc/passwd\}" in latex and r"\input{" not in latex
    assert r"\$x\$" in latex and r"\textasciitilde{}\textasciicircum{}\#\&\%" in latex
