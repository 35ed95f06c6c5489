"""Outputs of several blocks for decoders that read them: whole grids, whatever was dropped, per task, with gradients
where blocks train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m3bsr import Plan
from m3bsr.backbones import MoEVisionTransformer
from m3bsr.bsr import TokenState
from m3bsr.bsr.restore import NEEDS

TASKS = ("semseg", "depth")
DEPTH = 6
DROPPING = Plan((3, 5), drop_blocks=(1, 2), keep_rate=0.5, restore="bypass")


def make(plan: Plan, **options: Any) -> MoEVisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": DEPTH, "num_heads": 3}
    experts = {"moe_blocks": (3, 5), "num_experts": 4, "top_k": 2, "renormalize": True}
    backbone = MoEVisionTransformer(**{**sizes, "tasks": TASKS, **experts, **options})
    backbone.set_plan(plan)
    return backbone


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))


def test_with_nothing_dropped_levels_are_what_the_blocks_give() -> None:
    """Shared before block 3, whose experts depend on the task; stacked by task behind it."""
    backbone = make(Plan()).eval()
    output = backbone.forward_tasks(images(), levels=range(DEPTH))
    x, _ = backbone.embed(images())
    for i in range(3):
        x = backbone.blocks[i](x)
        torch.testing.assert_close(output.levels["depth"][i], x)
        assert output.levels["semseg"][i] is output.levels["depth"][i]
    for task in TASKS:
        assert output.levels[task][DEPTH - 1].equal(output.features[task])
        alone = backbone.forward_tasks(images(), (task,), levels=(1, 4))
        assert list(alone.levels) == [task] and list(alone.levels[task]) == [1, 4]
        torch.testing.assert_close(alone.levels[task][4], output.levels[task][4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output.levels["semseg"][4], output.levels["depth"][4])
    assert backbone.forward_tasks(images()).levels == {"semseg": {}, "depth": {}}


@pytest.mark.parametrize("fuse", ["sum", "mean", "none"])
def test_every_token_is_at_its_place_at_every_level(fuse: str) -> None:
    """Against a loop over tokens: kept ones as the block left them, dropped ones as they were when dropped."""
    backbone = make(Plan((3, 5), drop_blocks=(1, 2), keep_rate=0.5, restore="bypass", fuse=fuse), moe_blocks=())
    states: dict[int, TokenState] = {}
    with torch.no_grad():
        backbone.forward_tokens(images(), restorable=True, tap=states.__setitem__)
        levels = backbone.forward_tasks(images(), levels=range(DEPTH)).levels["depth"]
    assert [len(states[i].stages) for i in range(DEPTH)] == [0, 1, 2, 2, 2, 2]
    for i, state in states.items():
        expected = torch.full((2, 1 + 24, 24), float("nan"))
        expected[:, 0] = state.x_BND[:, 0]
        for b in range(2):
            for stage in state.stages:
                for place, index in enumerate(stage.drop_idx_BR[b]):
                    patch = int(stage.patch_BM[b, index])
                    if patch >= 0:  # no fused token
                        expected[b, 1 + patch] = stage.x_drop_BRD[b, place]
            for place, patch in enumerate(state.patch_BM[b].tolist()):
                if patch >= 0:
                    expected[b, 1 + patch] = state.x_BND[b, 1 + place]
        assert levels[i].equal(expected)  # nothing is left unset


@pytest.mark.parametrize("restore", ["bypass", "adapt", "interpolate", "transfer"])
def test_every_way_of_restoring_serves_every_level(restore: str) -> None:
    plan = Plan((3, 5), drop_blocks=(1, 4), keep_rate=0.5, restore=restore)
    together = make(plan).eval().forward_tasks(images(), levels=range(DEPTH))
    for task in TASKS:
        assert all(x.shape == (2, 25, 24) and x.isfinite().all() for x in together.levels[task].values())
        assert together.levels[task][DEPTH - 1].equal(together.features[task])
        alone = make(plan).eval().forward_tasks(images(), (task,), levels=(1, 4))
        for i in (1, 4):
            torch.testing.assert_close(alone.levels[task][i], together.levels[task][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("restore", list(NEEDS))
def test_no_features_outlive_their_use(restore: str) -> None:
    """A drop keeps what its way of restoring reads, and what the model gives back keeps none of it."""
    fuse = {"fuse": "merge", "select": "similar"} if restore == "unmerge" else {}
    plan = Plan((3, 5), drop_blocks=(1, 4), keep_rate=0.5, restore=restore, **fuse)
    state, _ = make(plan, moe_blocks=()).forward_tokens(images(), restorable=True)
    for stage in state.stages:
        held = {"dropped": stage.x_drop_BRD, "kept": stage.x_keep_BKD}
        assert {name for name, features in held.items() if features is not None} == NEEDS[restore]
    output = make(plan).forward_tasks(images())
    assert [len(output.stages[task]) for task in TASKS] == [2, 2]
    assert all(s.x_drop_BRD is None and s.x_keep_BKD is None for stages in output.stages.values() for s in stages)


def test_levels_behind_a_restored_grid_are_whole() -> None:
    plan = Plan((3, 5), drop_blocks=(1, 2), keep_rate=0.5, restore="bypass", restore_before=5)
    states: dict[int, TokenState] = {}
    backbone = make(plan, moe_blocks=()).eval()
    backbone.forward_tokens(images(), restorable=True, tap=states.__setitem__)
    levels = backbone.forward_tasks(images(), levels=(4, 5)).levels["depth"]
    assert states[4].x_BND.shape[1] < 25 and levels[4].shape[1] == 25
    assert states[5].stages == () and levels[5].equal(states[5].x_BND)


def test_gradients_end_at_the_first_trained_block_and_pass_no_later_one() -> None:
    backbone = make(DROPPING).train()
    levels = backbone.forward_tasks(images(), levels=range(DEPTH)).levels
    assert [levels["depth"][i].requires_grad for i in range(DEPTH)] == [False] * 3 + [True] * 3
    levels["depth"][4].square().mean().backward()
    moved = {int(name.split(".")[1]) for name, p in backbone.named_parameters() if p.grad is not None}
    assert moved == {3}
    gates = {name: p.grad for name, p in backbone.blocks[3].mlp.gates.named_parameters() if p.grad is not None}
    assert any(grad.any() for name, grad in gates.items() if name.startswith("depth"))
    assert not any(grad.any() for name, grad in gates.items() if name.startswith("semseg"))


def test_tasks_that_are_not_restored_have_no_levels() -> None:
    backbone = make(DROPPING).eval()
    output = backbone.forward_tasks(images(), restored=("depth",), levels=(1, 5))
    assert list(output.levels) == ["depth"] and output.features["semseg"].shape[1] < 25
    assert backbone.forward_tasks(images(), restored=False, levels=(1, 5)).levels == {}
