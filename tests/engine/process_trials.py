"""Runs as real processes: stopped by signals, killed at random moments, resumed. Prints a line of JSON.

    python tests/engine/process_trials.py FOLDER [--kills 20] [--writes 20] [--seed 0]

The runs are forks of this process, so that a trial costs no import.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run
import torch
from safetensors.torch import load_file

from m3bsr.cli.common import one_line_errors
from m3bsr.engine import checkpoint
from m3bsr.engine.checkpoint import load_state, newest_checkpoint, verify_checkpoint
from m3bsr.engine.log import read_log
from m3bsr.engine.rng import seed_everything

# What a run that is killed holds: a moving average of the weights, and a worker process that draws random numbers.
HOW = {"epochs": 6, "save_every": 1, "resume": True, "ema_decay": 0.9}


def fork_run(run_dir: Path, step_s: float = 0.0, die_at_write: int | None = None, **kwargs: object) -> int:
    """Start a run in a fork with a session and an output file of its own; its process id."""
    run_dir.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(run_dir / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        code = 1
        try:
            seed_everything(0)  # Python seeds its generator anew in a fork
            if die_at_write is not None:
                die_while_writing(die_at_write)
            code = one_line_errors(lambda _: tiny_run.run_slowly(run_dir, step_s, **kwargs))([])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return pid


def die_while_writing(number: int) -> None:
    """Have this process killed in the ``number``-th operation on files that writing checkpoints does.

    A file that was being written is left half as long.
    """
    count = 0

    def dying(operation: Callable[..., Any], path_of: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                if path_of is not None:
                    operation(*args, **kwargs)
                    os.truncate(path_of(*args), os.path.getsize(path_of(*args)) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return wrapped

    checkpoint.save_file = dying(checkpoint.save_file, lambda tensors, path: path)
    torch.save = dying(torch.save, lambda state, path: path)
    for name in ("_sha256", "flush", "_remove"):
        setattr(checkpoint, name, dying(getattr(checkpoint, name)))
    pathlib.Path.rename = dying(pathlib.Path.rename)


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
    chance, how = random.Random(seed), {**HOW, "num_workers": 1}
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
    same = [compare(folder / "whole", folder / f"killed-{number}") for number in range(runs)]
    return {"kills": done, "runs": runs, **{name: all(one[name] for one in same) for name in same[0]}}


def write_trials(folder: Path, kills: int) -> dict[str, object]:
    """SIGKILL in the operations of writing checkpoints, one after the other from the first of the second save on."""
    assert wait(fork_run(folder / "whole-w", **HOW)) == 0
    same = []
    for kill in range(kills):
        run_dir = folder / f"write-{kill}"
        assert wait(fork_run(run_dir, die_at_write=FIRST_SAVE + kill, **HOW)) == -signal.SIGKILL
        assert newest_checkpoint(run_dir / "checkpoints")[0] is not None, f"kill {kill} left no whole checkpoint"
        code = wait(fork_run(run_dir, **HOW))
        assert code == 0, (run_dir / "output.txt").read_text()
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        same.append(compare(folder / "whole-w", run_dir) | {"tidy": left == ["best", "last", "previous"]})
    return {"kills": kills, **{name: all(one[name] for one in same) for name in same[0]}}


# Operations on files in the first save: clear away, two files, three checksums, five flushes, a rename, and once more.
FIRST_SAVE = 13


def compare(whole: Path, found: Path) -> dict[str, bool]:
    """Whether two runs ended alike: weights, what a resume needs, and their logs."""
    last = "checkpoints/last"
    one, other = (load_file(run / last / "model.safetensors") for run in (whole, found))
    states = [{**load_state(run / last), "config": 0} for run in (whole, found)]
    for state in states:
        state["progress"].pop("window")
    logs = [[(r["kind"], r["step"], r.get("loss")) for r in read_log(run / "log.jsonl")] for run in (whole, found)]
    return {
        "equal": one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one),
        "equal_states": tiny_run.same_bits(*states),
        "equal_logs": logs[0] == logs[1],
    }


def two_signals_trial(run_dir: Path) -> dict[str, object]:
    """Ctrl-C twice in a step of a minute."""
    pid, output = fork_run(run_dir, step_s=60.0, num_workers=1), run_dir / "output.txt"
    while not output.exists() or "step 0\n" not in output.read_text():
        time.sleep(0.01)
    time.sleep(0.5)  # a worker that is still being forked says so when it is interrupted
    began = time.monotonic()
    for _ in range(2):
        os.killpg(pid, signal.SIGINT)
        time.sleep(0.3)
    return {"code": wait(pid), "seconds": time.monotonic() - began, "output": output.read_text()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--writes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "SIGINT": signal_trial(args.folder / "sigint", signal.SIGINT, num_workers=2),
        "SIGTERM": signal_trial(args.folder / "sigterm", signal.SIGTERM, num_workers=1),
        "SIGINT twice": two_signals_trial(args.folder / "twice"),
        "SIGKILL": kill_trials(args.folder, args.kills, args.seed),
        "SIGKILL while writing": write_trials(args.folder, args.writes),
    }
    print(json.dumps(report))
