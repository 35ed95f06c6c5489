"""The commands of the documentation can be typed as they stand there: tools/train.py CONFIG."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("datasets/*/prepare.py"), *ROOT.glob("datasets/*/make_*.py")])


def test_every_tool_is_a_command():
    assert len(TOOLS) > 20
    for tool in TOOLS:
        text = tool.read_text()
        assert text.startswith("#!/usr/bin/env python3\n") and text.count("#!") == 1, tool.name
        assert os.access(tool, os.X_OK), tool.name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_every_command_explains_itself(tool):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([str(tool), "--help"], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr
