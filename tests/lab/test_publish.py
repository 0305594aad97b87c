"""What is published changes by `publish` alone, from one clean commit."""

from __future__ import annotations

import dataclasses
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ec2face_core.config import load_profile
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import write_json
from ec2face_lab import publish, reproduce
from ec2face_lab.__main__ import main
from ec2face_lab.commands import reproduce as command
from ec2face_lab.study.agreement import Agreement

COMMIT = "a" * 40


@pytest.fixture
def config(tmp_path, monkeypatch):
    config = load_profile("smoke", profile=str(tmp_path / "run"))
    monkeypatch.setattr(type(config), "published_dir", tmp_path / "figures" / "smoke")
    monkeypatch.setattr(publish, "git_state", lambda: (COMMIT, False))
    monkeypatch.setattr(publish, "DOCS", tmp_path)
    return config


def ran(tmp_path, config, name: str, artefacts: dict[str, str], **about):
    """A notebook, and what a run of it left."""
    notebook = tmp_path / "notebooks" / f"{name}.ipynb"
    notebook.parent.mkdir(exist_ok=True)
    code = new_code_cell("x = 1", outputs=[new_output("stream", name="stdout", text="hello\n")])
    parameters = new_code_cell('profile: str = "smoke"  # size', metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [new_markdown_cell("# title"), parameters, code]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), notebook)
    out = config.run_dir / "notebooks"
    for folder in (out, config.figure_dir):
        folder.mkdir(parents=True, exist_ok=True)
    copy = out / notebook.name
    copy.write_bytes(notebook.read_bytes())
    for file, content in artefacts.items():
        (config.figure_dir / file).write_text(content)
    kept = {"parameters": {"profile": "smoke"}, "commit": COMMIT, "dirty": False} | about
    outcome = reproduce.Outcome(
        status="done", key=reproduce.identity(notebook, kept["parameters"], config),
        artefacts=tuple(artefacts),
        digests=reproduce._digests(copy, tuple(artefacts), config.figure_dir), **kept,
    )  # fmt: skip
    write_json(out / f"{name}.json", dataclasses.asdict(outcome))
    return notebook


def test_publishing_copies_what_the_notebooks_made_and_lists_every_hash(tmp_path, config):
    first = ran(tmp_path, config, "01_a", {"fig1.png": "one"})
    second = ran(tmp_path, config, "02_b", {"table1.csv": "method\n", "REPORT.md": "# r\n"})
    (config.figure_dir / "own_try.png").write_text("no notebook made this")
    config.published_dir.mkdir(parents=True)
    (config.published_dir / "older.png").write_text("of a notebook that is gone")
    pages = publish.gallery_dir(config)
    pages.mkdir(parents=True)
    (pages / "00_gone.md").write_text("old")
    record = json.loads(publish.publish([first, second], config).read_text())
    names = {path.name for path in config.published_dir.iterdir()}
    assert names == {"fig1.png", "table1.csv", "REPORT.md", "manifest.json"}
    assert (config.published_dir / "fig1.png").read_text() == "one"
    assert record["commit"] == COMMIT and record["profile"] == config.profile
    assert record["files"]["fig1.png"] == {
        "notebook": "01_a", "sha256": publish.sha256(config.figure_dir / "fig1.png"),
    }  # fmt: skip
    assert set(record["files"]) == names - {"manifest.json"}
    assert {path.name for path in pages.iterdir()} == {"01_a.md", "02_b.md"}
    assert "hello" in (pages / "01_a.md").read_text()
    assert not list(config.published_dir.parent.glob("*.part"))


def refused(notebooks, config) -> str:
    with pytest.raises(publish.PublishError) as error:
        publish.publish(notebooks, config)
    assert not config.published_dir.exists() and not publish.gallery_dir(config).exists()
    return str(error.value)


def test_a_tree_with_changes_publishes_nothing(tmp_path, config, monkeypatch):
    notebook = ran(tmp_path, config, "01_a", {"fig1.png": "one"})
    monkeypatch.setattr(publish, "git_state", lambda: (COMMIT, True))
    assert "uncommitted changes" in refused([notebook], config)
    monkeypatch.setattr(publish, "git_state", lambda: (None, None))
    assert "no git repository" in refused([notebook], config)


def test_what_is_not_up_to_date_or_of_another_commit_is_not_published(tmp_path, config):
    first = ran(tmp_path, config, "01_a", {"fig1.png": "one"})
    second = ran(tmp_path, config, "02_b", {"fig2.png": "two"}, commit="b" * 40)
    said = refused([first, second], config)
    assert "several commits: aaaaaaaa, bbbbbbbb" in said
    third = ran(tmp_path, config, "03_c", {"fig3.png": "three"}, dirty=True)
    fourth = ran(tmp_path, config, "04_d", {}, parameters={"profile": "smoke", "faces": 8})
    (config.figure_dir / "fig1.png").write_text("replaced by a run with other parameters")
    never = tmp_path / "notebooks" / "05_e.ipynb"
    never.write_bytes(first.read_bytes())
    said = refused([first, third, fourth, never], config)
    assert "01_a is not up to date" in said and "05_e is not up to date" in said
    assert "03_c ran with uncommitted changes" in said and "FORCE=1" in said
    assert "04_d ran with other parameters: faces" in said


def test_the_command_line_publishes_nothing_of_a_profile_that_never_ran(capsys, monkeypatch):
    monkeypatch.setattr(publish, "git_state", lambda: (COMMIT, False))
    assert main(["publish", "--profile", "photos64"]) == 2
    assert "nothing was published" in capsys.readouterr().err
    assert not (ROOT / "figures" / "photos64").exists()
    assert main(["gallery", "--profile", "photos64"]) == 2
    assert "no executed copy" in capsys.readouterr().err


@pytest.mark.parametrize(("changed", "code"), [({}, 0), ({"ltal-rare": ("holds", "no")}, 3)])
def test_reproduce_ends_with_3_if_a_verdict_changed(monkeypatch, capsys, changed, code):
    monkeypatch.setattr(command, "run_notebooks", lambda *_: True)
    monkeypatch.setattr(command, "compare", lambda config: Agreement("the comparison", changed))
    assert main(["reproduce", "--profile", "smoke", "--only", "02"]) == code
    assert "the comparison" in capsys.readouterr().out


def test_a_failed_notebook_is_not_compared(monkeypatch, capsys):
    monkeypatch.setattr(command, "run_notebooks", lambda *_: False)
    assert main(["reproduce", "--profile", "smoke", "--only", "02"]) == 1
    assert "compared" not in capsys.readouterr().out


def test_publishing_the_shown_profile_writes_the_pages_numbers(tmp_path, config, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- numbers: scores -->\nold\n<!-- end of numbers -->\nAfter.\n")
    monkeypatch.setattr(publish, "PAGES", (str(page),))
    monkeypatch.setattr(publish, "GALLERY", tmp_path / "gallery")
    columns = "table,method,dataset,metric,source,critic,value,ci_low,ci_high,n,seeds\n"
    row = "table1,EC2Face,faces,OAA,ours,independent,83.2,82.5,83.9,300,42\n"
    notebook = ran(tmp_path, config, "01_a", {"table1.csv": columns + row})
    publish.publish([notebook], config)
    assert "old" in page.read_text()
    monkeypatch.setattr(publish, "SHOWN", config.profile)
    publish.publish([notebook], config)
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
    assert "| **EC²Face (ours)** | – | 83.2 | – | – | – |" in text
    assert (tmp_path / "gallery" / "01_a.md").is_file()
