"""What holds the project together: floors, sizes, environment, public names, notebooks at rest."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import ec2face_core
from ec2face_core.config import ROOT
from ec2face_core.runs import path_digest

PACKAGE = ROOT / "ec2face_core"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The floors of the design, each in rows: a module imports from rows above its own only.
FLOORS = {
    1: ["attributes config flow"],
    2: [
        "tables tuning weights",
        "decoupled",
        "canvas captions checkpoints distribution journal launch lora losses perception "
        "results statistics validation",
        "backbone commands conversion plotting",
    ],
    3: [
        "conditioning diagram effects grids guidance metrics rendering reproduce",
        "dense synthetic",
        "contrastive datasets folders photos",
    ],
    4: ["inventory latents worlds", "critics foundation", "adapters draws pipeline", "generate"],
    5: [
        "baselines scoring trainer",
        "estimation evaluate inspection",
        "gradients",
        "experiments sentences",
        "comparison robustness sweeps",
        "fairness report",
    ],
    6: ["prepare train"],
}
PUBLIC = (
    "CLASSES GROUPS PALETTE interpolate reverse_estimate beta class_weights long_tail_weights "
    "flow_matching_loss mask_consistency_loss text_consistency_loss mask_accuracy EC2FacePipeline "
    "FaceDataset FaceSample FaceParser ClipScorer load_profile Trainer"
)


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, also inside functions, not for types alone.

    A folder of modules counts as one; what its modules import from one another is left out.
    """
    if path.is_dir():
        return set().union(*map(imports, path.glob("*.py")))
    found: set[str] = set()
    depth = len(path.relative_to(PACKAGE).parts)

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            inside = re.sub(r"^(\.+|ec2face_core\.?)", "", source)
            if source.startswith("ec2face_core") or node.level == depth:
                found.update([inside.split(".")[0]] if inside else [n.name for n in node.names])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


# -------------------------------------------------------------------------------- the package


def test_every_module_imports_only_from_above_its_own_row():
    rows = [row.split() for floor in FLOORS.values() for row in floor]
    row_of = {module: i for i, row in enumerate(rows) for module in row}
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    modules |= {path.parent.name: path.parent for path in PACKAGE.glob("*/__init__.py")}
    assert set(row_of) == set(modules), "FLOORS lists every module of the package, once"
    assert len(row_of) == sum(map(len, rows))
    wrong = [
        f"{name} imports {used}"
        for name, path in modules.items()
        for used in imports(path)
        if row_of.get(used, -1) >= row_of[name]
    ]
    assert not wrong, wrong


def test_no_module_is_longer_than_400_lines():
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "notebooks").rglob("*.py")]
    long = {p.name: n for p in sources if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long


def test_public_names_are_those_promised():
    assert sorted(ec2face_core.__all__) == sorted(PUBLIC.split())
    assert all(hasattr(ec2face_core, name) for name in PUBLIC.split())
    assert set(PUBLIC.split()) <= set(dir(ec2face_core))
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = ec2face_core.Trainr


def test_importing_the_package_loads_nothing_heavy():
    heavy = "diffusers transformers peft accelerate facer open_clip lpips pyiqa matplotlib pandas"
    code = f"import sys, ec2face_core; print(*sorted(set({heavy.split()}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "module", ["plotting", "effects", "grids", "diagram", "results", "tables", "reproduce"]
)
def test_drawing_needs_no_model_libraries(module):
    sources = {module} | imports(PACKAGE / f"{module}.py")
    heavy = {"diffusers", "transformers", "facer", "open_clip", "pyiqa"}
    for name in sources:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        used = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import)
                for a in n.names}  # fmt: skip
        used |= {n.module.split(".")[0] for n in ast.walk(tree)
                 if isinstance(n, ast.ImportFrom) and n.module}  # fmt: skip
        assert not used & heavy, name


# ---------------------------------------------------------------------------- the environment


def requirements() -> list[str]:
    """The dependencies that pyproject.toml declares."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_environment_yml_lists_the_packages_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == [*requirements(), "-e ."]
    (python,) = (d for d in environment["dependencies"] if str(d).startswith("python="))
    assert python in ("python=3.11", "python=3.12", "python=3.13")


def test_the_lock_pins_every_dependency_to_an_allowed_version():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pattern = r"([A-Za-z0-9._-]+)==(\S+)( ; sys_platform == \"linux\")?"
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches), [line for line, m in zip(lines, matches, strict=True) if not m]
    pinned = {canonicalize_name(m[1]): m[2] for m in matches}
    for text in requirements():
        wanted = Requirement(text)
        version = pinned[canonicalize_name(wanted.name)]
        assert version in wanted.specifier, f"{text}, but requirements.lock has {version}"


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and "make test" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


# ---------------------------------------------------------------------------------- notebooks


def code_cells(notebook: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]


def test_kept_figures_show_the_kept_data():
    """Figures and tables name what they were made of: none is older than a kept result."""
    stale = [
        f"{about.name}: {file}"
        for about in sorted((ROOT / "figures" / "mini").glob("*.json"))
        for file, digest in json.loads(about.read_text())["inputs"].items()
        if file.startswith("data/mini/") and path_digest(ROOT / file) not in (digest, "absent")
    ]
    assert not stale, f"made of other data; `make reproduce ONLY=...` makes them anew: {stale}"


def test_notebooks_are_numbered_without_a_gap():
    numbers = [int(path.name[:2]) for path in NOTEBOOKS]
    assert numbers == list(range(12)), [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped_and_ready_for_papermill(notebook):
    nb = nbformat.read(notebook, as_version=4)
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name == "python3"
    assert "papermill" not in nb.metadata and "widgets" not in nb.metadata
    assert 5 <= len(nb.cells) <= 25
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
    for about in declared.values():
        assert about["inferred_type_name"] in ("str", "int", "float", "bool") and about["help"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_tells_a_story_and_leaves_the_work_to_the_package(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"^\s*[!%]", cell.source, re.M), cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef | ast.While), cell.source
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name
