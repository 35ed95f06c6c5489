from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def _load():
    # The name is in sys.modules so that objects can be pickled for loader workers.
    spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    """The module tiny_run.py beside this file."""
    return sys.modules.get("tiny_run") or _load()
