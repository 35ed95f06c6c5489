"""Experts: separate parameters in memory, stacked tensors in a checkpoint, freezing that is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from m3bsr.moe import MoEMlp
from m3bsr.moe.experts import ExpertLinears, Experts

STACKED = {"fc1.weight": (4, 6, 3), "fc1.bias": (4, 6), "fc2.weight": (4, 3, 6), "fc2.bias": (4, 3)}


class Deep(nn.Module):
    """Experts three levels down, between other modules, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": Experts(4, 3, 6)}) for _ in range(2)])
        self.last = nn.Linear(2, 2)


def test_optimizer_sees_experts_and_checkpoint_sees_stacks() -> None:
    experts = Experts(4, 3, 6)
    assert [name for name, _ in experts.named_parameters()][:2] == ["fc1.0.weight", "fc1.0.bias"]
    assert sum(1 for _ in experts.parameters()) == 16
    assert {name: tuple(tensor.shape) for name, tensor in experts.state_dict().items()} == STACKED
    assert torch.equal(experts.state_dict()["fc2.weight"][3], experts.fc2[3].weight)


def test_round_trip_in_nested_modules_keeps_canonical_order() -> None:
    torch.manual_seed(0)
    one, two = Deep(), Deep()
    state = one.state_dict()
    expected = ["first.weight", "first.bias"]
    expected += [f"blocks.{i}.mlp.{name}" for i in range(2) for name in STACKED]
    assert list(state) == [*expected, "last.weight", "last.bias"]
    two.blocks[1]["mlp"].set_trainable((2,))  # what trains must not show in the keys
    assert list(two.state_dict()) == list(state)
    two.load_state_dict(state)
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: nn.Sequential(module)[0]])
def test_copies_save_and_load_their_own_experts(make) -> None:
    experts = Experts(4, 3, 6)
    twin = make(experts)
    state = {name: torch.full_like(tensor, 7.0) for name, tensor in twin.state_dict().items()}
    twin.load_state_dict(state)
    assert all((parameter == 7).all() for parameter in twin.parameters())
    assert (experts.fc1[0].weight == 7).all() == (twin is experts)


def test_loading_leaves_the_given_dict_alone_and_copies_from_it() -> None:
    experts = Experts(4, 3, 6)
    state = {name: torch.ones(shape) for name, shape in STACKED.items()}
    for assign in (False, True):
        experts.load_state_dict(state, assign=assign)
        assert list(state) == list(STACKED)
        with torch.no_grad():
            experts.fc1[0].weight.add_(1)
        assert (state["fc1.weight"] == 1).all() and (experts.fc1[1].weight == 1).all()
        assert experts.fc1[0].weight.untyped_storage().nbytes() == 6 * 3 * 4, "a slice must not hold the whole stack"


def test_wrong_shape_is_one_clear_message() -> None:
    state = Deep().state_dict()
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(8, 6, 3)
    with pytest.raises(RuntimeError) as error:
        Deep().load_state_dict(state)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "blocks.1.mlp.fc1.weight: the checkpoint holds experts of shape (8, 6, 3), the model (4, 6, 3)" in lines[1]


def test_missing_and_unexpected_keys_are_named_once() -> None:
    state = Deep().state_dict()
    del state["blocks.0.mlp.fc2.bias"]
    state["blocks.0.mlp.fc3.bias"] = torch.zeros(1)
    result = Deep().load_state_dict(state, strict=False)
    assert result.missing_keys == ["blocks.0.mlp.fc2.bias"]
    assert result.unexpected_keys == ["blocks.0.mlp.fc3.bias"]
    with pytest.raises(RuntimeError, match="blocks.0.mlp.fc2.bias"):
        Deep().load_state_dict(state)


def test_separate_entries_load_as_well() -> None:
    linears, other = ExpertLinears(3, 2, 5), ExpertLinears(3, 2, 5)
    separate = {name: parameter.detach().clone() for name, parameter in linears.named_parameters()}
    other.load_state_dict(separate)
    assert torch.equal(other.state_dict()["weight"], linears.state_dict()["weight"])


def test_set_trainable_is_exact_and_checks_ids() -> None:
    experts = Experts(4, 3, 6)
    experts.set_trainable((3, 1))
    assert experts.trainable() == (1, 3)
    trained = {name for name, parameter in experts.named_parameters() if parameter.requires_grad}
    assert trained == {f"{fc}.{e}.{kind}" for fc in ("fc1", "fc2") for e in (1, 3) for kind in ("weight", "bias")}
    experts.set_trainable(())
    assert experts.trainable() == ()
    experts.set_trainable("all")
    assert experts.trainable() == (0, 1, 2, 3)
    for wrong in ((4,), (-1,), (1, 1), "top"):
        with pytest.raises(ValueError, match="trainable experts"):
            experts.set_trainable(wrong)


def test_frozen_experts_are_bit_identical_after_adamw_and_have_no_state() -> None:
    torch.manual_seed(0)
    moe = MoEMlp(8, 8, 4, 2)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1, weight_decay=0.1)

    def steps() -> None:
        for _ in range(4):
            y, routing = moe(torch.randn(2, 6, 8), ("task",))
            (y.square().mean() + routing.balance_loss).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps()  # all train: momentum exists when the freezing begins
    moe.set_trainable_experts((1,))
    before = moe.state_dict()
    steps()
    after = moe.state_dict()
    for name in STACKED:
        same = (before[f"experts.{name}"] == after[f"experts.{name}"]).flatten(1).all(1)
        assert same.tolist() == [True, False, True, True], name
    fresh = torch.optim.AdamW((p for p in moe.parameters() if p.requires_grad), lr=0.1)
    assert len(fresh.param_groups[0]["params"]) == 4 + 1  # one expert's tensors and the gate
