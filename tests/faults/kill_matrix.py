"""Kill trainings at random moments, count what lives on, resume, compare the result bit for bit.

    python tests/faults/kill_matrix.py --work DIR [--kills 40] [--ranks 1 2] [--out FILE.json]

Each trial starts a training, kills a part of its processes after a random time, waits for the rest
to end, and runs the same command again until it is done. Some trials start again at once. Exit code
1: something lived on, or a result was not equal. About half a minute a trial on two free cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from world import ROOT, make_world

from ec2face_core.io.lora_file import LORA_FILE
from ec2face_core.runs import read_metrics, remove

MARK = "EC2FACE_FAULTS"  # environment variable by which the processes of a trial are found
PATIENCE = 10.0  # seconds in which everything has to end

# whom a signal reaches: the process that was started, a rank of it, or all of them
KINDS = {
    1: (("started", signal.SIGKILL), ("started", signal.SIGTERM), ("started", signal.SIGINT)),
    2: (
        ("started", signal.SIGKILL), ("rank", signal.SIGKILL), ("all", signal.SIGKILL),
        ("started", signal.SIGTERM), ("rank", signal.SIGTERM), ("started", signal.SIGINT),
    ),
}  # fmt: skip


def command(work: Path, run_dir: Path, ranks: int) -> list[str]:
    """The training's command line, as README has it."""
    launcher = ["-m"]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launcher = [*torchrun, "-m"]
    return [
        sys.executable, *launcher, "ec2face_core.train", "--config", str(work / "config.yaml"),
        "--run-dir", str(run_dir), "--set", f"trainer.num_processes={ranks}",
    ]  # fmt: skip


def start(line: list[str], mark: str, log: Path) -> subprocess.Popen:
    """Start a command in a session of its own; its processes carry the mark.

    A script that runs in the background ignores SIGINT, and so would all that it starts.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as file:
        return subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def marked(mark: str) -> list[psutil.Process]:
    """The living processes of a trial."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def strike(process: subprocess.Popen, mark: str, whom: str, number: int) -> None:
    """Send a signal."""
    targets = [process.pid]
    if whom != "started":
        others = [p.pid for p in marked(mark) if p.pid != process.pid]
        targets = [*others, process.pid] if whom == "all" else others[:1] or targets
    for pid in targets:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def finish(line: list[str], mark: str, log: Path, run_dir: Path, limit: float) -> str:
    """Run a command to its end; `done`, or what happened instead."""
    process = start(line, mark, log)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "hung"
    finally:
        end_all(mark)
    return "done" if code == 0 and (run_dir / "final" / LORA_FILE).is_file() else f"exit {code}"


def end_all(mark: str) -> int:
    """Kill what lives on of a trial; returns how many."""
    left = marked(mark)
    for process in left:
        try:
            process.kill()
        except psutil.Error:
            continue
    return len(left)


def trial(
    work: Path, ranks: int, kind: tuple[str, int], moment: float, at_once: bool, limit: float
) -> dict[str, Any]:
    """One kill and the resume after it."""
    mark = uuid.uuid4().hex
    run_dir = work / "trial"
    remove(run_dir)
    log = work / "trial.log"
    log.unlink(missing_ok=True)
    line = command(work, run_dir, ranks)
    process = start(line, mark, log)
    time.sleep(moment)
    strike(process, mark, *kind)
    refused = ""
    if at_once:
        refused = finish(line, f"{mark}-again", log, run_dir, limit)
    began = time.monotonic()
    while process.poll() is None or marked(mark):
        if time.monotonic() - began > PATIENCE:
            break
        time.sleep(0.2)
    orphans = end_all(mark)
    process.wait()
    resumed = finish(line, f"{mark}-resumed", log, run_dir, limit)
    lora = run_dir / "final" / LORA_FILE
    return {
        "ranks": ranks, "whom": kind[0], "signal": signal.Signals(kind[1]).name,
        "seconds": round(moment, 2), "exit": process.returncode, "orphans": orphans,
        "at_once": refused, "resumed": resumed,
        "equal": lora.is_file() and lora.read_bytes() == reference(work, ranks).read_bytes(),
        "journal": [row["step"] for row in read_metrics(run_dir)],
        "left": sorted(p.name for p in run_dir.rglob(".*") if p.name != ".lock"),
    }  # fmt: skip


def reference(work: Path, ranks: int) -> Path:
    """The LoRA of the training that was not disturbed."""
    return work / f"straight{ranks}" / "final" / LORA_FILE


def main() -> int:
    """Run all trials and print their summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of everything")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], choices=sorted(KINDS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the trials are written as JSON")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    config = make_world(work, options.steps)
    draw = random.Random(options.seed)
    durations = {}
    for ranks in options.ranks:
        run_dir = work / f"straight{ranks}"
        line = command(work, run_dir, ranks)
        log = work / "straight.log"
        remove(run_dir)
        finish(line, uuid.uuid4().hex, log, run_dir, 1800)  # encodes what is not yet cached
        remove(run_dir)
        began = time.monotonic()
        outcome = finish(line, uuid.uuid4().hex, log, run_dir, 1800)
        durations[ranks] = time.monotonic() - began
        print(f"{ranks} rank(s), undisturbed: {outcome}, {durations[ranks]:.1f} s", flush=True)
        if outcome != "done":
            print(log.read_text(errors="replace")[-3000:])
            return 1
    rows = []
    cycles = {ranks: itertools.cycle(KINDS[ranks]) for ranks in options.ranks}
    for number in range(options.kills):
        ranks = options.ranks[number % len(options.ranks)]
        moment = draw.uniform(0.3, durations[ranks])
        limit = 20 * durations[ranks] + 60
        row = trial(work, ranks, next(cycles[ranks]), moment, number % 5 == 4, limit)
        row["journal_whole"] = row.pop("journal") == list(range(1, config.trainer.steps + 1))
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{len(rows)} kills, moments of 0.3 s to {max(durations.values()):.0f} s")
    for ranks in options.ranks:
        own = [row for row in rows if row["ranks"] == ranks]
        print(
            f"{ranks} rank(s): {len(own)} kills, {sum(row['equal'] for row in own)} equal, "
            f"{sum(row['journal_whole'] for row in own)} whole journals, "
            f"{sum(row['orphans'] for row in own)} orphans, "
            f"{sum(bool(row['left']) for row in own)} with leftovers, "
            f"at once {dict(Counter(row['at_once'] for row in own if row['at_once']))}"
        )
    good = all(
        r["equal"] and r["journal_whole"] and not r["orphans"] and not r["left"] for r in rows
    )
    print("0 unequal, 0 orphans" if good else "NOT GOOD: see the trials above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
