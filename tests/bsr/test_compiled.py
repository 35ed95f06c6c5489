"""Compiled halves of blocks: the numbers, gradients and keys of those that are not, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from m3bsr import Plan, reprogram
from m3bsr.backbones import add_moe, task_backbone
from m3bsr.bsr.compiled import check_compiler, compile_blocks

PLAN = {"train_blocks": (1, 3), "drop_blocks": (1, 2), "keep_rate": 0.5, "score_source": "own"}
PLANS = {
    "both": {},
    "backward": {"drop_from": "backward"},
    "merge": {"select": "similar", "fuse": "merge", "restore": "unmerge", "proportional": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=5)


def step(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the model says, and its gradients by name."""
    model.zero_grad()
    out = model(images)
    out = torch.cat([*out.values()]) if isinstance(out, dict) else out
    F.mse_loss(out, torch.ones_like(out)).backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_when_compiled(model, backend, num_images=2) -> None:
    images = torch.randn(num_images, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    keys, expected = list(model.state_dict()), step(model.train(), images)
    with torch.no_grad():
        seen = model.eval()(images)
    compile_blocks(model, backend)
    torch.testing.assert_close(step(model.train(), images), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), seen, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("plan", PLANS)
def test_a_dense_model_computes_the_same(plan) -> None:
    assert_same_when_compiled(
        reprogram(make(), Plan(**{**PLAN, **PLANS[plan]})), "aot_eager" if plan == "both" else "eager"
    )


def test_a_model_with_experts_computes_the_same() -> None:
    model = task_backbone(make(), ("semseg", "depth"))
    torch.manual_seed(1)
    add_moe(
        model,
        blocks=(2,),
        tasks=model.tasks,
        num_experts=4,
        top_k=2,
        mlp_ratio=1,
        gate="vmoe",
        gate_mode="per_task",
    )
    model.set_plan(Plan(**PLAN))
    assert_same_when_compiled(model, "eager")


def test_later_batches_are_compiled_no_more() -> None:
    programs = []

    def backend(graph, inputs):
        programs.append([tuple(i.shape) for i in inputs])
        return graph.forward

    model = reprogram(make(), Plan(**PLAN)).train()
    compile_blocks(model, backend)
    images = torch.randn(2, 3, 16, 16)
    step(model, images)
    first = len(programs)
    assert 4 <= first <= 2 * len(model.blocks)
    for _ in range(3):
        step(model, images)
    assert len(programs) == first
    # Another number of images: programs of its own, and the old ones still serve the old number, not more general ones.
    step(model, images[:1])
    second = len(programs)
    step(model, images)
    assert first < second == len(programs)
    assert all(isinstance(side, int) for shapes in programs for shape in shapes for side in shape)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recompute": "frozen"}, "not with bsr.recompute frozen"),
        ({"activation_dtype": "int8", "prune_rate": 0.5}, "bsr.activation_dtype int8, bsr.prune_rate 0.5"),
        ({"schedule": "cosine", "schedule_steps": 5}, "bsr.schedule cosine"),
    ],
)
def test_plans_that_decide_what_is_stored_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        compile_blocks(reprogram(make(), Plan(**{**PLAN, **fields})), "eager")


def test_a_machine_without_a_compiler_is_told_so(monkeypatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    with pytest.raises(ValueError, match=r"^train.compile: torch.compile does not work here: .*g\+\+ in PATH") as error:
        check_compiler(torch.device("cpu"))
    assert "\n" not in str(error.value)
