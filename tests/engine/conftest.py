from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def _load(name):
    # The name is in sys.modules so that objects can be pickled for loader workers.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    """The module tiny_run.py beside this file."""
    return sys.modules.get("tiny_run") or _load("tiny_run")


@pytest.fixture(scope="session")
def many():
    """The module many.py beside this file: several processes."""
    return sys.modules.get("many") or _load("many")
