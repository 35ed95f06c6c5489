"""One logger for the package: short lines on stderr, quiet unless a command line turns it on."""

from __future__ import annotations

import logging
import sys


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of this package."""
    return logging.getLogger(name)


class _Stderr(logging.Handler):
    """To what ``sys.stderr`` is when a line comes; a ``StreamHandler`` holds on to one that may be closed by then."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def show_log(level: int = logging.INFO) -> None:
    """Print the package's messages on stderr (command lines call this once)."""
    logger = logging.getLogger("m3bsr")
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(level)
