"""Work that is shared by worker processes, which end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from ec2face_core.guards.parent import tie_to

T = TypeVar("T")
R = TypeVar("R")


def in_processes(
    function: Callable[[T], R], items: Iterable[T], progress: str | None = None
) -> Iterator[R]:
    """Map over items on a process for each core, in order, with a progress bar.

    Args:
        function: like items and results, it has to be picklable. Results wait in memory for a slow
            consumer, so it should return little.
        items: the work.
        progress: label of the bar; None: no bar.

    Raises:
        OSError: a process was killed.
    """
    from tqdm.auto import tqdm

    items = list(items)
    affinity = getattr(os, "sched_getaffinity", None)  # a cluster may lend fewer cores
    workers = min(len(items), len(affinity(0)) if affinity else os.cpu_count() or 1)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(max(1, workers), context, _begin, (os.getpid(),)) as pool:
        results = pool.map(function, items, chunksize=8)
        hidden = progress is None
        try:
            yield from tqdm(results, progress, len(items), mininterval=1.0, disable=hidden)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, most likely because memory ran out: run the same "
                "command again, it continues where it stopped"
            ) from error


def _begin(parent: int) -> None:
    """What a worker process does first: it will end with its parent, and uses one core."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        tie_to(parent)()
