"""Signals that come from outside, to a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from m3bsr.engine.checkpoint import load_state, verify_checkpoint

SCRIPT = Path(__file__).with_name("tiny_run.py")


@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)], ids=["SIGINT", "SIGTERM"])
def test_signal_to_the_process_group_finishes_the_step_and_leaves_a_checkpoint(tmp_path, signum, workers):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--slow", "--num-workers", str(workers)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("step 1"):
            break
    os.killpg(process.pid, signum)  # like Ctrl-C: to the loader's workers too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in err
    assert "step" not in out  # step 1 was finished and none was begun
    last = tmp_path / "checkpoints" / "last"
    assert verify_checkpoint(last) == 2 and load_state(last)["progress"]["step"] == 2
