"""Faults that the loop outlives: a disk that is really full, fp16 overflows, a crash before the first checkpoint."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys

import pytest
import torch

from m3bsr.engine import NonFiniteError, read_log
from m3bsr.engine import evaluate as evaluate_module
from m3bsr.engine import train as train_module
from m3bsr.engine.checkpoint import load_state, verify_checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 4 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs needs Linux and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def test_a_full_disk_leaves_the_run_going_and_the_old_checkpoint_whole(tiny, tmp_path, small_disk, capsys):
    whole, _ = tiny.run(tmp_path / "whole", parts=tiny.make_parts(width=48))
    parts, steps = tiny.make_parts(width=48), []

    def on_step(step):
        if step == 2:
            fill(small_disk)
        if 2 < step <= 6:
            steps.append(verify_checkpoint(run_dir / "checkpoints" / "last"))
        if step == 6:
            (small_disk / "ballast").unlink()

    parts[0].on_step, run_dir = on_step, small_disk / "run"
    model, result = tiny.run(run_dir, parts=parts, save_every=1)
    assert steps == [2, 2, 2, 2] and result.progress.step == 8
    assert capsys.readouterr().err.count("could not write checkpoint") >= 4
    assert verify_checkpoint(run_dir / "checkpoints" / "last") == 8
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    logged = [(r["kind"], r["step"]) for r in read_log(run_dir / "log.jsonl")]
    assert len(logged) == len(set(logged)) and logged[-1] == ("val", 8)


def test_a_disk_that_stays_full_ends_the_run_with_the_old_checkpoint_whole(tiny, small_disk):
    parts = tiny.make_parts(width=48)
    parts[0].on_step = lambda step: fill(small_disk) if step == 5 else None
    with pytest.raises(OSError, match="No space left on device|could not write"):
        tiny.run(small_disk, parts=parts, save_every=1)
    assert verify_checkpoint(small_disk / "checkpoints" / "last") == 5
    (small_disk / "ballast").unlink()
    _, result = tiny.run(small_disk, parts=tiny.make_parts(width=48), resume=True)
    assert result.progress.step == 8


def test_kept_are_last_previous_and_best_and_nothing_else(tiny, tmp_path):
    tiny.run(tmp_path, save_every=1, epochs=3)
    names = {path.name: verify_checkpoint(path) for path in (tmp_path / "checkpoints").iterdir()}
    assert names.keys() == {"last", "previous", "best"} and names["last"] == 12 and names["previous"] == 11


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """The loss scaler works on the CPU too; only autocast to fp16 does not, and is left out."""
    for module in (sys.modules[train_module.__module__], sys.modules[evaluate_module.__module__]):
        monkeypatch.setattr(module, "autocast", lambda device, precision: contextlib.nullcontext())


def overflowing(tiny, steps, **kwargs):
    """The tiny run with gradients that overflow at the given steps, as those of scaled fp16 losses do."""
    parts, at = tiny.make_parts(**kwargs), []
    parts[0].on_step = at.append
    parts[0].heads["semseg"].weight.register_hook(lambda grad: grad * (math.inf if at[-1] in steps else 1))
    return parts


def test_fp16_overflows_are_skipped_and_counted_and_resume_is_exact(tiny, tmp_path, fp16_on_cpu):
    whole, result = tiny.run(tmp_path / "whole", parts=overflowing(tiny, {1, 5}), precision="fp16")
    assert result.progress.num_overflows == 2
    lines = [r for r in read_log(tmp_path / "whole" / "log.jsonl") if r["kind"] == "train"]
    assert [r.get("num_overflows", 0) for r in lines] == [0, 1, 1, 1, 1, 2, 2, 2]
    state = load_state(tmp_path / "whole" / "checkpoints" / "last")
    assert state["scaler"]["scale"] == 2.0**14 and state["progress"]["num_overflows"] == 2
    assert all(torch.isfinite(p).all() for p in whole.parameters())

    parts = overflowing(tiny, {1, 5})
    real = parts[0].on_step

    def stop_at_2(step):
        real(step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    parts[0].on_step = stop_at_2
    tiny.run(tmp_path / "parted", parts=parts, precision="fp16")
    again = overflowing(tiny, {1, 5})
    parted, result = tiny.run(tmp_path / "parted", parts=again, precision="fp16", resume=True)
    assert result.progress.num_overflows == 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parted.state_dict()[name]), name


def test_gradients_that_no_scale_can_mend_stop_an_fp16_run(tiny, tmp_path, fp16_on_cpu):
    """From 2 ** 16 the scale is below 1 after 17 overflows."""
    parts = overflowing(tiny, range(1, 100), epochs=6)
    with pytest.raises(NonFiniteError, match=r"step 19: the gradient of task semseg .* images: .*last good checkpoint"):
        tiny.run(tmp_path, parts=parts, epochs=6, precision="fp16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs CUDA")
def test_fp16_on_cuda_counts_its_overflows(tiny, tmp_path):
    _, result = tiny.run(tmp_path, parts=overflowing(tiny, {1, 5}), precision="fp16", device="cuda")
    assert result.progress.num_overflows == 2 and result.progress.step == 8


def test_tensorboard_has_no_step_twice_after_a_crash_before_the_first_checkpoint(tiny, tmp_path):
    parts = tiny.make_parts()

    def crash(step):
        if step == 2:
            raise KeyboardInterrupt

    parts[0].on_step = crash
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, parts=parts, tensorboard=True)
    tiny.run(tmp_path, tensorboard=True, resume=True)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"] == list(range(1, 9))
