#!/usr/bin/env python3
"""What each head costs and its share of a training step: tools/bench_heads.py [--heads ...]."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("m3bsr") is None:  # not installed: use the checkout that this file is in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from m3bsr.cli.bench_heads import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
