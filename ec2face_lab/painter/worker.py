"""One job at a time beside the notebook's own thread; the newest request wins."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

Stop = Callable[[], bool]
Job = Callable[[Stop], None]


class Superseded(Exception):
    """A newer request has come; what this one made is not wanted any more."""


class Worker:
    """Runs the newest job in a thread of its own.

    A job gets a function that says whether a newer one waits, and should then end soon. The thread
    begins with the first job and does not keep the process alive.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: Job | None = None
        self._running = False
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Run a job after the one that runs now, in place of any that waits."""
        with self._condition:
            self._waiting = job
            self._condition.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def superseded(self) -> bool:
        """Whether a newer job waits."""
        return self._waiting is not None

    def pause(self, seconds: float) -> bool:
        """Wait; True at once if a newer job comes."""
        with self._condition:
            return self._condition.wait_for(self.superseded, seconds)

    def join(self, seconds: float | None = None) -> bool:
        """Wait until nothing runs or waits; False if it takes longer."""
        with self._condition:
            idle = self._condition.wait_for(
                lambda: self._waiting is None and not self._running, seconds
            )
        return bool(idle)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._running = False
                self._condition.notify_all()
                self._condition.wait_for(self.superseded)
                job = self._waiting
                self._waiting = None
                self._running = True
            try:
                if job is not None:
                    job(self.superseded)
            except Superseded:
                pass


def on_this_loop() -> Callable[[Callable[[], Any]], Any]:
    """A function that runs others where the caller is: on its event loop, or at once without one.

    Widgets belong to the thread of the notebook's event loop, and other threads must not change
    them.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return lambda act: act()
    return loop.call_soon_threadsafe
