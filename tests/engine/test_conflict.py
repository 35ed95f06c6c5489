"""Gradients of several tasks made into one: the plain sum where the rule is a sum, PCGrad by hand, frozen and own
parameters, accumulation, two processes, and a run through the command line."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from m3bsr.engine.conflict import CONFLICTS, Gradients, TaskGradients, make_gradients

pytest.importorskip("torchjd", reason="TorchJD is not installed: pip install 'm3bsr[mtl]'")
SCALER = torch.amp.GradScaler("cpu", enabled=False)
TASKS = {"depth": None, "semseg": None}
WEIGHTS = {"depth": 2.0, "semseg": 0.5}
AUX = {"balance_loss": 0.1, "z_loss": 0.0, "auxiliary_loss": 1.0}


class Net(nn.Module):
    """A frozen layer, a shared one, a gate for each task, two heads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 5).requires_grad_(False)
        self.shared = nn.Linear(5, 5)
        self.gates = nn.ParameterDict({task: nn.Parameter(torch.ones(5)) for task in TASKS})
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})

    def parts(self, x, tasks=tuple(TASKS)):
        """As ``engine.losses.task_losses`` gives them; gates on a stack of tasks get zeros from the other's loss."""
        hidden = self.shared(self.stem(x)).tanh()
        stacked = torch.stack([hidden * self.gates[task] for task in tasks])
        losses = {
            task: (self.heads[task](h) - i).square().mean()
            for i, (task, h) in enumerate(zip(tasks, stacked, strict=True))
        }
        balance = hidden.square().mean()
        # As with cross-task refinement: a loss of both heads, and a task that sees the head of the other.
        both = [self.heads[task](h) for task, h in zip(tasks, stacked, strict=True)]
        auxiliary = 0.3 * torch.stack(both).prod(dim=0).mean()
        losses[tasks[-1]] = losses[tasks[-1]] + 0.2 * both[0].square().mean()
        loss = sum(WEIGHTS[task] * loss for task, loss in losses.items()) + AUX["balance_loss"] * balance + auxiliary
        named = {f"losses/{task}": loss for task, loss in losses.items()}
        return {"loss": loss, **named, "balance_loss": balance, "z_loss": torch.zeros(()), "auxiliary_loss": auxiliary}


def net_and_batches(num=3):
    torch.manual_seed(0)
    return Net(), [torch.randn(6, 4) for _ in range(num)]


def trained(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def gradients_by(rule, net, batches, **options):
    """Gradients by name after one step of several micro-batches."""
    net.zero_grad()
    how = make_gradients(rule, trained(net), TASKS, SCALER, len(batches), AUX)
    for x in batches:
        how.add(net.parts(x, **options), WEIGHTS)
    how.finish()
    assert all(p.grad is None for p in net.stem.parameters()), "frozen parameters take part"
    return {name: p.grad.clone() for name, p in trained(net).items() if p.grad is not None}


def test_the_sum_of_tasks_is_the_plain_gradient():
    net, batches = net_and_batches()
    plain, summed = (gradients_by(rule, net, batches) for rule in ("none", "sum"))
    assert plain.keys() == summed.keys() == trained(net).keys()
    for name, gradient in plain.items():
        assert torch.allclose(summed[name], gradient, atol=1e-7), name


@pytest.mark.parametrize("rule", [name for name in CONFLICTS if name != "sum"])
def test_every_rule_leaves_heads_gates_and_auxiliary_losses_alone(rule):
    """Only what the tasks say about the shared layer may change; the mean of two tasks is half of the sum."""
    net, batches = net_and_batches()
    plain, by_rule = (gradients_by(name, net, batches) for name in ("none", rule))
    for name, gradient in plain.items():
        if not name.startswith("shared."):
            assert torch.allclose(by_rule[name], gradient, atol=1e-7), name
        assert by_rule[name].isfinite().all()
    aux = [AUX[name] * part for x in batches for name, part in net.parts(x).items() if name in AUX]
    aux = torch.autograd.grad(sum(aux) / 3, net.shared.weight)[0]
    ours, theirs = by_rule["shared.weight"] - aux, plain["shared.weight"] - aux
    if rule == "mean":
        assert torch.allclose(ours, theirs / 2, atol=1e-7)
    else:
        assert not torch.allclose(ours, torch.zeros_like(ours))


def toy(rows, shared):
    """Losses of two tasks whose gradients of one shared vector are the rows."""
    losses = {f"losses/{task}": (torch.tensor(row) * shared).sum() for task, row in zip(TASKS, rows, strict=True)}
    return {**losses, "balance_loss": torch.zeros(()), "z_loss": torch.zeros(())}


def test_pcgrad_by_hand():
    """g1 = (1, 0), g2 = (-1, 1), g1.g2 = -1: g1 + g2 / 2 = (1/2, 1/2) and g2 + g1 = (0, 1); their sum is (1/2, 3/2)."""
    shared = nn.Parameter(torch.zeros(2))
    how = TaskGradients("pcgrad", {"trunk": shared}, TASKS, SCALER, 1, AUX)
    how.add(toy([(1.0, 0.0), (-1.0, 1.0)], shared), dict.fromkeys(TASKS, 1.0))
    how.finish()
    assert torch.allclose(shared.grad, torch.tensor([0.5, 1.5]))


def test_conflicts_are_seen_in_the_mean_over_micro_batches():
    """No micro-batch has a conflict of its own, their mean has that of above: the rule must see the mean."""
    shared = nn.Parameter(torch.zeros(2))
    how = TaskGradients("pcgrad", {"trunk": shared}, TASKS, SCALER, 2, AUX)
    for rows in ([(2.0, 0.0), (0.0, 0.0)], [(0.0, 0.0), (-2.0, 2.0)]):
        how.add(toy(rows, shared), dict.fromkeys(TASKS, 1.0))
    how.finish()
    assert torch.allclose(shared.grad, torch.tensor([0.5, 1.5]))


def test_a_task_without_labels_has_no_say_and_infinities_pass():
    net, batches = net_and_batches(1)
    plain, by_rule = (gradients_by(rule, net, batches, tasks=("depth",)) for rule in ("none", "pcgrad"))
    assert plain.keys() == by_rule.keys()
    assert all(torch.allclose(by_rule[name], gradient, atol=1e-7) for name, gradient in plain.items())
    shared = nn.Parameter(torch.zeros(2))
    how = TaskGradients("upgrad", {"trunk": shared}, TASKS, SCALER, 1, AUX)
    how.add(toy([(float("inf"), 0.0), (-1.0, 1.0)], shared), dict.fromkeys(TASKS, 1.0))
    how.finish()
    assert not shared.grad.isfinite().all()


def test_one_task_is_trained_plainly():
    assert type(make_gradients("pcgrad", {}, {"depth": None}, SCALER, 1, AUX)) is Gradients


def worker(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net, batches = net_and_batches(2)
    results[rank] = gradients_by("upgrad", net, batches[rank : rank + 1])["shared.weight"].tolist()
    dist.destroy_process_group()


def test_two_processes_decide_on_the_mean_of_both(tmp_path):
    """Both have the gradients of one process with both batches (the auxiliary loss is not reduced here)."""
    net, batches = net_and_batches(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUX, "balance_loss", 0.0)
        patch.setitem(AUX, "auxiliary_loss", 0.0)
        expected = gradients_by("upgrad", net, batches)["shared.weight"]
        with mp.Manager() as manager:
            results = manager.dict()
            mp.start_processes(worker, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")
            for rank in range(2):
                assert torch.allclose(torch.tensor(results[rank]), expected, atol=1e-6)


def test_what_is_missing_is_said_before_training(monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'pcgrad'"):
        make_gradients("pcgrd", {}, TASKS, SCALER, 1, AUX)
    with monkeypatch.context() as patch:
        patch.setitem(CONFLICTS, "cagrad", lambda a, n: builtins.__import__("no_such_solver"))
        with pytest.raises(ValueError, match=r"loss.conflict cagrad needs more packages: pip install 'm3bsr\[mtl\]'"):
            make_gradients("cagrad", {}, TASKS, SCALER, 1, AUX)
    monkeypatch.setitem(__import__("sys").modules, "torchjd.aggregation", None)
    with pytest.raises(ValueError, match=r"loss.conflict needs TorchJD: pip install 'm3bsr\[mtl\]'"):
        make_gradients("pcgrad", {}, TASKS, SCALER, 1, AUX)


def test_training_by_the_sum_equals_training_without_a_rule(tiny, tmp_path):
    def losses(name, **kwargs):
        tiny.run(tmp_path / name, epochs=1, max_steps=3, **kwargs)
        records = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if record["kind"] == "train"]

    plain = losses("plain")
    assert losses("sum", loss_conflict="sum") == pytest.approx(plain, rel=1e-5)
    assert losses("pcgrad", loss_conflict="pcgrad")[0] == pytest.approx(plain[0])
