"""How fast the miniature is on this machine: one table as CSV, with its provenance.

    .venv/bin/python benchmarks/miniature.py

Writes `benchmarks/miniature.csv`. The rows of `make reproduce` and of its notebooks are those of
its last complete run in `runs/`; everything else is measured now, best of three.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).with_suffix(".csv")
BATCH = 8
Row = tuple[str, float, str, str]  # what, value, unit, limit


def best(measure: Callable[[], float], times: int = 3) -> float:
    """The smallest of a few measurements, because a disturbance only adds time."""
    return min(measure() for _ in range(times))


def seconds(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def imports() -> Iterator[Row]:
    """The import of the package beyond torch, in a fresh interpreter each."""

    def run(code: str) -> float:
        command = (
            f"import time, torch; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
        )
        done = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
        return float(done.stdout)

    yield "import ec2face_core, beyond torch", best(lambda: run("import ec2face_core")), "s", "<= 1"


def faces() -> Iterator[Row]:
    """Procedural faces: scenes and rendering."""
    from ec2face_lab.world.rendering import render
    from ec2face_lab.world.scenes import sample_scenes

    took = best(lambda: seconds(lambda: render(sample_scenes(0, range(256)), 64)))
    yield "procedural faces at 64 px", 256 / took, "faces/s", ">= 200"


def sampling() -> Iterator[Row]:
    """28 steps, batch 8, text and mask: without guidance, and as the profile samples."""
    from ec2face_core.config import load_profile
    from ec2face_core.pipeline import EC2FacePipeline
    from ec2face_lab.world.rendering import render
    from ec2face_lab.world.scenes import sample_scenes

    config = load_profile("mini")
    pipe = EC2FacePipeline.from_config(config)
    pipe.set_progress_bar_config(disable=True)
    masks = render(sample_scenes(3, range(BATCH)), 64).label_map
    s = config.sampling
    for s_t, s_m in ((1.0, 1.0), (s.text_guidance, s.mask_guidance)):
        options = {"text_guidance": s_t, "mask_guidance": s_m, "output_type": "pt"}
        took = best(lambda: seconds(lambda: pipe([""] * BATCH, masks, **options))) / BATCH  # noqa: B023
        what = f"28-step sampling at batch {BATCH}, guidance {s_t:g} and {s_m:g}"
        yield what, took, "s/image", "<= 0.5"


def systems() -> Iterator[Row]:
    """The comparison systems, text and mask."""
    from ec2face_core.config import load_profile
    from ec2face_lab.baselines import trained
    from ec2face_lab.study.comparison import sampling_seconds

    config = load_profile("mini")
    for name in trained(config):
        yield f"sampling at batch {BATCH}, {name}", sampling_seconds(config, name), "s/image", ""


def training() -> Iterator[Row]:
    """Median step of every variant whose training lies in `runs/`, from its metrics log."""
    from ec2face_core.config import VARIANTS
    from ec2face_core.runs import read_metrics

    for variant in sorted(VARIANTS):
        rows = read_metrics(ROOT / "runs/mini/training" / variant)
        name = f"training step at batch 16, {variant}"
        if rows:
            yield name, statistics.median(row["seconds"] for row in rows), "s", ""


def reproduced() -> Iterator[Row]:
    """`make reproduce` as it ran last, notebook by notebook."""
    folder = ROOT / "runs/mini/notebooks"
    stamps = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for name, stamp in stamps.items():
        yield f"notebook {name}", stamp["seconds"], "s", ""
    if stamps:
        yield "all notebooks", sum(s["seconds"] for s in stamps.values()), "s", "<= 2700"
        yield "largest notebook", max(s["memory"] for s in stamps.values()) / 2**30, "GiB", "<= 8"


def main() -> None:
    """Measure, print and write the table."""
    from ec2face_core.config import load_profile
    from ec2face_core.runs import provenance

    rows: list[Row] = []
    for measure in (imports, faces, sampling, systems, training, reproduced):
        for row in measure():
            rows.append(row)
            print(f"{row[0]:68} {row[1]:10.3g} {row[2]:8} {row[3]}", flush=True)
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("what", "value", "unit", "limit"))
        writer.writerows((what, f"{value:.4g}", unit, limit) for what, value, unit, limit in rows)
    record = provenance(load_profile("mini"), notebook=Path(__file__).name)
    OUT.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
