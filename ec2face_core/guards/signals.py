"""What SIGTERM and SIGINT do to a command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_signals(action: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    """Within the block SIGTERM and SIGINT do `action`; only the main thread may call this.

    Args:
        action: a function of the signal's number and the frame; or `signal.SIG_DFL`, which ends the
            process at once. Python calls a function late, if the process waits in native code for
            another rank, and an import may swallow the exception that it raises.
    """
    before = {sent: signal.signal(sent, action) for sent in ENDING}
    try:
        yield
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)
