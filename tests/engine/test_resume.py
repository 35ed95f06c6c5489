"""A run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from m3bsr.engine.log import read_log


def final_bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def log_without_times(path):
    timed = ("samples_per_s", "step_ms", "data_wait")
    return [{k: v for k, v in record.items() if k not in timed} for record in read_log(path / "log.jsonl")]


def interrupted(tiny, run_dir, at_step, signum=signal.SIGTERM, **kwargs):
    """Run until ``signum`` comes in step ``at_step`` (0-based), then once more with new objects to the end."""
    shape = {k: v for k, v in kwargs.items() if k in ("epochs", "batch_size", "accumulate", "max_steps", "experts")}
    parts = tiny.make_parts(**shape)
    parts[0].on_step = lambda step: os.kill(os.getpid(), signum) if step == at_step else None
    _, stopped = tiny.run(run_dir, parts=parts, **{k: v for k, v in kwargs.items() if k != "experts"})
    assert stopped.stopped_by == signum
    assert stopped.progress.step == at_step + 1
    model, result = tiny.run(run_dir, resume=True, **kwargs)
    assert result.stopped_by is None
    assert model.steps == list(range(at_step + 1, result.progress.total_steps))
    return model


@pytest.mark.parametrize(
    ("at_step", "kwargs"),
    [
        (0, {}),
        (3, {}),
        (5, {}),
        (5, {"precision": "bf16", "accumulate": 2, "log_every": 3, "epochs": 4}),
        (4, {"log_every": 3, "epochs": 2, "experts": True}),
        (5, {"loss_balance": "uncertainty"}),
        (9, {"loss_balance": "dwa", "epochs": 4}),
    ],
    ids=[
        "first step",
        "end of an epoch",
        "within an epoch",
        "bf16, accumulated, within a log window",
        "experts",
        "uncertainty",
        "dwa",
    ],
)
def test_stop_and_resume_is_bit_equal(tiny, tmp_path, at_step, kwargs):
    whole, _ = tiny.run(tmp_path / "whole", **kwargs)
    parted = interrupted(tiny, tmp_path / "parted", at_step, **kwargs)
    assert_same_bits(final_bits(whole), final_bits(parted))
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "parted")


def test_worker_processes_do_not_change_a_run(tiny, tmp_path):
    alone, _ = tiny.run(tmp_path / "a", epochs=1)
    helped = interrupted(tiny, tmp_path / "b", 1, epochs=1, num_workers=1)
    assert_same_bits(final_bits(alone), final_bits(helped))


def test_optimizer_and_schedule_come_back(tiny, tmp_path):
    whole = tiny.make_parts()
    tiny.run(tmp_path / "whole", parts=whole)
    interrupted(tiny, tmp_path / "parted", 4)
    again = tiny.make_parts()
    _, result = tiny.run(tmp_path / "parted", parts=again, resume=True)  # nothing is left to do
    assert result.step_ms == [] and result.progress.metrics
    expected, found = whole[4].state_dict(), again[4].state_dict()
    assert expected["param_groups"] == found["param_groups"]
    for index, slots in expected["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, found["state"][index][name]), name


def test_longer_run_continues_on_a_longer_schedule(tiny, tmp_path):
    tiny.run(tmp_path, epochs=1)
    parts = tiny.make_parts(epochs=3)
    model, result = tiny.run(tmp_path, parts=parts, epochs=3, resume=True)
    assert model.steps == list(range(4, 12))
    rates = {r["step"]: r["lr"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"}
    assert rates[5] > rates[4] * 1.5 and result.progress.total_steps == 12


def test_resume_refuses_when_other_parameters_train(tiny, tmp_path):
    tiny.run(tmp_path, epochs=1)
    parts = list(tiny.make_parts())
    parts[0].heads["depth"].requires_grad_(False)
    parts[4] = tiny.make_optimizer("adamw", parts[0], lr=0.05)
    with pytest.raises(ValueError, match="other parameters trained"):
        tiny.run(tmp_path, parts=parts, resume=True)


def test_resume_without_a_checkpoint_starts_at_the_beginning(tiny, tmp_path, capsys):
    model, _ = tiny.run(tmp_path, epochs=1, resume=True)
    assert model.steps == [0, 1, 2, 3]
    assert "starting from the beginning" in capsys.readouterr().err


def test_resume_with_damaged_checkpoints_only_is_an_error(tiny, tmp_path):
    tiny.run(tmp_path, epochs=1)
    for path in tmp_path.glob("checkpoints/*/state.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no whole checkpoint is left in .*: start the run anew"):
        tiny.run(tmp_path, resume=True)
