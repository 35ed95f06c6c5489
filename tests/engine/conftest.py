from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny(load):
    """The module tiny_run.py beside this file."""
    return load("tests/engine/tiny_run.py")
