"""One of several processes is killed, hangs or gets a signal: the others end, with a line and an exit code."""

from __future__ import annotations

import math
import os
import signal
import time

import pytest
import torch

from m3bsr.cli.common import BAD_NUMBERS, LOST_PROCESS, one_line_errors
from m3bsr.engine import checkpoint, distributed
from m3bsr.engine.damaged import ReplaceDamaged

NUM = 3


def start(tiny, many, folder, run_dir, rank_1_does, timeout_s, **kwargs):
    """Three processes train; process 1 does something in its third step (0-based 2)."""

    @one_line_errors
    def command(rank):
        parts = tiny.make_parts(batch_size=1)
        parts[0].on_step = lambda step: rank_1_does() if rank == 1 and step == 2 else None
        with distributed.processes(torch.device("cpu"), timeout_s):
            _, result = tiny.run(run_dir, parts=parts, batch_size=1, **kwargs)
        return 128 + result.stopped_by if result.stopped_by else 0

    folder.mkdir(parents=True, exist_ok=True)
    return many.start(NUM, command, folder)


def said(folder, rank):
    return (folder / f"output-{rank}.txt").read_text().strip()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hung"])
def test_the_others_end_with_a_line_that_names_it(tiny, many, tmp_path, how):
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    timeout_s = 60 if how == "killed" else 3
    began = time.monotonic()
    what = kill if how == "killed" else lambda: time.sleep(40)
    pids = start(tiny, many, tmp_path, tmp_path / "run", what, timeout_s, save_every=1)
    codes = many.wait([pids[0], pids[2]], timeout_s=30)
    assert codes == [LOST_PROCESS] * 2, [said(tmp_path, rank) for rank in range(NUM)]
    assert time.monotonic() - began < 25, "a killed process is noticed at once, a hung one after the time it is given"
    os.kill(pids[1], signal.SIGKILL) if how == "hung" else None
    os.waitpid(pids[1], 0)
    for rank in (0, 2):
        line = said(tmp_path, rank)
        assert "process 1 of 3 ended or does not answer" in line and "--run.resume" in line
        assert line.count("\n") == 0 and line.startswith("error: " if rank == 0 else "process 2: error: ")
    assert checkpoint.verify_checkpoint(tmp_path / "run/checkpoints/last") == 2
    # and the run goes on from there
    assert many.wait(start(tiny, many, tmp_path, tmp_path / "run", int, 60, resume=True)) == [0] * NUM
    assert "going on from" in said(tmp_path, 0)


def test_a_signal_to_one_process_ends_all_after_the_same_step(tiny, many, tmp_path):
    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    pids = start(tiny, many, tmp_path, tmp_path / "run", terminate, 60)
    assert many.wait(pids) == [128 + signal.SIGTERM] * NUM
    assert checkpoint.load_state(tmp_path / "run/checkpoints/last")["progress"]["step"] == 3


def test_a_bad_number_in_one_process_stops_all_before_the_step(tiny, many, tmp_path):
    @one_line_errors
    def command(rank):
        parts = tiny.make_parts(batch_size=1)

        def spoil(step):
            if rank == 1 and step == 2:
                parts[0].stem.weight.data.fill_(math.nan)

        parts[0].on_step = spoil
        with distributed.processes(torch.device("cpu"), 60):
            tiny.run(tmp_path / "run", parts=parts, batch_size=1)
        return 0

    assert many.wait(many.start(2, command, tmp_path)) == [BAD_NUMBERS] * 2
    for rank in range(2):
        assert "step 3: the loss" in said(tmp_path, rank)
        assert said(tmp_path, rank).count(".jpg") == 2, "of both processes"


def test_damaged_samples_are_counted_over_all_processes(tiny, many, tmp_path):
    class Damaged(tiny.TinySet):
        def __getitem__(self, index):
            if index == 5:
                raise ValueError("005.jpg: cannot be read")
            return super().__getitem__(index)

    def job(rank):
        parts = list(tiny.make_parts(batch_size=1, epochs=1))
        parts[2] = ReplaceDamaged(Damaged())
        with distributed.processes(torch.device("cpu"), 60):
            _, result = tiny.run(tmp_path / "run", parts=parts, batch_size=1, epochs=1, max_skipped=0.5)
        return result.progress.damaged

    expected = {"train": ["005.jpg: cannot be read"], "val": []}
    assert many.run(2, job, tmp_path) == [expected, expected]
