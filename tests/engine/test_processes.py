"""Real processes that are signalled and killed; process_trials.py runs them, once for all tests here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    script = Path(__file__).with_name("process_trials.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("trials")), "--kills", "5", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_to_the_process_group_finishes_the_step_and_leaves_a_checkpoint(report, name):
    found = report[name]
    assert found["code"] == 128 + signal.Signals[name], found["output"]
    assert "Traceback" not in found["output"]
    assert found["output"].count("step") == 2  # step 1 was finished and none was begun
    assert found["manifest_step"] == found["progress_step"] == 2


def test_killed_at_random_moments_ends_with_the_same_bits(report):
    """Kills hit steps, evaluations and checkpoint writes alike."""
    found = report["SIGKILL"]
    assert found["kills"] == 5 and found["equal"] and found["equal_logs"]
