"""Real processes that are signalled and killed; process_trials.py runs them, once for all tests here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def run_trials(folder, kills, writes, seed):
    script = Path(__file__).with_name("process_trials.py")
    command = [sys.executable, str(script), str(folder), "--kills", kills, "--writes", writes, "--seed", seed]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_trials(tmp_path_factory.mktemp("trials"), kills=3, writes=3, seed=1)


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
    assert found["kills"] == 3 and found["equal"] and found["equal_states"] and found["equal_logs"], found


def test_killed_while_a_checkpoint_is_written_ends_with_the_same_bits(report):
    found = report["SIGKILL while writing"]
    assert found["kills"] == 3 and found["equal"] and found["equal_states"] and found["equal_logs"], found
    assert found["tidy"], found


def test_a_second_sigint_stops_at_once(report):
    found = report["SIGINT twice"]
    assert found["code"] == 130 and found["seconds"] < 30, found
    assert "Traceback" not in found["output"] and "step 1" not in found["output"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_moments_and_twenty_while_writing(tmp_path):
    found = run_trials(tmp_path, kills=20, writes=20, seed=2)
    for name in ("SIGKILL", "SIGKILL while writing"):
        assert found[name]["kills"] == 20
        assert found[name]["equal"] and found[name]["equal_states"] and found[name]["equal_logs"], found
