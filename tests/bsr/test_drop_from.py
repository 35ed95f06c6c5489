"""Drops that leave the backward pass only, and merged tokens, in whole models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m3bsr import Plan, reprogram
from m3bsr.bsr.attention import attend
from m3bsr.cost import SavedBytes, count_macs

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 5, "num_heads": 3, "num_classes": 5}
FAMILIES = {
    "vit": {},
    "average_pool": {"class_token": False, "global_pool": "avg"},
    "registers_and_norms": {"reg_tokens": 4, "init_values": 0.1, "qk_norm": True},
}
BACKWARD = {"train_blocks": (1, 4), "drop_blocks": (1, 2), "keep_rate": 0.5, "drop_from": "backward"}


def make(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, **options})


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    F.cross_entropy(model(images()), torch.arange(2)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("restore_before", [None, 4])
def test_the_forward_pass_is_that_of_all_tokens(family: str, restore_before: int | None) -> None:
    vit = make(**FAMILIES[family])
    expected = vit(images())
    model = reprogram(vit, Plan(**BACKWARD, select="random", restore_before=restore_before))
    for mode in (model.train(), model.eval()):
        torch.testing.assert_close(mode(images()), expected, rtol=1e-5, atol=1e-6)
    whole, left = model.num_prefix_tokens + 64, model.num_prefix_tokens + 16
    assert model.tokens_after_block == (whole, left + 16, left, left, left if restore_before is None else whole)
    assert "of the backward pass" in str(model.report())
    assert not model.eval().forward_tokens(images())[0].drops


def naive(vit: VisionTransformer, plan: Plan, keep: dict[int, Tensor]) -> Tensor:
    """All tokens in every block; what comes out of a dropped token is cut off from the graph, piece by piece."""
    x = vit._pos_embed(vit.patch_embed(images())).detach()
    learns = torch.ones(x.shape[:2], dtype=torch.bool)

    def cut(t: Tensor) -> Tensor:
        return torch.where(learns.unsqueeze(2), t, t.detach())

    for i, block in enumerate(vit.blocks):
        if i == plan.restore_before:
            learns = torch.ones_like(learns)
        B, N, D = x.shape
        q, k, v = cut(block.attn.qkv(block.norm1(x))).view(B, N, 3, 3, D // 3).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(2, 3) * (D // 3) ** -0.5).softmax(-1) @ v).transpose(1, 2).reshape(B, N, D)
        x = x + cut(block.attn.proj(cut(y)))
        if i in keep:
            learns = torch.zeros_like(learns).scatter(
                1, torch.cat([torch.zeros(B, 1, dtype=torch.int64), keep[i] + 1], 1), True
            )
            x = cut(x)
        x = x + cut(block.mlp(block.norm2(x)))
    return vit.head(vit.norm(x)[:, 0])


@pytest.mark.parametrize("restore_before", [None, 4])
def test_gradients_against_all_tokens_with_a_cut_graph(restore_before: int | None) -> None:
    vit = make()
    model = reprogram(vit, Plan(**BACKWARD, select="cover", restore_before=restore_before)).train()
    state, _ = model.forward_tokens(images())
    keep = {stage.block: stage.patch_BM.gather(1, stage.keep_idx_BK) for stage in state.drops}
    assert list(keep) == [1, 2]
    found = gradients(model)
    model.zero_grad()
    F.cross_entropy(naive(vit, model.plan, keep), torch.arange(2)).backward()
    expected = {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and "blocks.1.attn.qkv.weight" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "options", [{"recompute": r} for r in ("cheap", "frozen", "both", "all")] + [{"activation_dtype": "bf16"}]
)
def test_storing_less_gives_the_same_gradients(options: dict) -> None:
    plan = {**BACKWARD, "select": "random"}
    exact = gradients(reprogram(make(), Plan(**plan)).train())
    found = gradients(reprogram(make(), Plan(**plan, **options)).train())
    assert found.keys() == exact.keys()
    loose = {"rtol": 0.1, "atol": 0.02} if "activation_dtype" in options else {}
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, **loose)


def test_the_backward_pass_costs_and_stores_what_is_kept_in_it() -> None:
    def cost(**plan) -> tuple[int, int, int]:
        model = reprogram(make(), Plan(train_blocks=(1, 4), drop_blocks=(0,), **plan)).train()
        with SavedBytes(model, [images()]) as saved:
            loss = model(images()).sum()
        counted = count_macs(lambda: model(images()).sum().backward())
        del loss
        return counted.forward, counted.backward, saved.bytes

    all_of = cost(keep_rate=1.0)
    some = cost(keep_rate=0.25, drop_from="backward")
    assert some[0] == all_of[0] and some[1] < 0.35 * all_of[1] and some[2] < 0.55 * all_of[2]


def test_merged_tokens_weigh_as_their_doubles_would() -> None:
    attn, x = make().blocks[0].attn, torch.randn(2, 6, 24)
    doubled = torch.cat([x, x[:, 2:3], x[:, 2:3], x[:, 5:6]], dim=1)
    size_BN = torch.tensor([1.0, 1, 3, 1, 1, 2]).expand(2, -1)
    for score in ("class_row", "received"):
        merged = attend(attn, x, score=score, num_prefix=1, want_keys=False, size_BN=size_BN)
        apart = attend(attn, doubled, score=score, num_prefix=1, want_keys=False)
        torch.testing.assert_close(merged.x_BND, apart.x_BND[:, :6])
        if score == "class_row":
            summed = apart.scores_BM[:, :5].clone()
            summed[:, 1] += apart.scores_BM[:, 5:7].sum(1)
            summed[:, 4] += apart.scores_BM[:, 7]
            torch.testing.assert_close(merged.scores_BM, summed)
