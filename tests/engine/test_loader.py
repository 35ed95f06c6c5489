"""A worker of the loader whose run was killed while it started."""

from __future__ import annotations

import os
import signal

import pytest

from m3bsr.engine.loader import _init_worker


@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_whose_parent_is_gone_does_not_wait_for_ever(alive):
    """The parent is another process now than the one that wanted the worker."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _init_worker(os.getppid() if alive else os.getpid(), 0)
            code = 7 if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (7 if alive else 0)
