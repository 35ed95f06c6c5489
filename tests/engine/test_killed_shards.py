"""Runs spread over processes (FSDP2) that are killed, at random moments or while writing, end with the same bits."""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.backbones import MoEVisionTransformer
from m3bsr.cli.common import LOST_PROCESS, one_line_errors
from m3bsr.engine import checkpoint, distributed
from m3bsr.engine.log import read_log
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.rng import seed_everything
from m3bsr.engine.schedule import make_schedule
from m3bsr.engine.shards import is_sharded, shard
from m3bsr.heads import HEADS
from m3bsr.models import MultiTaskModel
from m3bsr.plan import Plan
from m3bsr.tasks import TASKS

NUM, STEPS = 2, 4
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")


def train(tiny, run_dir, on_step):
    """Four steps in two epochs, a checkpoint after each, gate noise, drop path and augmentation, by AdamW."""
    seed_everything(0)
    backbone = MoEVisionTransformer(
        (16, 16), patch_size=8, embed_dim=8, depth=2, num_heads=2, moe_blocks=(1,), tasks=("depth", "semseg"),
        num_experts=4, top_k=2, moe_mlp_ratio=1, noise_std=1.0, drop_path=0.3,
    )  # fmt: skip
    backbone.set_plan(Plan(train_blocks=(1,), drop_blocks=(0,), keep_rate=0.5))
    model = MultiTaskModel(backbone, {t: HEADS["light"](8, n, head_dim=4) for t, n in (("depth", 1), ("semseg", 3))})
    set_step = model.set_step
    model.set_step = lambda step: (on_step(step), set_step(step))
    shard(model)
    assert is_sharded(model)
    optimizer = make_optimizer("adamw", model, lr=0.01)
    tasks = {"depth": TASKS["depth"](), "semseg": TASKS["semseg"](num_classes=3)}
    sets = tiny.TinySet(12, size=(16, 16)), tiny.TinySet(3, augment=False, size=(16, 16))
    parts = (model, tasks, *sets, optimizer, make_schedule("cosine", optimizer, total_steps=STEPS))
    tiny.run(run_dir, parts=parts, batch_size=3, epochs=2, eval_every=0, save_every=1, resume=True, num_workers=1)


def start(tiny, many, run_dir, on_step=lambda rank, step: None, num=NUM):
    @one_line_errors
    def command(rank):
        with distributed.processes(torch.device("cpu"), 120):
            train(tiny, run_dir, functools.partial(on_step, rank))
        return 0

    run_dir.mkdir(parents=True, exist_ok=True)
    return many.start(num, command, run_dir)


def to_the_end(tiny, many, run_dir, on_step=lambda rank, step: None):
    codes = many.wait(start(tiny, many, run_dir, on_step), timeout_s=300)
    assert codes == [0] * NUM, (run_dir / "output-0.txt").read_text()


def watch(folder, die_at=None):
    """The operations on files in ``folder`` from now on, in a list.

    Before number ``die_at`` this process is killed, the file that it wrote last cut to half.
    """
    seen, written = [], None

    def note(event, args):
        nonlocal written
        if event not in ("open", *CHANGES) or not str(args[0]).startswith(str(folder)):
            return
        if len(seen) == die_at:
            if written is not None and os.path.exists(written):
                os.truncate(written, os.path.getsize(written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event)
        if event == "open" and isinstance(args[1], str) and "w" in args[1]:
            written = args[0]

    sys.addaudithook(note)
    return seen


@pytest.fixture(scope="module")
def whole(tiny, many, tmp_path_factory):
    """A run that was left alone, its seconds, and how many operations on files each process has in its third save."""
    run_dir, began, seen = tmp_path_factory.mktemp("whole"), time.monotonic(), {}

    def count(rank, step):
        if step == 2:
            seen[rank] = watch(run_dir / "checkpoints")
        if step == 3:
            (run_dir / f"operations-{rank}").write_text(str(len(seen[rank])))

    to_the_end(tiny, many, run_dir, count)
    return run_dir, time.monotonic() - began, [int((run_dir / f"operations-{rank}").read_text()) for rank in range(NUM)]


def assert_same_end(tiny, run_dir, whole_dir):
    """Weights and optimizer state of both processes to the bit, all that a resume needs, no line of the log twice."""
    both = [folder / "checkpoints/last" for folder in (run_dir, whole_dir)]
    shards = [{path.name: load_file(path) for path in (last / "shards").iterdir()} for last in both]
    assert len(shards[0]) == NUM and tiny.same_bits(*shards)
    states = [checkpoint.load_state(last) for last in both]
    for part in ("rng", "rng_of_others", "optimizer", "scheduler"):
        assert tiny.same_bits(*(state[part] for state in states)), part
    assert states[0]["progress"]["metrics"] == states[1]["progress"]["metrics"]
    logs = [read_log(folder / "log.jsonl") for folder in (run_dir, whole_dir)]
    found, expected = ([(r["kind"], r["step"], r.get("loss")) for r in log] for log in logs)
    assert found == expected
    assert sorted(path.name for path in both[0].parent.iterdir()) == ["best", "last", "previous"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_killed_at_random_moments_and_resumed_to_the_same_bits(tiny, many, tmp_path, whole):
    """Six kills, also before the first checkpoint; a run that got to its end is followed by another one."""
    whole_dir, whole_s, _ = whole
    chance, kills, runs = random.Random(0), 0, 0
    while kills < 6:
        ended = False
        while not ended:
            pids = start(tiny, many, tmp_path / str(runs))
            if kills < 6:
                time.sleep(chance.uniform(0.2, 0.9) * whole_s)
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            codes = many.wait(pids, timeout_s=300)
            assert set(codes) <= {0, -signal.SIGKILL}, (tmp_path / f"{runs}/output-0.txt").read_text()
            ended = codes == [0] * NUM
            kills += not ended
        assert_same_end(tiny, tmp_path / str(runs), whole_dir)
        runs += 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("rank", "stride"), [(0, 4), (1, 1)])
def test_killed_while_the_parts_are_written_leaves_the_old_checkpoint(tiny, many, tmp_path, whole, rank, stride):
    """One process dies in operations on files of the third save; the other one says so, and the run goes on."""
    whole_dir, _, operations = whole
    assert operations[0] > 20 and operations[1] > 1
    for number in range(0, operations[rank], stride):
        run_dir = tmp_path / str(number)

        def deadly(r, step, checkpoints=run_dir / "checkpoints", number=number):
            if (r, step) == (rank, 2):
                watch(checkpoints, die_at=number)

        codes = many.wait(start(tiny, many, run_dir, deadly), timeout_s=300)
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == LOST_PROCESS, codes
        assert f"process {rank} of 2 ended" in (run_dir / f"output-{1 - rank}.txt").read_text()
        newest, complaints = checkpoint.newest_checkpoint(run_dir / "checkpoints")
        assert newest is not None and checkpoint.verify_checkpoint(newest) in (2, 3) and not complaints
        to_the_end(tiny, many, run_dir)
        assert_same_end(tiny, run_dir, whole_dir)


@pytest.mark.slow
def test_of_three_the_one_that_died_in_a_step_is_named(tiny, many, tmp_path):
    """The others wait for its weights in the forward pass, deep inside of the library."""

    def deadly(rank, step):
        if (rank, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    codes = many.wait(start(tiny, many, tmp_path, deadly, num=3), timeout_s=300)
    assert codes == [LOST_PROCESS, -signal.SIGKILL, LOST_PROCESS]
    for rank in (0, 2):
        assert "process 1 of 3 ended" in (tmp_path / f"output-{rank}.txt").read_text()
