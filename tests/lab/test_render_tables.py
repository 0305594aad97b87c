"""Tables in Markdown and LaTeX: the paper beside ours, footnotes, escapes."""

from __future__ import annotations

import re

import pytest
from figure_checks import some_rows

from ec2face_core.config import load_profile
from ec2face_lab.plots.save import save_table


@pytest.fixture
def config(tmp_path):
    return load_profile("mini", profile=str(tmp_path / "run"))


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
    assert row["LPIPS ↓"] == "0.314" and row["HFA (%) ↑"] == "–" and row["paper: NIQE"] == "3.55"
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
