"""Contract of every entry of HEADS, and parity of the upsample head with the published one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from m3bsr.heads import HEADS, UpsampleHead, load_published_head, set_output_bias

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"


def gmacs(name: str, embed_dim: int, grid: tuple[int, int], num_channels: int = 40) -> float:
    head = HEADS[name](embed_dim, num_channels).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter:
        head.to("meta")(torch.empty(1, embed_dim, *grid), (16 * grid[0], 16 * grid[1]))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("size", [(48, 64), (37, 51), (3, 4), (1, 1)])
@pytest.mark.parametrize("name", HEADS)
def test_any_size_and_batch_one(name, size):
    torch.manual_seed(0)
    head = HEADS[name](24, 5, head_dim=12)
    x = torch.randn(1, 24, 3, 4, requires_grad=True)
    logits = head(x, size)
    assert logits.shape == (1, 5, *size)
    logits.square().mean().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_images_of_a_batch_do_not_mix_in_evaluation(name):
    torch.manual_seed(0)
    head = HEADS[name](24, 2).eval()
    x = torch.randn(3, 24, 3, 4)
    with torch.no_grad():
        assert torch.allclose(head(x, (20, 30))[1:2], head(x[1:2], (20, 30)), atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_output_starts_near_the_bias(name):
    torch.manual_seed(0)
    head = HEADS[name](24, 1)
    set_output_bias(head, 2.7)
    with torch.no_grad():
        mean = head(torch.randn(2, 24, 6, 8), (24, 32)).mean()
    assert abs(float(mean) - 2.7) < 1.5


@pytest.mark.parametrize("name", HEADS)
def test_learns_to_tell_left_from_right(name):
    torch.manual_seed(0)
    head = HEADS[name](16, 1, head_dim=16)
    x = torch.randn(2, 16, 2, 2)
    x[..., :1] += 1
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


@pytest.mark.parametrize("name", ["light", "aspp", "pyramid"])
def test_a_head_without_width_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} head: head_dim must be at least 1, got 0"):
        HEADS[name](16, 1, head_dim=0)


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
