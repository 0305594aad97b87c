"""Kill `make reproduce` and its children at random moments; count what lives on, and run it again.

    python tests/faults/kill_reproduce.py --work DIR [--kills 9] [--only 03] [--out FILE.json]

It runs one notebook of the smoke profile. Exit code 1: something lived on, or the run after a kill
failed.
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
from pathlib import Path
from typing import Any

from kill_matrix import end_all, marked, start
from world import ROOT

PATIENCE = 30.0  # seconds in which everything has to end: 20 for papermill to end its kernel

# a word of the command line of the process that a signal reaches; "": the one that was started
KINDS = (
    ("", signal.SIGKILL), ("", signal.SIGTERM), ("", signal.SIGINT),
    ("ec2face_lab", signal.SIGKILL), ("ec2face_lab", signal.SIGTERM),
    ("ec2face_lab", signal.SIGINT),
    ("papermill", signal.SIGKILL), ("ipykernel", signal.SIGKILL), ("all", signal.SIGKILL),
)  # fmt: skip


def strike(process: subprocess.Popen, mark: str, word: str, number: int) -> int:
    """Send a signal; returns how many processes it reached. Ctrl-C reaches all in a terminal."""
    if number == signal.SIGINT and not word:
        os.killpg(process.pid, number)
        return len(marked(mark))
    targets = marked(mark)
    if word != "all":
        targets = [p for p in targets if p.pid == process.pid]
    if word not in ("", "all"):
        targets = [p for p in marked(mark) if word in p.cmdline()[:4]]
        targets = targets or [p for p in marked(mark) if any(word in x for x in p.cmdline()[:4])]
    for target in targets:
        try:
            os.kill(target.pid, number)
        except ProcessLookupError:
            continue
    return len(targets)


def trial(
    line: list[str], log: Path, kind: tuple[str, int], moment: float, limit: float
) -> dict[str, Any]:
    """One kill and the run after it."""
    mark = uuid.uuid4().hex
    process = start(line, mark, log)
    time.sleep(moment)
    reached = strike(process, mark, *kind)
    began = time.monotonic()
    while process.poll() is None or marked(mark):
        if time.monotonic() - began > PATIENCE:
            break
        time.sleep(0.2)
    names = [" ".join(p.cmdline()[:5]) for p in marked(mark)]
    orphans = end_all(mark)
    process.wait()
    again = start(line, f"{mark}-again", log)
    try:
        code = again.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    end_all(f"{mark}-again")
    return {
        "whom": kind[0] or "started", "signal": signal.Signals(kind[1]).name,
        "seconds": round(moment, 1), "reached": reached, "exit": process.returncode,
        "orphans": orphans, "names": names, "again": code,
    }  # fmt: skip


def main() -> int:
    """Run all trials and print their summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of logs")
    parser.add_argument("--kills", type=int, default=len(KINDS))
    parser.add_argument("--only", default="03", help="number of the notebook")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the trials are written as JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    log = options.work / "reproduce.log"
    line = ["make", "-C", str(ROOT), "reproduce", "PROFILE=smoke", f"ONLY={options.only}"]
    line.append("FORCE=1")
    began = time.monotonic()
    if start(line, uuid.uuid4().hex, log).wait():
        print(log.read_text(errors="replace")[-3000:])
        return 1
    duration = time.monotonic() - began
    print(f"undisturbed: {duration:.0f} s", flush=True)
    draw = random.Random(options.seed)
    rows = []
    for kind in itertools.islice(itertools.cycle(KINDS), options.kills):
        moment = draw.uniform(0.15, 0.6) * duration  # all of the processes are there by then
        rows.append(trial(line, log, kind, moment, 10 * duration))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    orphans = sum(row["orphans"] for row in rows)
    failed = sum(row["again"] != 0 for row in rows)
    print(f"{len(rows)} kills, {orphans} orphans, {failed} runs after them failed")
    return 1 if orphans or failed else 0


if __name__ == "__main__":
    sys.exit(main())
