"""Several processes are one run: what they train, score, log and save equals one process."""

from __future__ import annotations

import functools

import pytest
import torch

from m3bsr.backbones import MoEVisionTransformer
from m3bsr.engine import distributed, evaluate, read_log
from m3bsr.engine.gradients import mean_gradients
from m3bsr.engine.loader import eval_loader
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.schedule import make_schedule
from m3bsr.heads import HEADS
from m3bsr.models import MultiTaskModel
from m3bsr.plan import Plan
from m3bsr.tasks import TASKS

STEPS = 10


def moe_parts(tiny, num_val=7):
    """A small M3ViT, some blocks frozen, 16 experts with one choice a token: a process never sees some of them."""
    torch.manual_seed(0)
    backbone = MoEVisionTransformer(
        (16, 16), patch_size=8, embed_dim=16, depth=4, num_heads=2, moe_blocks=(1, 3), tasks=("depth", "semseg"),
        num_experts=16, top_k=1, moe_mlp_ratio=0.5, renormalize=False,
    )  # fmt: skip
    backbone.set_plan(Plan(train_blocks=(1, 3)))
    heads = {"depth": HEADS["light"](16, 1, head_dim=8), "semseg": HEADS["light"](16, 3, head_dim=8)}
    model = MultiTaskModel(backbone, heads)
    tasks = {"depth": TASKS["depth"](), "semseg": TASKS["semseg"](num_classes=3)}
    train_set, val_set = tiny.TinySet(12, size=(16, 16)), tiny.TinySet(num_val, augment=False, size=(16, 16))
    # Not Adam: it blows rounding errors up where the true gradient is zero (the bias of keys, under softmax).
    optimizer = make_optimizer("sgd", model, lr=0.1)
    return model, tasks, train_set, val_set, optimizer, make_schedule("cosine", optimizer, total_steps=STEPS)


def train_moe(tiny, folder, batch_size, accumulate=1, **kwargs):
    """Parameters, last metrics, and per MoE block whether an expert was never chosen."""
    parts = moe_parts(tiny)
    options = {"epochs": 9, "max_steps": STEPS, "batch_size": batch_size, "accumulate": accumulate, **kwargs}
    model, result = tiny.run(folder, parts=parts, eval_batch_size=2, **options)
    with torch.no_grad():
        routing = model(torch.rand(2, 3, 16, 16)).routing
    unused = [bool((choices.counts().sum(0) == 0).any()) for choices in routing.values()]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, result.progress.metrics, unused


@pytest.fixture(scope="module")
def two(tiny, many, tmp_path_factory):
    """Two processes with batches of 3, ten steps with an evaluation every other one."""
    folder = tmp_path_factory.mktemp("two")
    job = functools.partial(train_moe, tiny, folder / "run", 3, balance_weight=0.1)
    return folder, many.run_together(2, job, folder)


def test_two_processes_end_with_the_same_bits(two):
    _, ((first, first_metrics, unused), (second, second_metrics, _)) = two
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first_metrics == second_metrics
    assert all(unused), "the test is about experts that nobody chose"


def test_two_processes_equal_one_that_accumulates(two, tiny, many, tmp_path):
    """Everything, the balance loss too: a micro-batch of one is a process of the other."""
    folder, ((weights, metrics, _), _) = two
    expected, expected_metrics, _ = train_moe(tiny, tmp_path, 3, accumulate=2, balance_weight=0.1)
    many.assert_close(weights, expected)
    for task, values in expected_metrics.items():
        assert metrics[task] == pytest.approx(values, rel=1e-4), task
    logs = read_log(folder / "run/log.jsonl"), read_log(tmp_path / "log.jsonl")
    assert [(r["kind"], r["step"]) for r in logs[0]] == [(r["kind"], r["step"]) for r in logs[1]]
    for found, wanted in zip(*logs, strict=True):
        assert found["routing"].keys() == wanted["routing"].keys()
        for name in ("loss", "grad_norm", "balance_loss") if found["kind"] == "train" else ():
            assert found[name] == pytest.approx(wanted[name], rel=1e-3), (found["step"], name)
    first = logs[0][0]["routing"]["1"], logs[1][0]["routing"]["1"]
    assert first[0] == first[1], "before the first step the choices are the same, counted over both processes"


def test_two_processes_equal_one_with_twice_the_batch(tiny, many, tmp_path):
    """Without the balance loss, which is not linear in the batch, and with as many labels in each half."""
    job = functools.partial(train_moe, tiny, tmp_path / "two", 3, balance_weight=0.0)
    weights = many.run_together(2, job, tmp_path)[0][0]
    many.assert_close(weights, train_moe(tiny, tmp_path / "one", 6, balance_weight=0.0)[0])


@pytest.mark.parametrize("num_val", [1, 7])
def test_metrics_of_three_processes_on_a_split_that_does_not_come_out_even(tiny, many, tmp_path, num_val):
    """Some processes have nothing to score (1 image), or one has less than the others (7)."""
    model, tasks, _, val_set, *_ = moe_parts(tiny, num_val=num_val)

    def scores():
        return evaluate(model, tasks, eval_loader(val_set, batch_size=2), progress=False)

    expected = scores()
    found = many.run_together(3, scores, tmp_path)
    for metrics in found:
        assert metrics.num_images == num_val and metrics.routing == expected.routing
        for task, values in expected.items():
            assert metrics[task] == pytest.approx(values, rel=1e-9, nan_ok=True)


def test_resumed_in_as_many_processes_to_the_same_bits(tiny, many, tmp_path):
    """Dropout, augmentation and routing counts of each process go on where they were."""

    def both():
        whole, _ = tiny.run(tmp_path / "whole", batch_size=2, log_every=4, experts=True)
        tiny.run(tmp_path / "parted", batch_size=2, max_steps=3, log_every=4, experts=True, eval_every=0)
        return whole.state_dict()

    def again():
        model, _ = tiny.run(tmp_path / "parted", batch_size=2, log_every=4, experts=True, resume=True)
        return model.state_dict()

    whole = many.run_together(2, both, tmp_path)
    parted = many.run_together(2, again, tmp_path)
    for rank in range(2):
        assert all(torch.equal(tensor, parted[rank][name]) for name, tensor in whole[rank].items())


def test_missing_gradients_are_zeros_where_others_have_one_and_missing_where_none_has(many, tmp_path):
    def reduced():
        rank = distributed.rank()
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (), (5,))]
        for number, parameter in enumerate(parameters[:3]):
            if number == 0 or number == rank + 1:
                parameter.grad = torch.full_like(parameter, 1.0 + rank)
        mean_gradients(parameters, bucket_bytes=30)
        return [None if p.grad is None else p.grad.tolist() for p in parameters]

    expected = [[[1.5] * 3] * 2, [0.5] * 4, 1.0, None]
    assert many.run_together(2, reduced, tmp_path) == [expected, expected]


def test_an_error_of_one_process_ends_all_and_is_said_once(many, tmp_path):
    def fail():
        with pytest.raises(ValueError) as caught, distributed.together():
            if distributed.rank() != 1:
                raise ValueError("no such file")
        return str(caught.value), distributed.is_told(caught.value)

    found = many.run_together(3, fail, tmp_path)
    assert found == [("no such file", False), ("no such file", True), ("no such file", True)]
