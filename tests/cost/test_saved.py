"""Bytes that autograd stores."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from m3bsr.cost import SavedBytes

MB = 2**20


@pytest.mark.parametrize(("fused", "expected"), [(False, 133.32), (True, 112.7)])
def test_vit_base_against_reference(fused: bool, expected: float) -> None:
    torch.manual_seed(0)
    # Few of the 12 blocks, so that the test is quick; what is stored is linear in the depth. A batch of 2, because
    # a batch of 1 needs no contiguous copies of keys and values, so their views keep the queries too.
    megabytes = {}
    for depth in (1, 3):
        model = timm.create_model("vit_base_patch16_224", num_classes=10, depth=depth)
        for block in model.blocks:
            block.attn.fused_attn = fused
        x = torch.randn(2, 3, 224, 224)
        with SavedBytes(model, [x]) as saved:
            loss = nn.functional.cross_entropy(model(x), torch.zeros(2, dtype=torch.long))
        assert loss.requires_grad
        megabytes[depth] = saved.bytes / 2 / MB
    per_block = (megabytes[3] - megabytes[1]) / 2
    assert megabytes[1] + 11 * per_block == pytest.approx(expected, rel=0.01)


def test_a_storage_counts_once_and_in_full() -> None:
    x = torch.randn(10, 4, requires_grad=True)
    with SavedBytes() as saved:
        y = x * 2
        z = y[:1] * y[1:2] + y[2:3] * y[3:4]
    assert z.requires_grad
    assert saved.bytes == y.untyped_storage().nbytes()


def test_parameters_and_inputs_do_not_count() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    with SavedBytes(model, [x]) as saved:
        model(x)
    assert saved.bytes == 0
    with SavedBytes(model) as saved:
        model(x)
    assert saved.bytes == x.nbytes


def test_frozen_layers_store_nothing_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    x = torch.randn(2, 8)
    with SavedBytes(model, [x]) as saved:
        model(x)
    assert saved.bytes == 0
    model[0].requires_grad_(True)  # the later frozen ones need only their weights
    with SavedBytes(model, [x]) as saved:
        model(x)
    assert saved.bytes == 0
    model[2].requires_grad_(True)
    with SavedBytes(model, [x]) as saved:
        model(x)
    assert saved.bytes == 2 * 8 * 4


def test_checkpointing_keeps_only_the_input() -> None:
    body = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(4, 8, requires_grad=True)
    with SavedBytes(body) as saved:
        y = x * 1.0
        out = checkpoint(body, y, use_reentrant=False)
    assert out.requires_grad
    assert y.nbytes <= saved.bytes < 2 * y.nbytes


def test_backward_still_works_inside() -> None:
    x = torch.randn(5, requires_grad=True)
    with SavedBytes():
        (x.sin() ** 2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().sin() * x.detach().cos())
