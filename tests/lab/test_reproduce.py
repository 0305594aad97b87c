"""The papermill runner: strict about parameters, resumable, not fooled by what papermill says."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ec2face_core.config import ConfigError, load_profile
from ec2face_core.guards.ranks import locked
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import git_state
from ec2face_lab import reproduce
from ec2face_lab.__main__ import main

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def write_notebook(path: Path, *code: str, parameters: str = "") -> Path:
    """A notebook with a title, a parameters cell and the given code cells."""
    declared = f'profile: str = "smoke"  # size\n{parameters}'.strip()
    cells = [
        new_markdown_cell("# title"),
        new_code_cell(declared, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, code),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
    return path


@pytest.fixture
def config(tmp_path):
    return load_profile("smoke", profile=str(tmp_path / "run"))


@pytest.fixture
def folder(tmp_path):
    typed = 'lr: float = 0.1\nseeds: int = 1\ntrain: bool = False\nname: str = "a"\nmore: dict = {}'
    write_notebook(tmp_path / "nb" / "01_first.ipynb", "x = 1")
    write_notebook(tmp_path / "nb" / "02_second.ipynb", "x = 1", parameters=typed)
    write_notebook(tmp_path / "nb" / "draft.ipynb", "x = 1")
    return tmp_path / "nb"


def test_a_second_reproduction_of_a_profile_is_refused(capsys):
    with locked(load_profile("smoke").run_dir / "notebooks", "reproduction"):
        assert main(["reproduce", "--profile", "smoke", "--only", "13"]) == 2
    assert "another reproduction (process" in capsys.readouterr().err


# ------------------------------------------------------------------ selection and parameters


def test_notebooks_are_selected_by_number_in_order(folder):
    assert [p.name[:2] for p in reproduce.select(folder)] == ["01", "02"]
    assert [p.name[:2] for p in reproduce.select(folder, ["2", "01"])] == ["01", "02"]
    with pytest.raises(ConfigError, match="--only 07: no such notebook"):
        reproduce.select(folder, ["07"])


def test_parameters_reach_those_that_declare_them_with_the_declared_type(folder):
    requested = {"profile": "mini", "lr": "1e-4", "seeds": "3", "train": "True", "name": "7"}
    requested["more"] = "{loss: {center: 0.5}, trainer.mixed_precision: no}"
    first, second = reproduce.assign(reproduce.select(folder), requested).values()
    assert first == {"profile": "mini"}
    typed = {
        "lr": 1e-4,
        "seeds": 3,
        "train": True,
        "more": {"loss.center": 0.5, "trainer.mixed_precision": "no"},
    }
    assert second == {"profile": "mini", "name": "7"} | typed


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"profile": "mini", "seed": "1"}, "no selected notebook has 'seed', did you mean 'seeds'"),
        ({"profile": "mini", "seeds": "two"}, "parameter seeds: expected int, got 'two'"),
        ({"profile": "mini", "train": "yes!"}, "parameter train: expected bool"),
        ({"profile": "mini", "more": "loss.center"}, "parameter more: expected dict"),
        ({"profile": "mini", "more": "{a: "}, "more is not valid YAML"),
        ({"profile": "mini", "more": ""}, "parameter more: expected dict"),
        ({"profile": "mini", "more": "{sede: 5}"}, "sede: unknown option, did you mean 'seed'"),
        ({"profile": "mini", "more": "{seed: 042}"}, "seed: .*write 42"),
    ],
)
def test_what_no_notebook_understands_is_refused(folder, requested, message):
    with pytest.raises(ConfigError, match=message):
        reproduce.assign(reproduce.select(folder), requested)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "minni"], "did you mean 'mini'"),
        (["--only", "01", "--seeds", "2"], "no selected notebook has 'seeds'"),
        (["-p", "sed", "7"], "no selected notebook has 'sed', did you mean 'seeds'"),
        (["--profile", "smoke", "-p", "profile", "mini"], "name the profile by --profile"),
    ],
)
def test_a_senseless_command_line_ends_with_2_before_anything_runs(
    folder, arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(reproduce, "run_notebook", lambda *_, **__: pytest.fail("it ran"))
    assert main(["reproduce", "--notebooks", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_main_reports_each_notebook_and_stops_at_a_failure(folder, capsys, monkeypatch):
    def run_notebook(notebook, parameters, config, force):
        error = "cell 3 `1/0`: ZeroDivisionError" if notebook.name.startswith("01") else ""
        made = ("fig1.png", "fig1.json", "table1.csv")
        return reproduce.Outcome("x", "k", parameters, 61.0, 1_500_000_000, made, error)

    monkeypatch.setattr(reproduce, "run_notebook", run_notebook)
    arguments = ["reproduce", "--notebooks", str(folder), "--profile", "smoke"]
    assert main([*arguments, "--only", "02"]) == 0
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("02_second"))
    assert line.split() == ["02_second", "x", "61", "s", "1.5", "GB", "fig1,", "table1"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "cell 3 `1/0`" in out and "FAILED: 01_first" in out and "02_second  x" not in out
    assert main([*arguments, "--keep-going"]) == 1
    assert "02_second  x" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- identity


def test_identity_follows_code_parameters_and_settings_but_not_text(folder, config):
    notebook = folder / "02_second.ipynb"
    parameters = {"profile": "smoke"}
    key = reproduce.identity(notebook, parameters, config)
    nb = nbformat.read(notebook, as_version=4)
    nb.cells[0].source = "# another title"
    nbformat.write(nb, notebook)
    assert reproduce.identity(notebook, parameters, config) == key
    assert reproduce.identity(notebook, parameters | {"seeds": 2}, config) != key
    longer = config.replace(trainer={"steps": 99})
    assert reproduce.identity(notebook, parameters, longer) != key
    nb.cells[2].source = "x = 2"
    nbformat.write(nb, notebook)
    assert reproduce.identity(notebook, parameters, config) != key


def test_identity_covers_every_module(monkeypatch):
    hashed = []
    monkeypatch.setattr(reproduce, "code_digest", lambda modules: hashed.extend(modules))
    reproduce._packages_digest.__wrapped__()
    files = [p for name in ("ec2face_core", "ec2face_lab") for p in (ROOT / name).rglob("*.py")]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    modules = {name.removesuffix(".__init__") for name in modules} - {"ec2face_lab"}
    assert modules <= set(hashed)


def test_retrained_adapters_concern_only_notebooks_that_do_not_train(folder, config):
    keys = [reproduce.identity(p, {}, config) for p in reproduce.select(folder)]
    (config.run_dir / "adapters" / "both").mkdir(parents=True)
    (config.run_dir / "adapters" / "both" / "weights").write_bytes(b"new")
    after = [reproduce.identity(p, {}, config) for p in reproduce.select(folder)]
    assert after[0] != keys[0] and after[1] == keys[1]  # the second declares `train`


# ---------------------------------------------------------------------------------- failures


def executed(path: Path, ran: int, *code: str, error: bool = False) -> Path:
    """A notebook as papermill leaves it when `ran` of its code cells were started."""
    nb = nbformat.read(write_notebook(path, *code), as_version=4)
    injected = new_code_cell("profile = 'smoke'", metadata={"tags": ["injected-parameters"]})
    nb.cells.insert(2, injected)
    if error:
        banner = new_markdown_cell("An error", metadata={"tags": ["papermill-error-cell-tag"]})
        nb.cells.insert(0, banner)
    started = [cell for cell in nb.cells if cell.cell_type == "code" and cell is not injected]
    for cell in started:  # papermill calls every cell completed, also those after a dead kernel
        cell.metadata["papermill"] = {"status": "completed", "start_time": None}
    for cell in started[:ran]:
        cell.metadata["papermill"]["start_time"] = "2025-01-01T00:00:00"
    if error:
        started[ran - 1].outputs = [
            nbformat.v4.new_output("error", ename="ValueError", evalue="bad", traceback=[])
        ]
    nbformat.write(nb, path)
    return path


def test_failures_are_named_by_cell_and_first_line(tmp_path):
    code = ("x = 1", "# second\nf(x)", "y = 1")
    whole = executed(tmp_path / "a.ipynb", 4, *code)
    assert reproduce.describe_failure(whole, 0) == ""
    raised = executed(tmp_path / "b.ipynb", 3, *code, error=True)
    assert reproduce.describe_failure(raised, 1) == "cell 4 `# second`: ValueError: bad"
    killed = executed(tmp_path / "c.ipynb", 3, *code)
    assert "cell 4 `# second`: papermill ended with code 138" in reproduce.describe_failure(
        killed, 138
    )
    left = executed(tmp_path / "d.ipynb", 3, *code)  # raise SystemExit(0): papermill returns 0
    assert reproduce.describe_failure(left, 0) == "cell 5 `y = 1` was not executed"
    assert "before the first cell" in reproduce.describe_failure(tmp_path / "none.ipynb", 1)


@pytest.mark.slow
def test_a_killed_kernel_counts_as_failed_and_leaves_no_stamp(tmp_path, config):
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    notebook = write_notebook(tmp_path / "nb" / "01_dies.ipynb", "x = 1", kill, "y = 1")
    outcome = reproduce.run_notebook(notebook, {"profile": "smoke"}, config)
    assert outcome.status == "FAILED" and "cell 4 `import os, signal`" in outcome.error
    assert not (config.run_dir / "notebooks" / "01_dies.json").exists()


@pytest.mark.slow
def test_a_notebook_is_executed_once_and_again_when_its_artefact_is_gone(tmp_path, config):
    artefact = config.figure_dir / "fig.txt"
    artefact.parent.mkdir(parents=True)
    code = f"""
import os, pathlib
block = bytearray(os.urandom(1)) * 400_000_000
import time; time.sleep(2)
assert lr == 1e-5 and flag is True
print("\\r 1%\\r100%")
pathlib.Path({str(artefact)!r}).write_text(os.environ["EC2FACE_NOTEBOOK"] + os.getcwd())
"""
    notebook = write_notebook(
        tmp_path / "nb" / "01_works.ipynb", code, parameters="lr: float = 1.0\nflag: bool = False"
    )
    parameters = {"profile": "smoke", "lr": 1e-5, "flag": True}
    outcome = reproduce.run_notebook(notebook, parameters, config)
    assert (outcome.status, outcome.artefacts, outcome.error) == ("done", ("fig.txt",), "")
    assert artefact.read_text() == f"01_works{notebook.parent}"
    assert outcome.memory > 400_000_000 and outcome.seconds > 2
    executed_copy = nbformat.read(config.run_dir / "notebooks" / notebook.name, as_version=4)
    output = executed_copy.cells[-1].outputs[0]
    assert output.text == "100%\n"  # tidied before its hash was taken
    stamp = config.run_dir / "notebooks" / "01_works.json"
    kept = json.loads(stamp.read_text())
    assert kept["key"] == outcome.key and (kept["commit"], kept["dirty"]) == git_state()
    again = reproduce.run_notebook(notebook, parameters, config)
    assert again.status == "up to date" and again.memory == outcome.memory
    artefact.unlink()
    assert reproduce.run_notebook(notebook, parameters, config).status == "done"


# ------------------------------------------------------------------- stamps by content


def stamped(tmp_path, config, code: str = "x = 1"):
    """A notebook, and the stamp and artefacts of a run that never happened."""
    notebook = write_notebook(tmp_path / "nb" / "01_first.ipynb", code)
    out = config.run_dir / "notebooks"
    out.mkdir(parents=True)
    config.figure_dir.mkdir(parents=True)
    copy = out / notebook.name
    copy.write_bytes(notebook.read_bytes())
    (config.figure_dir / "fig.png").write_bytes(b"picture")
    (config.figure_dir / "table.csv").write_text("a\n1\n")
    artefacts = ("fig.png", "table.csv")
    key = reproduce.identity(notebook, {}, config)
    digests = reproduce._digests(copy, artefacts, config.figure_dir)
    outcome = reproduce.Outcome("done", key, {}, 1.0, 5, artefacts, "", digests)
    reproduce.write_json(out / "01_first.json", reproduce.dataclasses.asdict(outcome))
    return notebook


@pytest.fixture
def ran(monkeypatch):
    """Whether papermill was called."""
    calls = []
    monkeypatch.setattr(reproduce, "_papermill", lambda *a: (calls.append(a), (1, 0))[1])
    return calls


def test_an_untouched_stamp_is_up_to_date(tmp_path, config, ran):
    notebook = stamped(tmp_path, config)
    assert reproduce.run_notebook(notebook, {}, config).status == "up to date" and not ran


def test_a_stamp_is_of_its_own_parameters_unless_others_are_asked_for(tmp_path, config):
    notebook = stamped(tmp_path, config)
    assert reproduce.up_to_date(notebook, config).artefacts == ("fig.png", "table.csv")
    assert reproduce.up_to_date(notebook, config, {}) is not None
    assert reproduce.up_to_date(notebook, config, {"profile": "smoke"}) is None
    assert reproduce.up_to_date(notebook.with_name("02_other.ipynb"), config) is None


@pytest.mark.parametrize(
    "name", ["figures/fig.png", "figures/table.csv", "notebooks/01_first.ipynb"]
)
@pytest.mark.parametrize("content", [b"", b"edited!", None])
def test_an_emptied_edited_or_missing_artefact_or_copy_is_made_again(
    tmp_path, config, ran, name, content
):
    notebook = stamped(tmp_path, config)
    path = config.run_dir / name
    path.unlink() if content is None else path.write_bytes(content)
    reproduce.run_notebook(notebook, {}, config)
    assert ran


@pytest.mark.parametrize(
    "content",
    ['{"a":1}', "[1]", "5", "{", "", "null", '{"key": "KEY"}', '{"key": "KEY", "artefacts": 5}'],
)
def test_a_damaged_stamp_is_no_stamp(tmp_path, config, ran, content):
    notebook = stamped(tmp_path, config)
    key = reproduce.identity(notebook, {}, config)
    (config.run_dir / "notebooks" / "01_first.json").write_text(content.replace("KEY", key))
    reproduce.run_notebook(notebook, {}, config)
    assert ran


def test_the_report_depends_on_the_tables_that_it_reads(tmp_path, config):
    notebook = stamped(tmp_path, config, "from ec2face_lab.study.report import save_report")
    before = reproduce.identity(notebook, {}, config)
    (config.figure_dir / "later.csv").write_text("a\n1\n")
    (config.figure_dir / "later.json").write_text('{"notebook": "99_later"}')
    assert reproduce.identity(notebook, {}, config) == before
    (config.figure_dir / "table.csv").write_text("a\n2\n")
    assert reproduce.identity(notebook, {}, config) != before


def test_procedural_faces_count(tmp_path, config):
    config = config.replace(data={"root": str(tmp_path / "faces")})
    notebook = stamped(tmp_path, config)
    keys = {reproduce.identity(notebook, {}, config)}
    (tmp_path / "faces" / "mask").mkdir(parents=True)
    for content in (b"one", b"two"):
        (tmp_path / "faces" / "mask" / "0.png").write_bytes(content)
        keys.add(reproduce.identity(notebook, {}, config))
    assert len(keys) == 3


def test_a_copy_that_is_no_notebook_is_told_in_a_sentence(tmp_path):
    copy = tmp_path / "copy.ipynb"
    for content in (b"", b"{", b"half of a noteb"):
        copy.write_bytes(content)
        assert "is the disk full?" in reproduce.describe_failure(copy, 1)


def test_settings_reach_every_notebook(tmp_path, monkeypatch):
    """Those of --set are the profile's wherever it is loaded, and part of the identity."""
    import os

    from ec2face_core.config import SETTINGS
    from ec2face_lab.commands import reproduce as command

    monkeypatch.setenv(SETTINGS, "{}")
    seen = {}

    def note(assigned, config, *_):
        seen.update(config=config, order=[path.stem for path in assigned])
        return True

    monkeypatch.setattr(command, "run_notebooks", note)
    write_notebook(tmp_path / "00_first.ipynb")
    write_notebook(tmp_path / "01_training.ipynb", parameters="train: bool = False")
    arguments = ["reproduce", "--profile", "smoke", "--notebooks", str(tmp_path)]
    settings = ["--set", "sampling.steps=3", "--set", "loss={clip: 2.0}"]
    assert main([*arguments, *settings, "--train"]) == 0
    assert seen["order"] == ["01_training", "00_first"]  # what the others need comes first
    config = load_profile("smoke")  # as in the notebooks, which inherit the environment
    assert config == seen["config"] and (config.sampling.steps, config.loss.clip) == (3, 2.0)
    assert load_profile("smoke", **{"sampling.steps": 5}).sampling.steps == 5
    monkeypatch.setenv(SETTINGS, "{}")
    assert load_profile("smoke").digest() != config.digest()
    assert main([*arguments, "--set", "sampling.stps=3"]) == 2
    assert os.environ[SETTINGS]


def test_a_notebook_of_other_profiles_says_so_and_is_done(tmp_path, config):
    cell = "from ec2face_lab.study.sweeps import kept_sweeps"
    load = "from ec2face_core.config import load_profile"
    ask = "kept_sweeps(load_profile('paper', adapters='nowhere', profile='nowhere'))"
    path = write_notebook(tmp_path / "09_sweeps.ipynb", cell, load, ask, "1 / 0")
    outcome = reproduce.run_notebook(path, {}, config)
    assert (outcome.status, outcome.error) == ("elsewhere", "")
    copy = (config.run_dir / "notebooks" / "09_sweeps.ipynb").read_text()
    assert "profile nowhere has none (data.validation)" in copy
    assert reproduce.run_notebook(path, {}, config).status == "up to date"
