"""Runs as real processes: stopped by signals, killed at random moments, resumed. Prints a line of JSON.

    python tests/engine/process_trials.py FOLDER [--kills 20] [--seed 0]

The runs are forks of this process, so that a trial costs no import.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny_run
import torch
from safetensors.torch import load_file

from m3bsr.engine.checkpoint import load_state, verify_checkpoint
from m3bsr.engine.log import read_log


def fork_run(run_dir: Path, step_s: float = 0.0, **kwargs: object) -> int:
    """Start a run in a fork with a session and an output file of its own; its process id."""
    run_dir.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(run_dir / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        code = 1
        try:
            code = tiny_run.run_slowly(run_dir, step_s, **kwargs)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def signal_trial(run_dir: Path, signum: int, num_workers: int) -> dict[str, object]:
    """Send ``signum`` to the process group, as Ctrl-C and Slurm do, in step 1 (0-based)."""
    pid = fork_run(run_dir, step_s=0.3, num_workers=num_workers)
    output, deadline = run_dir / "output.txt", time.monotonic() + 60
    while not output.exists() or "step 1\n" not in output.read_text():
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.01)
    os.killpg(pid, signum)
    last = run_dir / "checkpoints" / "last"
    return {
        "code": wait(pid),
        "output": output.read_text(),
        "manifest_step": verify_checkpoint(last),
        "progress_step": load_state(last)["progress"]["step"],
    }


def kill_trials(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """SIGKILL after random times and resume until the end; compare with a run that was left alone."""
    chance, how = random.Random(seed), {"epochs": 6, "save_every": 1, "resume": True}
    began = time.perf_counter()
    assert wait(fork_run(folder / "whole", **how)) == 0
    whole_s = time.perf_counter() - began
    done, runs = 0, 0
    while done < kills:  # a run that got to its end is followed by another one
        ended = False
        while not ended:
            pid = fork_run(folder / f"killed-{runs}", **how)
            if done < kills:
                time.sleep(chance.uniform(0.0, 0.5) * whole_s)
                os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            assert code in (0, -signal.SIGKILL), f"a resumed run failed with exit code {code}"
            done += code != 0
            ended = code == 0
        runs += 1
    equal, equal_logs = True, True
    whole = load_file(folder / "whole/checkpoints/last/model.safetensors")
    lines = [(r["kind"], r["step"], r.get("loss")) for r in read_log(folder / "whole/log.jsonl")]
    for number in range(runs):
        found = load_file(folder / f"killed-{number}/checkpoints/last/model.safetensors")
        equal &= all(torch.equal(whole[name], found[name]) for name in whole)
        log = read_log(folder / f"killed-{number}/log.jsonl")
        equal_logs &= lines == [(r["kind"], r["step"], r.get("loss")) for r in log]
    return {"kills": done, "runs": runs, "equal": equal, "equal_logs": equal_logs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "SIGINT": signal_trial(args.folder / "sigint", signal.SIGINT, num_workers=2),
        "SIGTERM": signal_trial(args.folder / "sigterm", signal.SIGTERM, num_workers=1),
        "SIGKILL": kill_trials(args.folder, args.kills, args.seed),
    }
    print(json.dumps(report))
