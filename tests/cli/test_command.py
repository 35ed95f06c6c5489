"""``m3bsr COMMAND``: the console script, as pip installs it, and the commands behind it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3bsr.cli.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_plan_verified_by_the_real_command(job) -> None:
    """Installed or not, what the script calls is ``m3bsr.cli.__main__:main``."""
    assert 'm3bsr = "m3bsr.cli.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    budget = ["--step-ratio", "0.5", "--num-blocks", "2", "--top", "1", "--train.batch-size", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "m3bsr.cli", "plan", job.config, *budget, "--verify", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert rows and all(row["step_ratio"] <= 0.5 for row in rows)
    for row in rows:
        assert row["measured_peak_bytes"] == pytest.approx(row["predicted_peak_bytes"], rel=0.05)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str) -> None:
    assert (ROOT / "tools" / f"{name}.py").is_file()
    source = importlib.util.find_spec(f"m3bsr.cli.{name}")
    assert source is not None and "def main(" in Path(str(source.origin)).read_text()


def test_help_and_unknown_commands(capsys) -> None:
    assert main([]) == 0
    assert {"train", "measure_cost"} <= {*capsys.readouterr().out.split()}
    assert main(["plam"]) == 2
    assert "unknown command 'plam' (did you mean 'plan'?)" in capsys.readouterr().err
    assert main(["measure-cost", "no/such/config.py"]) == 2
    assert "no/such/config.py" in capsys.readouterr().err
