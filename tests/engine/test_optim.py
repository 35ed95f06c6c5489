from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

from m3bsr.engine.optim import OPTIMIZERS, make_optimizer, param_groups
from m3bsr.engine.schedule import SCHEDULES, make_schedule


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed, self.cls_token = nn.Parameter(torch.zeros(1, 5, 4)), nn.Parameter(torch.zeros(1, 1, 4))
        self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.temperature = nn.Parameter(torch.zeros(2, 2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.heads = nn.ModuleDict({"depth": nn.Linear(4, 1)})

    def no_weight_decay(self):
        return {"temperature"}


def test_groups_split_by_decay_and_head_and_leave_frozen_ones_out():
    groups = {g["name"]: g for g in param_groups(Model(), lr=0.1, weight_decay=0.05, head_lr_scale=10)}
    assert {name: g["param_names"] for name, g in groups.items()} == {
        "backbone": ["block.0.weight"],
        "backbone, no decay": [
            "pos_embed",
            "cls_token",
            "temperature",
            "block.0.bias",
            "block.1.weight",
            "block.1.bias",
        ],
        "heads": ["heads.depth.weight"],
        "heads, no decay": ["heads.depth.bias"],
    }
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "backbone": (0.1, 0.05),
        "backbone, no decay": (0.1, 0.0),
        "heads": (1.0, 0.05),
        "heads, no decay": (1.0, 0.0),
    }


def test_nothing_to_train_is_a_user_error():
    with pytest.raises(ValueError, match="nothing trains.*bsr.train_blocks"):
        param_groups(Model().requires_grad_(False), lr=0.1, weight_decay=0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_a_step_and_only_on_what_trains(name):
    torch.manual_seed(0)
    model = Model()
    frozen = model.frozen.weight.clone()
    optimizer = make_optimizer(name, model, lr=0.1, weight_decay=0.1, momentum=0.5, betas=(0.8, 0.9))
    before = model.block[0].weight.clone()
    model.heads["depth"](model.block(model.frozen(torch.rand(3, 4)))).sum().backward()
    optimizer.step()
    assert not torch.equal(model.block[0].weight, before) and torch.equal(model.frozen.weight, frozen)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == 20 + 4 + 4 + 28 + 5


PLAIN = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.9), foreach=False, fused=False),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.5, foreach=False, fused=False),
}


def parity_with_plain(name, device):
    """Ten steps by our optimizer and by PyTorch's loop over parameters, from the same weights and gradients."""
    models, optimizers = [], []
    for plain in (False, True):
        torch.manual_seed(0)
        model = Model().to(device)
        groups = param_groups(model, lr=0.1, weight_decay=0.1)
        ours = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.5, "betas": (0.8, 0.9)}
        optimizers.append(PLAIN[name](groups) if plain else make_optimizer(name, model, **ours))
        models.append(model)
    assert all(group["fused"] for group in optimizers[0].param_groups), "plain against plain shows nothing"
    for _ in range(10):
        x = torch.randn(3, 4, device=device)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.heads["depth"](model.block(x)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (path, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_steps_equal_plain_ones(name):
    parity_with_plain(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_steps_equal_plain_ones_on_a_gpu(name):
    parity_with_plain(name, "cuda")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_was_saved_goes_on_to_the_same_bits(name):
    def fresh():
        torch.manual_seed(0)
        model = Model()
        return model, make_optimizer(name, model, lr=0.1, weight_decay=0.1)

    def step(model, optimizer, x):
        model.heads["depth"](model.block(x)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    inputs = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    whole, optimizer = fresh()
    for x in inputs[:3]:
        step(whole, optimizer, x)
    parted, again = fresh()
    parted.load_state_dict(whole.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in inputs[3:]:
        step(whole, optimizer, x)
        step(parted, again, x)
    for a, b in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="adamw"):
        make_optimizer("adamv", Model(), lr=0.1)
    with pytest.raises(ValueError, match="cosine"):
        make_schedule("cosin", torch.optim.SGD(Model().parameters(), lr=1.0), total_steps=3)


def rates(name, lrs=(1.0,), **kwargs):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups)
    schedule = make_schedule(name, optimizer, **kwargs)
    found = []
    for step in range(kwargs["total_steps"]):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step_update(step + 1)
    return found + [[group["lr"] for group in optimizer.param_groups]]


def test_cosine_and_poly_have_their_shapes():
    cosine = [r[0] for r in rates("cosine", total_steps=8, min_lr=0.2)]
    assert cosine == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(9)])
    poly = [r[0] for r in rates("poly", total_steps=8, poly_power=0.9)]
    assert poly == pytest.approx([(1 - t / 8) ** 0.9 for t in range(9)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_a_line_that_starts_above_zero_and_scales_per_group(name):
    found = rates(name, lrs=(1.0, 10.0), total_steps=12, warmup_steps=4)
    assert [r[0] for r in found[:5]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[0][1] == pytest.approx(0.2) and found[4][1] == pytest.approx(10.0)
    assert all(a[0] > b[0] for a, b in zip(found[4:], found[5:], strict=False)) and found[12][0] == 0


def test_warmup_as_long_as_the_run_is_a_user_error():
    with pytest.raises(ValueError, match="optim.warmup_steps: 4 must be less than the 4 steps"):
        rates("cosine", total_steps=4, warmup_steps=4)


def test_layer_decay_slows_what_lies_far_from_the_heads():
    vit = timm.create_model("deit_tiny_patch16_224", depth=3, num_classes=4)
    groups = param_groups(vit, lr=1.0, weight_decay=0.05, layer_decay=0.5, head_prefixes=("head.",))
    lr_of = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert len(lr_of) == len(list(vit.parameters()))
    assert lr_of["head.weight"] == lr_of["norm.bias"] == 1.0
    assert [lr_of[f"blocks.{i}.attn.qkv.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert lr_of["patch_embed.proj.weight"] == lr_of["cls_token"] == lr_of["pos_embed"] == 0.0625
    assert len(param_groups(vit, lr=1.0, weight_decay=0.05, head_prefixes=("head.",))) == 4
