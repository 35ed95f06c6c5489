"""Experts shared out among the processes of a run: trains, saves and goes on as one process does."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.backbones import MoEVisionTransformer
from m3bsr.cli.common import LOST_PROCESS, one_line_errors
from m3bsr.engine import distributed, read_log
from m3bsr.engine.expert_shares import ExpertShares
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.schedule import make_schedule
from m3bsr.heads import HEADS
from m3bsr.models import MultiTaskModel
from m3bsr.plan import Plan
from m3bsr.tasks import TASKS

CPU = torch.device("cpu")
STEPS = 10


def make_model(recompute="none"):
    """A gate for each of two tasks, and of 8 experts in two blocks some that train."""
    torch.manual_seed(0)
    backbone = MoEVisionTransformer(
        (16, 16), patch_size=8, embed_dim=16, depth=4, num_heads=2, moe_blocks=(1, 3), tasks=("depth", "semseg"),
        num_experts=8, top_k=2, moe_mlp_ratio=0.5, renormalize=True,
    )  # fmt: skip
    experts = ((0, 1, 2, 6), (5,))
    backbone.set_plan(Plan((1, 3), train_experts=experts, drop_blocks=(2,), keep_rate=0.5, recompute=recompute))
    heads = {"depth": HEADS["light"](16, 1, head_dim=8), "semseg": HEADS["light"](16, 3, head_dim=8)}
    return MultiTaskModel(backbone, heads)


def train(tiny, folder, recompute="none", on_step=lambda step: None, **kwargs):
    """Weights and metrics of a run with momentum (Adam would blow up gradients that are zero but for rounding)."""
    model = make_model(recompute)
    model.set_step = on_step
    optimizer = make_optimizer("sgd", model, lr=0.1)
    tasks = {"depth": TASKS["depth"](), "semseg": TASKS["semseg"](num_classes=3)}
    data = tiny.TinySet(12, size=(16, 16)), tiny.TinySet(5, augment=False, size=(16, 16))
    parts = model, tasks, *data, optimizer, make_schedule("cosine", optimizer, total_steps=STEPS)
    options = {"epochs": 9, "max_steps": STEPS, "eval_batch_size": 2, "balance_weight": 0.1, "eval_every": 3, **kwargs}
    model, result = tiny.run(folder, parts=parts, **options)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, result.progress.metrics


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One process that accumulates four micro-batches of one image."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, *train(tiny, folder, batch_size=1, accumulate=4)


@pytest.mark.parametrize(("num", "expert_parallel", "recompute"), [(2, 2, "all"), (4, 2, "none")])
def test_as_one_process(alone, tiny, many, tmp_path, num, expert_parallel, recompute):
    """Weights, metrics, gradient norm (which clips) and the log; frozen experts have the bits that they began with.

    Recomputed blocks exchange their tokens again, in the backward pass.
    """
    folder, expected, expected_metrics = alone
    options = {"batch_size": 1, "accumulate": 4 // num, "expert_parallel": expert_parallel, "recompute": recompute}
    job = functools.partial(train, tiny, tmp_path / "run", **options)
    found = many.run_together(num, job, tmp_path / "processes", timeout_s=250)
    fresh = make_model().state_dict()["backbone.blocks.1.mlp.experts.fc1.weight"]
    for weights, metrics in found:
        many.assert_close(weights, expected)
        assert torch.equal(weights["backbone.blocks.1.mlp.experts.fc1.3.weight"], fresh[3])
        assert not torch.equal(weights["backbone.blocks.1.mlp.experts.fc1.6.weight"], fresh[6])
        for task, values in expected_metrics.items():
            assert metrics[task] == pytest.approx(values, rel=1e-3), task
    logs = read_log(tmp_path / "run/log.jsonl"), read_log(folder / "log.jsonl")
    for record, wanted in zip(*logs, strict=True):
        assert record["step"] == wanted["step"] and record["routing"].keys() == wanted["routing"].keys()
        for name in ("loss", "grad_norm", "balance_loss") if record["kind"] == "train" else ():
            assert record[name] == pytest.approx(wanted[name], rel=1e-3), (record["step"], name)


def test_checkpoints_are_those_of_one_process(alone, tiny, many, tmp_path):
    """Saved by four processes with shares in each, gone on with by two, and by one that holds all."""
    folder, expected, _ = alone
    first = functools.partial(
        train, tiny, tmp_path / "four", batch_size=1, expert_parallel=4, max_steps=5, eval_every=0
    )
    many.run_together(4, first, tmp_path / "first", timeout_s=250)
    copies = [shutil.copytree(tmp_path / "four", tmp_path / name) for name in ("two", "one")]
    state = torch.load(copies[0] / "checkpoints/last/state.pt", weights_only=True)["optimizer"]
    wanted = torch.load(folder / "checkpoints/last/state.pt", weights_only=True)["optimizer"]
    assert [g["param_names"] for g in state["param_groups"]] == [g["param_names"] for g in wanted["param_groups"]]
    shapes = [{n: v["momentum_buffer"].shape for n, v in sorted(s["state"].items())} for s in (state, wanted)]
    assert shapes[0] == shapes[1] and shapes[0]
    saved = load_file(copies[0] / "checkpoints/last/model.safetensors")
    assert saved["backbone.blocks.1.mlp.experts.fc1.weight"].shape == (8, 8, 16)

    on = functools.partial(train, tiny, batch_size=1, resume=True)
    two = functools.partial(on, copies[0], accumulate=2, expert_parallel=2)
    weights = many.run_together(2, two, tmp_path / "second", timeout_s=250)[0][0]
    many.assert_close(weights, expected)
    many.assert_close(on(copies[1], accumulate=4)[0], expected)


def test_what_cannot_be_shared_out_is_said(tiny, many, tmp_path):
    def messages():
        found = []
        for kwargs in ({"expert_parallel": 3}, {"expert_parallel": 2, "ema_decay": 0.9}):
            with pytest.raises(ValueError) as caught:
                train(tiny, tmp_path / "run", batch_size=1, **kwargs)
            found.append(str(caught.value))
        with pytest.raises(ValueError) as caught:
            tiny.run(tmp_path / "run", expert_parallel=2)
        return [*found, str(caught.value)]

    for processes, average, none in many.run_together(2, messages, tmp_path):
        assert processes.startswith("moe.expert_parallel 3 needs a multiple of so many processes, this run has 2")
        assert average == "train.ema_decay: not with moe.expert_parallel; leave one of them out"
        assert none == "moe.expert_parallel: the model has no experts; see moe.blocks"


def test_a_process_has_the_state_of_its_own_experts(many, tmp_path):
    """And the whole optimizer, taken apart and put together, is the same one."""

    def measured():
        model = make_model()
        optimizer = make_optimizer("adamw", model, lr=0.1)
        shares = ExpertShares(model, optimizer, 2)
        for parameter in (p for g in optimizer.param_groups for p in g["params"]):
            parameter.grad = torch.randn_like(parameter)
        shares.mean_gradients({name: p for name, p in model.named_parameters() if p.requires_grad})
        optimizer.step()
        before = {name: value.clone() for name, value in shares.to_save()[0].state_dict().items()}
        whole = shares.optimizer.state_dict()
        whole = torch.load(_saved(whole, tmp_path), weights_only=True)
        own = copy.deepcopy(optimizer.state_dict())
        for values in optimizer.state.values():
            values["exp_avg"].zero_()
        shares.optimizer.load_state_dict(whole)
        again = optimizer.state_dict()
        assert own["state"].keys() == again["state"].keys() and own["param_groups"] == again["param_groups"]
        assert all(torch.equal(own["state"][n]["exp_avg"], again["state"][n]["exp_avg"]) for n in own["state"])
        experts = {n for g in optimizer.param_groups for n in g["param_names"] if ".experts." in n}
        shares.gather()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return experts, len(whole["state"]), sum(len(g["params"]) for g in whole["param_groups"])

    def _saved(state, folder):
        if distributed.is_main():
            torch.save(state, folder / "whole.pt")
        distributed.wait_for_all()
        return folder / "whole.pt"

    (first, *of_first), (second, *of_second) = many.run_together(2, measured, tmp_path)
    assert {name.split(".")[-2] for name in first} == {"0", "1", "2"}, "of the second block its only one is elsewhere"
    assert {name.split(".")[-2] for name in second} == {"6", "5"}
    trained = sum(p.requires_grad for p in make_model().parameters())
    assert of_first == of_second == [trained, trained]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_lost_process_ends_the_others_while_they_exchange_tokens(tiny, many, tmp_path, how):
    def in_third_step(rank, step):
        if (rank, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else time.sleep(60)

    @one_line_errors
    def command(rank):
        with distributed.processes(CPU, timeout_s=60 if how == "killed" else 5):
            on_step = functools.partial(in_third_step, rank)
            train(tiny, tmp_path / "run", batch_size=1, expert_parallel=2, eval_every=0, on_step=on_step)
        return 0

    pids = many.start(2, command, tmp_path)
    assert many.wait(pids[:1], timeout_s=45) == [LOST_PROCESS]
    if how == "hung":
        os.kill(pids[1], signal.SIGKILL)
    os.waitpid(pids[1], 0)
    assert "process 1 of 2 ended or does not answer" in (tmp_path / "output-0.txt").read_text()
