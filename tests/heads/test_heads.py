"""Contract of every entry of HEADS, and parity of the upsample head with the published one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from m3bsr.heads import HEADS, UpsampleHead, load_published_head, set_output_bias, spread_levels

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"


def features(name: str, *shape: int, device: str | None = None) -> Any:
    """Random input of a head: a map ``shape``, or one for each of its levels."""
    maps = [torch.randn(shape, device=device) for _ in range(HEADS[name].num_levels)]
    return maps if len(maps) > 1 else maps[0]


def every(x: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return [fn(level) for level in x] if isinstance(x, list) else fn(x)


def gmacs(name: str, embed_dim: int, grid: tuple[int, int], num_channels: int = 40) -> float:
    head = HEADS[name](embed_dim, num_channels).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter:
        head.to("meta")(features(name, 1, embed_dim, *grid), (16 * grid[0], 16 * grid[1]))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("size", [(48, 64), (37, 51), (3, 4), (1, 1)])
@pytest.mark.parametrize("name", HEADS)
def test_any_size_and_batch_one(name, size):
    torch.manual_seed(0)
    head = HEADS[name](24, 5, head_dim=12)
    x = every(features(name, 1, 24, 3, 4), torch.Tensor.requires_grad_)
    logits = head(x, size)
    assert logits.shape == (1, 5, *size)
    logits.square().mean().backward()
    for level in x if isinstance(x, list) else [x]:
        assert level.grad.isfinite().all() and (level.grad != 0).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_images_of_a_batch_do_not_mix_in_evaluation(name):
    torch.manual_seed(0)
    head = HEADS[name](24, 2).eval()
    x = features(name, 3, 24, 3, 4)
    with torch.no_grad():
        assert torch.allclose(head(x, (20, 30))[1:2], head(every(x, lambda t: t[1:2]), (20, 30)), atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_a_convolution_of_the_features(name):
    torch.manual_seed(0)
    head = HEADS[name](24, 2, head_dim=12).eval()
    x = features(name, 2, 24, 3, 4)
    with torch.no_grad():
        found = head.features(x)
        assert found.shape[:2] == (2, head.logits.in_channels)
        assert torch.equal(head.predict(found, (12, 16)), head(x, (12, 16)))


@pytest.mark.parametrize("name", HEADS)
def test_output_starts_near_the_bias(name):
    torch.manual_seed(0)
    head = HEADS[name](24, 1)
    set_output_bias(head, 2.7)
    with torch.no_grad():
        mean = head(features(name, 2, 24, 6, 8), (24, 32)).mean()
    assert abs(float(mean) - 2.7) < 1.5


@pytest.mark.parametrize("name", HEADS)
def test_learns_to_tell_left_from_right(name):
    torch.manual_seed(0)
    head = HEADS[name](16, 1, head_dim=16)
    x = every(features(name, 2, 16, 2, 2), lambda t: t + torch.tensor([1.0, 0.0]))
    target = torch.zeros(2, 1, 8, 8)
    target[..., :4] = 1
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(x, (8, 8)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_costs_are_as_documented():
    """GMACs at 480x640, embed_dim 384, 40 classes: the numbers in the docstrings."""
    assert gmacs("upsample", 384, (30, 40)) == pytest.approx(61.3, abs=0.1)
    assert gmacs("light", 384, (30, 40)) == pytest.approx(0.19, abs=0.01)
    assert gmacs("aspp", 384, (30, 40)) == pytest.approx(0.89, abs=0.01)
    assert gmacs("pyramid", 384, (30, 40)) == pytest.approx(1.00, abs=0.01)
    assert gmacs("multilevel", 384, (30, 40)) == pytest.approx(1.25, abs=0.01)
    # At 240x320 ViT-tiny takes about 1.8 GMACs; a light head must be a small part of that.
    assert gmacs("light", 192, (15, 20)) < 0.05


@pytest.mark.parametrize(("name", "furthest"), [("light", 2), ("pyramid", 6), ("aspp", 40)])
def test_how_far_a_head_looks(name, furthest):
    """Outputs that a change of the first patch of 41 reaches; the mean in ASPP reaches all."""
    torch.manual_seed(0)
    head = HEADS[name](16, 1, head_dim=16).eval()
    for module in head.modules():
        if isinstance(module, torch.nn.GroupNorm):  # its statistics reach everywhere in any head
            module.forward = lambda x: x
    x = torch.randn(1, 16, 1, 41)
    changed = torch.cat([torch.randn(1, 16, 1, 1), x[..., 1:]], dim=-1)
    with torch.no_grad():
        moved = (head(changed, (1, 41)) - head(x, (1, 41)))[0, 0, 0].abs() > 1e-7
    assert moved[0] and int(moved.nonzero().max()) == furthest


@pytest.mark.parametrize("name", ["light", "aspp", "pyramid", "multilevel"])
def test_a_head_without_width_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} head: head_dim must be at least 1, got 0"):
        HEADS[name](16, 1, head_dim=0)


def test_early_blocks_give_the_fine_map():
    """A change of one patch of the first level stays within a few outputs; one of the last level spreads widely."""
    torch.manual_seed(0)
    head = HEADS["multilevel"](16, 1, head_dim=16).eval()
    for module in head.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    x = features("multilevel", 1, 16, 1, 41)
    reach = []
    for level in range(4):
        changed = [t.clone() for t in x]
        changed[level][..., 0] = torch.randn(1, 16, 1)
        with torch.no_grad():
            moved = (head(changed, (1, 164)) - head(x, (1, 164)))[0, 0, 0].abs() > 1e-7
        reach.append(int(moved.nonzero().max()))
    assert reach == sorted(reach) and reach[0] <= 4 and reach[3] >= 16


@pytest.mark.parametrize("blocks", [(2, 5, 11), (2, 5, 5, 11), (5, 2, 8, 11)])
def test_a_head_of_levels_wants_four_blocks_in_order(blocks):
    with pytest.raises(ValueError, match="model.head_blocks must name 4 blocks"):
        HEADS["multilevel"](16, 1, blocks=blocks)


def test_levels_are_spread_over_the_backbone():
    assert (
        spread_levels(12) == (2, 5, 8, 11) and spread_levels(24) == (5, 11, 17, 23) and spread_levels(4) == (0, 1, 2, 3)
    )
    with pytest.raises(ValueError, match="reads 4 blocks, the backbone has 3"):
        spread_levels(3)


def test_published_head_parity():
    path = SHARED / "m3vit_head.safetensors"
    if not path.exists():
        pytest.skip(f"needs the published head's weights at {path} (7.6 MB, not in the repository)")
    published = load_file(path)
    features = load_file(GOLDEN / "m3vit_moe.safetensors")["features/semseg"]
    head = UpsampleHead(48, 5).eval()
    load_published_head(head, published, "semseg")
    expected = published["logits/semseg"]
    grid = features[: len(expected), 1:].transpose(1, 2).reshape(len(expected), 48, 4, 5)
    with torch.no_grad():
        logits = head(grid, (64, 80))
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_published_names_round_trip_and_errors():
    torch.manual_seed(0)
    source, copy = UpsampleHead(8, 3), UpsampleHead(8, 3)
    names = {"convs.": "conv_", "norms.": "syncbn_fc_", "logits.": "conv_4."}
    state = {}
    for key, value in source.state_dict().items():
        for own, theirs in names.items():
            key = key.replace(own, theirs)
        state[f"module.decoders.depth.{key}"] = value
    load_published_head(copy, state, "depth")
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), copy.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"no decoder for task 'edge'; it has \['depth'\]"):
        load_published_head(copy, state, "edge")
    with pytest.raises(ValueError, match="has shape"):
        load_published_head(UpsampleHead(8, 4), state, "depth")
    state.pop("module.decoders.depth.norm.weight")
    with pytest.raises(ValueError, match=r"on one side only \['norm.weight'\]"):
        load_published_head(copy, state, "depth")
