"""README and docs: short, linked, in step with the published numbers, and their lines run."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ec2face_core.config import load_profile
from ec2face_core.io.paths import ROOT
from ec2face_lab.publish import sha256
from ec2face_lab.study.pages import GALLERY, MANIFEST, PAGES, PART, filled

README = (ROOT / "README.md").read_text()
OWN_PAGES = (
    "README.md",
    "data/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
PUBLISHED = ROOT / "figures" / "mini"


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# ---------------------------------------------------------------------------------------- README


def test_readme_is_short():
    text = re.sub(r"<!--.*?-->|```.*?```", "", README, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    assert len(text.split()) <= 1200


def test_readme_lists_every_notebook_in_order():
    linked = re.findall(r"\]\(notebooks/([^)]+)\)", README)
    assert linked == sorted(path.name for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("page", OWN_PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.slow
def test_readme_s_lines_run(tmp_path):
    """The miniature's lines in the smoke profile, then the Python blocks, in one folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = [line for block in blocks("sh") for line in block.splitlines() if "ec2face" in line]
    assert len(lines) == 1 and len(blocks("python")) == 2
    for line in lines:
        command = line.replace("--profile mini", "--profile smoke").split()
        assert command[0] == "python"
        subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, env=environment, check=True)
    program = "\n".join(blocks("python")).replace('load_profile("mini"', 'load_profile("smoke"')
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (tmp_path / "face.png").stat().st_size > 1000
    assert "OAA" in done.stdout


def test_readme_s_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"`?make ([a-z]+)", README)
    assert named and set(named) <= targets


# -------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize("page", PAGES)
def test_numbers_in_the_pages_are_the_published_ones(page):
    text = (ROOT / page).read_text()
    assert PART.search(text)
    assert filled(text, load_profile("mini")) == text, "`python -m ec2face_lab publish --pages`"


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="no numbers are called 'nothing'"):
        filled("<!-- numbers: nothing -->\n<!-- end of numbers -->", load_profile("mini"))


def test_published_files_are_those_of_the_manifest():
    files = json.loads((PUBLISHED / MANIFEST).read_text())["files"]
    there = {
        path.relative_to(PUBLISHED).as_posix() for path in PUBLISHED.rglob("*") if path.is_file()
    }
    assert there - {MANIFEST} == set(files)
    changed = [name for name, about in files.items() if sha256(PUBLISHED / name) != about["sha256"]]
    assert not changed, "these were overwritten; `make publish` replaces all of them"


def test_the_gallery_has_no_machine_and_no_large_picture():
    for path in GALLERY.rglob("*"):
        if path.suffix == ".md":
            found = re.search(r"(?<![\w.~])/(?:home|root|work|tmp|Users|usr)/", path.read_text())
            assert not found, (path.name, found)
        elif path.is_file():
            assert path.stat().st_size <= 150_000, path


# ------------------------------------------------------------------------------------ architecture


def test_the_map_of_equations_names_code_and_tests_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (?:Eq|OAA).*$", text, re.MULTILINE)
    assert len(rows) == 13
    for row in rows:
        _, code, test, _ = (cell.strip() for cell in row.strip("|").split("|"))
        module, _, name = code.split("`")[1].partition(".")
        found = importlib.import_module(f"ec2face_core.{module}")
        for part in name.split("."):
            found = getattr(found, part)
        for other in re.findall(r", `(\w+)`", code):
            assert hasattr(importlib.import_module(f"ec2face_core.{module}"), other), other
        assert (ROOT / "tests" / "core" / test.strip("`")).is_file(), test


def test_the_file_map_names_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"## File map\n\n```\n(.*?)```", text, re.DOTALL)
    root = Path()
    for line in block.splitlines():
        if not line.startswith(" "):
            root = Path(line.split()[0])
        for name in re.findall(r"(?<!\S)([\w]+(?:\.py|/))(?!\S)", line.split("  ")[0] + line[2:26]):
            assert (ROOT / root / name).exists() or (ROOT / name).exists(), (root, name)
