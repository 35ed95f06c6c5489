"""Models that are spread over processes (FSDP2) train as one process does, and their checkpoints fit any number."""

from __future__ import annotations

import functools

import pytest
import torch

from m3bsr.backbones import MoEVisionTransformer
from m3bsr.engine import CheckpointError, checkpoint, distributed
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.schedule import make_schedule
from m3bsr.engine.shards import is_sharded, shard, whole
from m3bsr.heads import HEADS
from m3bsr.models import MultiTaskModel
from m3bsr.plan import Plan
from m3bsr.tasks import TASKS

CPU = torch.device("cpu")


def train(tiny, folder, sharded, batch_size=3, **kwargs):
    """Two steps an epoch of six images, by AdamW; parameters, whole. Block 0 is frozen, tokens are dropped there."""
    torch.manual_seed(0)
    backbone = MoEVisionTransformer(
        (16, 16), patch_size=8, embed_dim=8, depth=2, num_heads=2, moe_blocks=(1,), tasks=("depth", "semseg"),
        num_experts=3, top_k=1, moe_mlp_ratio=1,
    )  # fmt: skip
    backbone.set_plan(Plan(train_blocks=(1,), drop_blocks=(0,), keep_rate=0.5))
    model = MultiTaskModel(backbone, {t: HEADS["light"](8, n, head_dim=4) for t, n in (("depth", 1), ("semseg", 3))})
    if sharded:
        shard(model)
    assert is_sharded(model) == (sharded and distributed.num_processes() > 1)
    optimizer = make_optimizer("adamw", model, lr=0.001)
    tasks = {"depth": TASKS["depth"](), "semseg": TASKS["semseg"](num_classes=3)}
    sets = tiny.TinySet(12, size=(16, 16)), tiny.TinySet(3, augment=False, size=(16, 16))
    parts = (model, tasks, *sets, optimizer, make_schedule("cosine", optimizer, total_steps=4))
    _, result = tiny.run(
        folder, parts=parts, batch_size=batch_size, epochs=4, eval_every=0, eval_batch_size=1, **kwargs
    )
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}, result.progress.metrics


def together(many, num, folder, job):
    def one(rank):
        with distributed.processes(CPU, timeout_s=120):
            return job()

    return many.run(num, one, folder, timeout_s=240)


def assert_same(found, expected, atol=1e-5):
    (weights, metrics), (wanted, wanted_metrics) = found, expected
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for task, values in wanted_metrics.items():
        assert metrics[task] == pytest.approx(values, rel=1e-3), task


def test_two_processes_equal_one_and_one_reads_their_checkpoint(tiny, many, tmp_path):
    """Three images to evaluate in two processes: one of them runs a batch that does not count."""
    job = functools.partial(train, tiny, tmp_path / "two", True, max_steps=2)
    found = together(many, 2, tmp_path, job)
    assert_same(found[0], train(tiny, tmp_path / "one", False, accumulate=2, max_steps=2))
    last = tmp_path / "two/checkpoints/last"
    assert len(list((last / "shards").glob("*.safetensors"))) == 2
    assert checkpoint.verify_checkpoint(last) == 2
    resumed, _ = train(tiny, tmp_path / "two", False, max_steps=2, resume=True)  # nothing is left to do
    assert all(torch.equal(tensor, found[0][0][name]) for name, tensor in resumed.items())
    next((last / "shards").glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged: shards/"):
        checkpoint.verify_checkpoint(last)


def test_what_does_not_go_with_it_is_said(tiny, many, tmp_path):
    def messages():
        found = []
        for kwargs in (
            {"ema_decay": 0.9},
            {"loss_conflict": "pcgrad"},
            {"precision": "bf16", "prefix_cache": object()},
        ):
            with pytest.raises(ValueError) as caught:
                train(tiny, tmp_path / "run", True, **kwargs)
            found.append(str(caught.value))
        return found

    expected = [
        f"{field}: not with train.parallel fsdp; leave one of them out"
        for field in ("train.ema_decay", "loss.conflict", "bsr.cache_prefix")
    ]
    assert together(many, 2, tmp_path, messages) == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_saved_on_four_processes_and_resumed_on_two_and_on_one(tiny, many, tmp_path, sharded):
    """Two steps by four processes, the third by fewer, with as many images a step."""
    expected = train(tiny, tmp_path / "whole", False, batch_size=1, accumulate=4, max_steps=3)
    for num in (2, 1):
        run_dir = tmp_path / f"to-{num}"
        job = functools.partial(train, tiny, run_dir, sharded, batch_size=1, max_steps=2)
        together(many, 4, tmp_path / f"first-{num}", job)
        rest = {"batch_size": 1, "accumulate": 4 // num, "max_steps": 3, "resume": True}
        job = functools.partial(train, tiny, run_dir, sharded, **rest)
        assert_same(together(many, num, tmp_path / f"second-{num}", job)[0], expected, atol=1e-4)


@pytest.mark.slow
def test_a_whole_checkpoint_goes_on_spread_out(tiny, many, tmp_path):
    expected = train(tiny, tmp_path / "whole", False, accumulate=2, max_steps=3)
    train(tiny, tmp_path / "run", False, accumulate=2, max_steps=2)
    job = functools.partial(train, tiny, tmp_path / "run", True, max_steps=3, resume=True)
    assert_same(together(many, 2, tmp_path, job)[0], expected)
