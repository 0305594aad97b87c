"""What holds the project together: the two packages, the environment, notebooks at rest."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ec2face_core
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import path_digest

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PUBLIC = (
    "CLASSES GROUPS PALETTE interpolate reverse_estimate beta class_weights long_tail_weights "
    "flow_matching_loss mask_consistency_loss text_consistency_loss mask_accuracy EC2FacePipeline "
    "FaceDataset FaceSample FaceParser ClipScorer load_profile Trainer "
    "open_dataset predict_velocity total_loss"
)


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports(name: str, file: Path, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; also those of functions, unless only at the top level."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


# -------------------------------------------------------------------------------- the packages


def test_the_core_imports_nothing_of_the_lab():
    wrong = [
        f"{name} imports {used}"
        for name, file in modules("ec2face_core").items()
        for used in imports(name, file)
        if used.startswith("ec2face_lab")
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["ec2face_core", "ec2face_lab"])
def test_modules_import_each_other_without_a_circle(package):
    files = modules(package)
    graph = {
        name: {used for used in imports(name, file, top_level=True) if used in files} - {package}
        for name, file in files.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_module_is_longer_than_500_lines():
    files = [*modules("ec2face_core").values(), *modules("ec2face_lab").values()]
    long = {file.name: n for file in files if (n := len(file.read_text().splitlines())) > 500}
    assert not long


def test_public_names():
    assert sorted(ec2face_core.__all__) == sorted(PUBLIC.split())
    assert all(hasattr(ec2face_core, name) for name in PUBLIC.split())
    assert set(PUBLIC.split()) <= set(dir(ec2face_core))
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = ec2face_core.Trainr


def test_importing_the_core_loads_nothing_heavy():
    heavy = "diffusers transformers peft accelerate facer open_clip lpips pyiqa matplotlib pandas"
    code = f"import sys, ec2face_core; print(*sorted(set({heavy.split()}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


# ---------------------------------------------------------------------------- the environment

# Names that differ between an import and its distribution.
DISTRIBUTIONS = {
    "IPython": "ipython", "PIL": "pillow", "facer": "pyfacer", "open_clip": "open_clip_torch",
    "skimage": "scikit-image", "yaml": "pyyaml",
}  # fmt: skip


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml declares for the core and for some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    return [Requirement(text) for texts in lists for text in texts]


@pytest.mark.parametrize(("package", "extras"), [("ec2face_core", ()), ("ec2face_lab", ("lab",))])
def test_what_is_imported_is_declared(package, extras):
    declared = {canonicalize_name(wanted.name) for wanted in requirements(*extras)}
    own = {*sys.stdlib_module_names, "ec2face_core", "ec2face_lab"}
    used = {
        found.partition(".")[0]
        for name, file in modules(package).items()
        for found in imports(name, file)
    } - own
    assert {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in used} <= declared


def test_the_lock_pins_every_dependency_to_an_allowed_version():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pattern = r"([A-Za-z0-9._-]+)==(\S+)( ; sys_platform == \"linux\")?"
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches), [line for line, m in zip(lines, matches, strict=True) if not m]
    pinned = {canonicalize_name(m[1]): m[2] for m in matches}
    for wanted in requirements("lab", "dev", "quantize"):
        version = pinned[canonicalize_name(wanted.name)]
        assert version in wanted.specifier, f"{wanted}, but requirements.lock has {version}"


def test_environment_yml_installs_the_project_with_a_supported_python():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-e .[lab,dev,quantize]"]
    (python,) = (d for d in environment["dependencies"] if str(d).startswith("python="))
    assert python in ("python=3.11", "python=3.12", "python=3.13")


# ---------------------------------------------------------------------------------- notebooks


def code_cells(notebook: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]


def test_kept_figures_show_the_kept_data():
    """Figures and tables name what they were made of: none is older than a kept result."""
    stale = [
        f"{about.name}: {file}"
        for about in sorted((ROOT / "figures" / "mini").glob("*.json"))
        if about.name != "manifest.json"
        for file, digest in json.loads(about.read_text())["inputs"].items()
        if file.startswith("data/mini/") and path_digest(ROOT / file) not in (digest, "absent")
    ]
    assert not stale, f"made of other data; `make reproduce ONLY=...` makes them anew: {stale}"


def test_kept_files_name_no_folder_of_a_machine():
    folders = [ROOT / "figures", ROOT / "benchmarks", *(ROOT / "data").glob("mini*")]
    kinds = (".json", ".csv")
    files = [x for folder in folders for x in folder.rglob("*") if x.suffix in kinds]
    found = [
        f"{file.relative_to(ROOT)}: {path[0]}"
        for file in files
        if (path := re.search(r"(?<![\w.:/<])/(?:[\w.-]+/){2,}[\w.-]+", file.read_text("utf-8")))
    ]
    assert len(files) > 100 and not found


def test_each_notebook_has_a_number_of_its_own():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers) and all(n.isdigit() for n in numbers), numbers


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped_and_ready_for_papermill(notebook):
    nb = nbformat.read(notebook, as_version=4)
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name == "python3"
    assert "papermill" not in nb.metadata and "widgets" not in nb.metadata
    assert 5 <= len(nb.cells) <= 60
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")
    tags = [tag for cell in nb.cells for tag in cell.metadata.get("tags", ())]
    assert tags.count("parameters") == 1 and "injected-parameters" not in tags
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None
        assert "papermill" not in cell.metadata


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_parameters_are_understood_by_papermill(notebook):
    import papermill

    (cell,) = (c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", ()))
    declared = papermill.inspect_notebook(str(notebook))
    names = [node.target.id for node in ast.parse(cell.source).body]  # annotated, nothing else
    assert sorted(declared) == sorted(names)
    assert declared["profile"]["inferred_type_name"] == "str"
    kinds = ("str", "int", "float", "bool", "dict")
    for about in declared.values():
        assert about["inferred_type_name"] in kinds and about["help"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_a_lesson(notebook):
    """It says what it needs, has its neighbours, sources and an exercise, and takes overrides."""
    cells = nbformat.read(notebook, as_version=4).cells
    head = cells[0].source
    assert all(f"**{word}" in head for word in ("You need to know", "Source:", "Time:")), head
    links = re.findall(
        r"\]\(([^)#]+)\)", "\n".join(c.source for c in cells if c.cell_type == "markdown")
    )
    missing = [link for link in links if not (notebook.parent / link).exists()]
    assert not missing
    number = int(notebook.name[:2])
    beside = {path.name for path in NOTEBOOKS if abs(int(path.name[:2]) - number) == 1}
    assert beside <= set(links)
    code = "\n".join(c.source for c in cells if c.cell_type == "code")
    assert "overrides: dict = {}" in code and "**overrides" in code
    text = "\n".join(c.source for c in cells)
    assert "## " in text and "Predict, then run" in text and "<summary>Answer" in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_tells_a_story_and_leaves_the_work_to_the_package(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"^\s*[!%]", cell.source, re.M), cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef | ast.While), cell.source
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name
