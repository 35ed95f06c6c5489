"""Kill a run with SIGKILL at random moments, resume it each time, compare the end with an uninterrupted run.

    python tests/engine/kill_trials.py FOLDER [--kills 20] [--seed 0]

The runs are forks of this process, so that a trial costs no import. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
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

from m3bsr.engine.log import read_log

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--kills", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.set_num_threads(1)
chance = random.Random(args.seed)
RUN = {"epochs": 6, "save_every": 1, "resume": True}


def fork_run(run_dir: Path) -> int:
    """Start a run in a fork; its process id."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):
            code = 1
            try:
                tiny_run.run(run_dir, **RUN)
                code = 0
            finally:
                os._exit(code)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


began = time.perf_counter()
assert wait(fork_run(args.folder / "whole")) == 0
whole_s = time.perf_counter() - began

kills, runs, steps = 0, 0, set()
while kills < args.kills:  # a run that got to its end is followed by another one
    run_dir, ended = args.folder / f"killed-{runs}", False
    while not ended:
        pid = fork_run(run_dir)
        if kills < args.kills:
            time.sleep(chance.uniform(0.0, 0.5) * whole_s)
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        assert code in (0, -signal.SIGKILL), f"a resumed run failed with exit code {code}"
        kills += code != 0
        ended = code == 0
    runs += 1

equal, double_lines = True, 0
whole = load_file(args.folder / "whole/checkpoints/last/model.safetensors")
for number in range(runs):
    found = load_file(args.folder / f"killed-{number}/checkpoints/last/model.safetensors")
    equal &= all(torch.equal(whole[name], found[name]) for name in whole)
    lines = [(r["kind"], r["step"]) for r in read_log(args.folder / f"killed-{number}/log.jsonl")]
    expected = [(r["kind"], r["step"]) for r in read_log(args.folder / "whole/log.jsonl")]
    double_lines += len(lines) - len(set(lines))
    equal &= lines == expected
print(json.dumps({"kills": kills, "runs": runs, "equal": equal, "double_lines": double_lines}))
sys.exit(0 if equal else 1)
