"""Loss balancing: each rule against its formula, with autograd where it has a gradient, and over an interruption."""

from __future__ import annotations

import json
import math

import pytest
import torch

from m3bsr.engine import read_log
from m3bsr.engine.balance import BALANCES

WEIGHTS = {"semseg": 1.0, "edge": 50.0, "depth": 2.0}
LOSSES = {"semseg": 2.0, "edge": 0.05, "depth": 0.1}


@pytest.mark.parametrize("name", BALANCES)
def test_every_rule_starts_from_the_weights_as_set(name):
    assert BALANCES[name](WEIGHTS, 10).weights() == pytest.approx(WEIGHTS)


@pytest.mark.parametrize("name", BALANCES)
def test_a_resumed_run_has_the_same_weights(name):
    generator = torch.Generator().manual_seed(0)
    draws = [
        {task: float(loss * torch.rand((), generator=generator)) for task, loss in LOSSES.items()} for _ in range(37)
    ]
    whole = BALANCES[name](WEIGHTS, 10)
    parts = BALANCES[name](WEIGHTS, 10)
    for step, losses in enumerate(draws, start=1):
        whole.note(losses, step)
        if step % 8 == 0:
            parts = BALANCES[name](WEIGHTS, 10, json.loads(json.dumps(parts.state)))
        parts.note(losses, step)
        assert parts.weights() == whole.weights()


def test_fixed_weights_stay():
    balance = BALANCES["fixed"](WEIGHTS, 1)
    balance.note(LOSSES, 1)
    assert balance.weights() == WEIGHTS and balance.state == {}


def test_uncertainty_descends_kendalls_objective():
    """Its weights are the model's gradient of ``exp(-s) x + s / 2``, its move the gradient of s; both by autograd."""
    balance = BALANCES["uncertainty"](WEIGHTS, 10)
    s = {task: torch.zeros((), dtype=torch.float64, requires_grad=True) for task in WEIGHTS}
    for step in range(1, 30):
        losses = {task: torch.tensor(loss * (1 + step % 3), dtype=torch.float64) for task, loss in LOSSES.items()}
        for loss in losses.values():
            loss.requires_grad_()
        objective = sum(torch.exp(-s[t]) * WEIGHTS[t] * losses[t] + s[t] / 2 for t in WEIGHTS)
        objective.backward()
        assert balance.weights() == pytest.approx({task: float(loss.grad) for task, loss in losses.items()})
        balance.note({task: float(loss.detach()) for task, loss in losses.items()}, step)
        for value in s.values():
            with torch.no_grad():
                value -= balance.RATE * value.grad
            value.grad = None
        assert balance.state == pytest.approx({task: float(value.detach()) for task, value in s.items()})


def test_uncertainty_brings_every_task_to_one_half():
    balance = BALANCES["uncertainty"](WEIGHTS, 10)
    for step in range(1, 3000):
        balance.note(LOSSES, step)
    contributions = {task: weight * LOSSES[task] for task, weight in balance.weights().items()}
    assert contributions == pytest.approx(dict.fromkeys(WEIGHTS, 0.5), rel=0.01)


def test_a_single_wild_loss_does_not_silence_a_task():
    balance = BALANCES["uncertainty"](WEIGHTS, 10)
    balance.note({**LOSSES, "semseg": 1e9}, 1)
    assert balance.weights()["semseg"] == pytest.approx(math.exp(-0.1))


def test_dwa_follows_its_formula():
    balance = BALANCES["dwa"](WEIGHTS, 2)
    epochs = [{"semseg": 2.0, "edge": 0.05, "depth": 0.1}, {"semseg": 1.0, "edge": 0.05, "depth": 0.08}]
    step = 0
    for epoch in epochs:
        assert balance.weights() == pytest.approx(WEIGHTS)
        for spread in (0.9, 1.1):
            step += 1
            balance.note({task: spread * loss for task, loss in epoch.items()}, step)
    r = torch.tensor([0.5, 1.0, 0.8], dtype=torch.float64)
    expected = 3 * torch.softmax(r / 2, 0) * torch.tensor(list(WEIGHTS.values()))
    assert list(balance.weights().values()) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", BALANCES)
def test_tasks_without_labels_are_not_heard(name):
    """A batch without people has a loss of zero for the parts: that says nothing about how hard they are."""
    with_zeros, without = BALANCES[name](WEIGHTS, 4), BALANCES[name](WEIGHTS, 4)
    for step in range(1, 13):
        labelled = {"semseg": 1 / step, "edge": 0.02 * (1 if step < 8 else 0)}
        with_zeros.note({**labelled, "depth": 0.0}, step)
        without.note({task: loss for task, loss in labelled.items() if loss}, step)
    assert with_zeros.weights() == without.weights()
    assert all(math.isfinite(weight) and weight > 0 for weight in with_zeros.weights().values())


def test_a_task_of_weight_zero_stays_out():
    for rule in BALANCES.values():
        balance = rule({**WEIGHTS, "edge": 0.0}, 1)
        for step in range(1, 4):
            balance.note(LOSSES, step)
        assert balance.weights()["edge"] == 0


@pytest.mark.parametrize("name", BALANCES)
def test_training_weighs_its_losses_so(tiny, tmp_path, name):
    tiny.run(tmp_path, loss_balance=name, epochs=4, loss_weights={"depth": 2.0, "semseg": 1.0})
    records = [record for record in read_log(tmp_path / "log.jsonl") if record["kind"] == "train"]
    balance = BALANCES[name]({"depth": 2.0, "semseg": 1.0}, 4)
    for record in records:
        weights = balance.weights()
        total = sum(weights[task] * loss for task, loss in record["losses"].items()) + 0.01 * record["balance_loss"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
        balance.note(record["losses"], record["step"])
        assert ("loss_weights" in record) == (name != "fixed")
        assert record.get("loss_weights", balance.weights()) == pytest.approx(balance.weights(), rel=1e-5)
    assert len(records) == 16 and (name == "fixed") == (balance.weights() == {"depth": 2.0, "semseg": 1.0})
