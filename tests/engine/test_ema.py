"""The moving average of the weights: its formula, what is saved of it, and that a resumed run has the same bits."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from m3bsr.engine import CheckpointError, evaluate, load_weights, read_log
from m3bsr.engine.checkpoint import load_state
from m3bsr.engine.ema import Ema
from m3bsr.engine.loader import eval_loader
from m3bsr.moe import MoEMlp


def test_average_is_that_of_a_slow_reference():
    model, weights = nn.Linear(2, 1, bias=False), []
    ema = Ema(model, 0.5)
    expected = model.weight.detach().clone()
    for n in range(12):
        model.weight.data.add_(torch.randn(1, 2))
        weights.append(model.weight.detach().clone())
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights[-1]
    torch.testing.assert_close(ema.average["weight"], expected)
    with ema.applied():
        torch.testing.assert_close(model.weight.data, expected)
        assert torch.equal(ema.state_dict()["raw"]["weight"], weights[-1])
    assert torch.equal(model.weight.data, weights[-1])


def test_experts_are_averaged_one_by_one():
    """Their state dict is stacked, a copy: the average must read and set the experts themselves."""
    torch.manual_seed(0)
    layer = MoEMlp(4, 4, 3, 2)
    layer.set_trainable_experts((0, 2))
    before = [weight.detach().clone() for weight in layer.experts.fc1.weights]
    ema = Ema(layer, 0.5)
    with torch.no_grad():
        for weight in layer.experts.fc1.weights:
            weight.add_(1)
    ema.update()  # decay .1
    with ema.applied():
        average = layer.state_dict()["experts.fc1.weight"]
        for expert, moved in enumerate((0.9, 1.0, 0.9)):  # what is frozen has no average
            torch.testing.assert_close(average[expert], before[expert] + moved)
    assert torch.equal(layer.experts.fc1[0].weight, before[0] + 1)


def test_only_what_changes_is_averaged():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2))
    names = set(Ema(model, 0.9).average)
    assert names == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_a_failure_inside_puts_the_weights_back():
    model = nn.Linear(2, 1)
    ema, before = Ema(model, 0.9), model.weight.detach().clone()
    model.weight.data.add_(1)
    with pytest.raises(ArithmeticError), ema.applied():
        assert torch.equal(model.weight.data, before)
        raise ArithmeticError
    assert torch.equal(model.weight.data, before + 1)


def test_the_average_is_evaluated_and_saved(tiny, tmp_path):
    seen = []

    def reporter(model, metrics):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {}

    model, result = tiny.run(tmp_path, ema_decay=0.9, reporter=reporter)
    last = tmp_path / "checkpoints" / "last"
    saved, raw = load_file(last / "model.safetensors"), load_state(last)["ema"]["raw"]
    assert not torch.equal(saved["trunk.0.weight"], raw["trunk.0.weight"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name]) and torch.equal(tensor, seen[-1][name]), name
    fresh, tasks, _, val_set, *_ = tiny.make_parts()
    load_weights(fresh, last)
    scores = evaluate(fresh, tasks, eval_loader(val_set, batch_size=8), progress=False)
    assert scores["depth"] == pytest.approx(result.progress.metrics["depth"])


@pytest.mark.parametrize("at_step", [0, 3, 5])
def test_stop_and_resume_is_bit_equal(tiny, tmp_path, at_step):
    whole, _ = tiny.run(tmp_path / "whole", ema_decay=0.9, save_every=1)
    parts = tiny.make_parts()
    parts[0].on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == at_step else None
    tiny.run(tmp_path / "parted", parts=parts, ema_decay=0.9)
    parted, _ = tiny.run(tmp_path / "parted", ema_decay=0.9, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parted.state_dict()[name]), name
    raws = [load_state(tmp_path / n / "checkpoints/last")["ema"] for n in ("whole", "parted")]
    assert raws[0]["num_updates"] == raws[1]["num_updates"] == 8
    assert all(torch.equal(tensor, raws[1]["raw"][name]) for name, tensor in raws[0]["raw"].items())
    losses = [[r.get("loss") for r in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "parted")]
    assert losses[0] == losses[1]


def test_training_itself_is_as_without(tiny, tmp_path):
    tiny.run(tmp_path / "with", ema_decay=0.9)
    plain, _ = tiny.run(tmp_path / "without")
    raw = load_state(tmp_path / "with/checkpoints/last")["ema"]["raw"]
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in raw.items())


@pytest.mark.parametrize(("then", "now", "message"), [(0.9, 0.0, "trained with a moving"), (0.0, 0.9, "without a mov")])
def test_resume_with_and_without_do_not_mix(tiny, tmp_path, then, now, message):
    tiny.run(tmp_path, epochs=1, ema_decay=then)
    with pytest.raises(CheckpointError, match=message):
        tiny.run(tmp_path, ema_decay=now, resume=True)
