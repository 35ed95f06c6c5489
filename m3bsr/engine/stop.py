"""Ending a run from outside without losing it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from m3bsr.engine.distributed import largest


class StopSignal:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second SIGINT stops at once.

    The loop asks :meth:`agreed` between steps. In other threads than the main one, where Python cannot install
    handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that ends the run on all processes, once they agreed on it."""
        self._noted: int | None = None
        self._before: dict[int, Any] = {}

    def agreed(self) -> bool:
        """Whether a signal came to any process so far; all of them ask at the same place and get the same answer.

        One message of eight bytes: 0.2 ms between processes that have a core each, nothing for one process alone.
        """
        if self.signum is None:
            self.signum = largest(self._noted or 0) or None
        return self.signum is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._noted is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self._noted is None:
            self._noted = signum
