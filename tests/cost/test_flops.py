"""Counting operations: the published reference counts, attention kernels, names of modules, recomputation."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from m3bsr.cost import count_macs


def meta_vit(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=10)


@pytest.mark.parametrize(
    ("name", "forward", "step"), [("vit_base_patch16_224", 17.563, 52.57), ("deit_small_patch16_224", 4.599, 13.74)]
)
def test_reference_counts(name: str, forward: float, step: float) -> None:
    model = meta_vit(name)
    count = count_macs(lambda: model(torch.empty(1, 3, 224, 224, device="meta")).sum().backward(), model)
    assert count.forward / 1e9 == pytest.approx(forward, rel=1e-3)
    assert count.total / 1e9 == pytest.approx(step, rel=1e-3)


def test_training_the_head_alone_costs_a_forward_pass() -> None:
    model = meta_vit("deit_small_patch16_224").requires_grad_(False)
    model.head.requires_grad_(True)
    count = count_macs(lambda: model(torch.empty(2, 3, 224, 224, device="meta")).sum().backward(), model)
    assert count.total / 2e9 == pytest.approx(4.60, rel=1e-3)
    assert count.backward == 2 * 384 * 10


def test_frozen_blocks_have_no_weight_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 4))
    model[1].requires_grad_(False)
    count = count_macs(lambda: model(torch.randn(5, 8)).sum().backward(), model)
    sizes = [5 * 8 * 16, 5 * 16 * 32, 5 * 32 * 4]
    assert count.forward_by_module == {"0": sizes[0], "1": sizes[1], "2": sizes[2]}
    # The first has no input gradient, the second no weight gradient.
    assert count.backward_by_module == {"0": sizes[0], "1": sizes[1], "2": 2 * sizes[2]}


def test_fused_attention_on_cpu_counts_its_recomputation() -> None:
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    product = 2 * 3 * 7 * 7 * 8
    count = count_macs(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert any("flash_attention_for_cpu_backward" in name for name in count.by_operator)
    assert (count.forward, count.backward) == (2 * product, 5 * product)


def test_written_out_attention_needs_four_products_backward() -> None:
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    product = 2 * 3 * 7 * 7 * 8
    count = count_macs(lambda: ((q @ k.transpose(-2, -1)).softmax(-1) @ v).sum().backward())
    assert (count.forward, count.backward) == (2 * product, 4 * product)


def test_checkpointing_runs_the_forward_pass_again() -> None:
    class Model(nn.Module):
        def __init__(self, recompute: bool) -> None:
            super().__init__()
            self.recompute = recompute
            self.a = nn.Linear(6, 6)
            self.b = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return checkpoint(self.b, y, use_reentrant=False) if self.recompute else self.b(y)

    plain, again = (Model(r) for r in (False, True))
    x = torch.randn(4, 6)
    first, second = (count_macs(lambda m=m: m(x).sum().backward(), m) for m in (plain, again))
    assert second.forward == first.forward
    assert second.backward_by_module["b.0"] == first.backward_by_module["b.0"] + 4 * 36
    # Torch stops recomputing when it has the last tensor that was saved: the second Linear does not run again.
    assert second.backward_by_module["b.2"] == first.backward_by_module["b.2"]
    assert second.backward_by_module["a"] == first.backward_by_module["a"]


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_take_as_much_for_each_gradient(groups: int) -> None:
    conv, x = nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=groups), torch.randn(2, 8, 12, 10, requires_grad=True)
    count = count_macs(lambda: conv(x).sum().backward(), conv)
    assert count.forward == 2 * 16 * 6 * 5 * 8 // groups * 9
    assert count.backward == 2 * count.forward
    up = nn.ConvTranspose2d(8, 4, 2, stride=2)
    count = count_macs(lambda: up(x).sum().backward(), up)
    assert count.forward == 2 * 8 * 12 * 10 * 4 * 4
    assert count.backward == 2 * count.forward


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_mm_counts_every_row_once() -> None:
    x = torch.randn(12, 16, requires_grad=True)
    w = torch.randn(3, 16, 8, requires_grad=True)
    offsets = torch.tensor([4, 4, 12], dtype=torch.int32)
    count = count_macs(lambda: F.grouped_mm(x, w, offs=offsets).mul(2).contiguous().pow(2).sum().backward())
    assert count.forward == 12 * 16 * 8
    assert count.backward == 2 * 12 * 16 * 8


def test_products_written_into_a_buffer_and_inference_mode_count() -> None:
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    assert count_macs(lambda: torch.mm(a, b, out=out)).total == 60
    linear = nn.Linear(4, 5)
    with torch.inference_mode():
        assert count_macs(lambda: linear(a), linear).total == 60
        assert count_macs(lambda: a @ torch.ones(4)).total == 12


def test_counts_by_module_sum_to_the_total_and_group_by_prefix() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224", num_classes=10, depth=2)
    count = count_macs(lambda: model(torch.empty(1, 3, 224, 224, device="meta")).sum().backward(), model)
    grouped = count.by_module(2)
    assert {"patch_embed.proj", "blocks.0", "blocks.1", "head"} <= set(grouped)
    assert grouped["blocks.0"] == grouped["blocks.1"]
    assert grouped["blocks.1"][1] == 2 * grouped["blocks.1"][0]
    assert sum(sum(pair) for pair in grouped.values()) == count.total


def test_hooks_are_gone_after_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        count_macs(lambda: model(torch.randn(1, 3)), model)
    hooks = nn.modules.module
    assert not hooks._global_forward_pre_hooks and not hooks._global_forward_hooks
