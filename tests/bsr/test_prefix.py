"""The frozen prefix: where it ends and why, and a forward pass in two parts."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from m3bsr.bsr import Plan, Prefix, frozen_prefix, prefix_weights, reprogram, restore, state_tensors, with_tensors


def vit(**kwargs):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=6, num_heads=3, num_classes=4, **kwargs)
    return model


def ends(plan, **kwargs):
    model = reprogram(vit(**kwargs), plan)
    return frozen_prefix(model, plan)


@pytest.mark.parametrize(
    ("plan", "kwargs", "expected"),
    [
        (Plan(train_blocks=(3, 5)), {}, (3, "block 3 trains")),
        (Plan(train_blocks=(3, 5), drop_blocks=(1, 3), keep_rate=0.5), {}, (3, "block 3 trains")),
        (Plan(train_blocks=()), {}, (6, "no block trains")),
        (
            Plan(train_blocks=(5,), drop_blocks=(2,), keep_rate=0.5, select="random"),
            {},
            (2, "block 2 drops tokens at random"),
        ),
        (Plan(), {}, (0, "the patch embedding trains")),
        (Plan(train_blocks=(0,)), {}, (0, "block 0 trains")),
        (Plan(train_blocks=(5,)), {"drop_path_rate": 0.1}, (1, "block 1 is random in training")),
        (Plan(train_blocks=(5,)), {"pos_drop_rate": 0.1}, (0, "the embedding is random")),
        (
            Plan(train_blocks=(5,), drop_blocks=(1,), keep_rate=0.5, restore_before=3),
            {},
            (3, "restored before block 3"),
        ),
        (
            Plan(train_blocks=(5,), drop_blocks=(2,), keep_rate=0.5, schedule="cosine", schedule_steps=9),
            {},
            (2, "keep rate of block 2 changes"),
        ),
    ],
)
def test_where_the_prefix_ends(plan, kwargs, expected):
    number, why = ends(plan, **kwargs)
    assert number == expected[0] and expected[1] in why


def test_a_parameter_that_a_method_lets_train_ends_the_prefix():
    model = reprogram(vit(), Plan(train_blocks=(5,)))
    model.blocks[2].attn.qkv.bias.requires_grad_(True)
    assert frozen_prefix(model, model.plan)[0] == 2


def test_weights_of_the_prefix_are_those_that_its_tokens_depend_on():
    model = reprogram(vit(), Plan(train_blocks=(2,)))
    names = set(prefix_weights(model, 2))
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc2.bias"} <= names
    assert not any(name.startswith(("blocks.2", "norm", "head")) for name in names)


DROPS = [
    *({"fuse": fuse, "restore": how} for fuse in ("sum", "mean", "none") for how in ("bypass", "interpolate")),
    {"restore": "transfer", "score_source": "own"},
    {"restore": "transfer", "select": "similar"},
    {"fuse": "merge", "restore": "unmerge", "proportional": True},
    {"drop_from": "backward"},
]


@pytest.mark.parametrize("drops", DROPS, ids=lambda drops: " ".join(map(str, drops.values())))
def test_two_parts_are_the_whole(drops):
    drops, how = {"drop_blocks": (1, 3, 4), "keep_rate": 0.6, **drops}, drops.get("restore", "transfer")
    model = reprogram(vit(), Plan(train_blocks=(3, 5), **drops)).train()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole, grid = model.forward_tokens(images, restorable=True)
    num_blocks, _ = frozen_prefix(model, model.plan)
    assert num_blocks == 3
    first, _ = model.forward_tokens(images, restorable=True, stop=num_blocks)
    # As the cache does it: tensors by name, put back into the state of other pictures.
    kept = {name: tensor.detach().clone() for name, tensor in state_tensors(first).items()}
    assert not any(tensor.requires_grad for tensor in state_tensors(first).values())
    other, _ = model.forward_tokens(torch.zeros(1, 3, 32, 32), restorable=True, stop=num_blocks)
    again, grid_again = model.forward_tokens(
        images, restorable=True, prefix=Prefix(with_tensors(other, kept), num_blocks)
    )
    assert grid == grid_again
    a, b = state_tensors(whole), state_tensors(again)
    assert a.keys() == b.keys() and len(whole.drops) == 3
    for name in a:
        assert torch.equal(a[name], b[name]), name
    if whole.stages:
        assert torch.equal(restore(whole, how, grid, None).x_BND, restore(again, how, grid, None).x_BND)


def test_gradients_behind_a_kept_prefix_are_those_of_the_whole():
    model = reprogram(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3), Plan(train_blocks=(6, 11)))
    images, found = torch.randn(2, 3, 64, 64), []
    prefix, _ = model.forward_tokens(images, stop=6)
    for known in (None, Prefix(prefix, 6)):
        model.zero_grad()
        state, _ = model.forward_tokens(images, prefix=known)
        state.x_BND.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and "blocks.6.attn.qkv.weight" in found[0]
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name
