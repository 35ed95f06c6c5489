"""What tests of several folders share. ``tests`` and ``datasets`` are no packages: their modules are loaded by path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# For all tests, whichever of them are run; a machine that is busy with something else is no fault of theirs.
settings.register_profile("quick", max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("quick")

ROOT = Path(__file__).resolve().parents[1]


def _load(path: str):
    name = "_".join(Path(path).with_suffix("").parts[-2:])
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # so that its objects can be pickled for worker processes
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def load():
    """``load("datasets/nyud/prepare.py")``: a Python file of the repository as a module, always the same one."""
    return _load


@pytest.fixture(scope="session")
def many(load):
    """The module many.py of the tests of the engine: several processes."""
    return load("tests/engine/many.py")


@pytest.fixture
def config_file(tmp_path):
    """``config_file("config = Config()")``: path of a config file with this text below the imports, in line 2."""

    def write(text: str) -> str:
        (tmp_path / "job.py").write_text("from m3bsr.config import Config, Plan\n" + text)
        return str(tmp_path / "job.py")

    return write
