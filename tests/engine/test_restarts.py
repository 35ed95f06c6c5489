"""Whoever starts a run again, a batch script under Slurm or torchrun, gets the bits of a run that was left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.engine import read_log

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "reliability.md"


def logged(run_dir):
    return [(r["kind"], r["step"], r.get("loss")) for r in read_log(run_dir / "log.jsonl")]


def assert_as_if_left_alone(tiny, tmp_path, run_dir):
    whole, _ = tiny.run(tmp_path / "whole", save_every=1)
    found = load_file(run_dir / "checkpoints/last/model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.state_dict().items())
    logs = [
        [(r["kind"], r["step"], r.get("loss")) for r in read_log(d / "log.jsonl")]
        for d in (tmp_path / "whole", run_dir)
    ]
    assert logs[0] == logs[1]
    assert sorted(path.name for path in run_dir.glob("died-at-*")) == ["died-at-2", "died-at-5"]


@pytest.mark.slow
def test_the_slurm_script_of_the_documentation_asks_for_another_turn(tiny, tmp_path):
    """Without Slurm: `srun` runs our tiny run, and a requeued job is the script started again."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "job.sh").write_text(script)
    tools, run_dir = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    run = f"{sys.executable} {HERE / 'restarted_run.py'} {run_dir} SIGTERM SIGTERM"
    for name, text in {
        "srun": f'echo "$@" >> {tmp_path}/asked\n{run}',
        "scontrol": f'echo "$@" >> {tmp_path}/queue',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    codes = []
    while not codes or codes[-1]:
        assert len(codes) < 5
        codes.append(subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment, timeout=100).returncode)
        queued = (tmp_path / "queue").read_text().splitlines() if (tmp_path / "queue").exists() else []
        assert queued == ["requeue 17"] * len([code for code in codes if code])
    assert codes == [143, 143, 0]
    assert "--run.resume" in (tmp_path / "asked").read_text()
    assert_as_if_left_alone(tiny, tmp_path, run_dir)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=3"]
    command += [str(HERE / "restarted_run.py"), str(tmp_path / "run"), "SIGKILL", "SIGTERM"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("going on from") == 2
    assert_as_if_left_alone(tiny, tmp_path, tmp_path / "run")
