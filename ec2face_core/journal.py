"""What a training writes for its readers: metrics.jsonl, one line a step, and lines of progress.

A notebook draws its curves from `read_metrics(run_dir)` while the training runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import resolve


def read_metrics(run_dir: Path | str) -> list[dict[str, float]]:
    """The rows of a run, in order; a half-written last line is left out.

    A row has step, samples (so far, over all processes), lr, seconds (of the step),
    samples_per_second, grad_norm (before clipping) and batch means: t, total, flow, text, mask,
    beta (the parts of Eq. 12) and unweighted_flow (Eq. 3 whatever the weights are).
    """
    path, rows = resolve(run_dir) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut_metrics(run_dir: Path, step: int) -> None:
    """Forget the steps after `step`: a resumed run does them again."""
    kept = [row for row in read_metrics(run_dir) if row["step"] <= step]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def add_metrics(run_dir: Path, rows: Sequence[dict[str, float]]) -> None:
    """Append rows."""
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def print_progress(rows: Sequence[dict[str, float]], steps: int) -> None:
    """One plain line with the mean of these rows, above the progress bar if there is one."""
    from tqdm.auto import tqdm

    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1]}
    last = rows[-1]
    tqdm.write(
        f"step {last['step']}/{steps}  loss {mean['total']:.4f}  flow {mean['flow']:.4f}  "
        f"text {mean['text']:.4f}  mask {mean['mask']:.4f}  gradient {mean['grad_norm']:.3f}  "
        f"lr {last['lr']:.1e}  {mean['seconds']:.3f} s/step  "
        f"{sum(row['samples_per_second'] for row in rows) / len(rows):.1f} samples/s  "
        f"{(steps - last['step']) * mean['seconds'] / 60:.1f} min left"
    )
    sys.stdout.flush()
