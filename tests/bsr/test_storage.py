"""What autograd keeps: every way of keeping less gives the same forward pass, fewer bytes, and bounded gradients."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils.checkpoint import checkpoint

from m3bsr import Plan, reprogram
from m3bsr.bsr.storage import GROUP, from_int8, prune, to_int8, unprune
from m3bsr.cost import SavedBytes

BATCH = 4
PLAN = {"train_blocks": (1, 3), "drop_blocks": (2,), "keep_rate": 0.5, "score_source": "own"}


def make(**options) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 5, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, **options})


def images() -> torch.Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run(vit: VisionTransformer, autocast: bool = False, wrap=lambda model, x: model(x), **plan):
    """Loss, gradients by name, stored bytes of one step."""
    model = reprogram(vit, Plan(**{**PLAN, **plan}))
    model.zero_grad()
    x = images()
    torch.manual_seed(2)
    with SavedBytes(model, [x]) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(wrap(model, x), torch.arange(BATCH))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, saved.bytes


def error(grads: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative error of all gradients taken together."""
    assert grads.keys() == exact.keys()
    a, b = (torch.cat([g[name].flatten() for name in exact]) for g in (grads, exact))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("level", ["cheap", "frozen", "both"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.1, "qk_norm": True},
        {"proj_drop_rate": 0.2, "drop_path_rate": 0.2, "scale_mlp_norm": True},
        {"class_token": False, "global_pool": "avg"},
    ],
    ids=["plain", "layer scale, qk-norm", "dropout, MLP norm", "no class token"],
)
def test_recomputed_gradients_are_exact(level: str, options: dict) -> None:
    vit = make(**options).train()
    loss, exact, stored = run(vit)
    same, grads, less = run(vit, recompute=level)
    assert torch.equal(loss, same)
    assert error(grads, exact) < 1e-6
    assert less < 0.8 * stored
    trained = {name.split(".")[1] for name in grads if name.startswith("blocks.")}
    assert trained == {"1", "3"}


def test_cheap_drops_exactly_what_it_names() -> None:
    """Trained: what LayerNorms and GELU give, mean and rstd; frozen: GELU's input, the second mean and rstd."""
    stored = {level: run(make(), drop_blocks=(), recompute=level)[2] for level in ("none", "cheap", "both")}
    N, D, H = 65, 64, 256
    trained, frozen = 2 * (2 * N * D + N * H + 4 * N), 2 * (N * H + 2 * N)  # block 0 has no graph, 2 and 4 are frozen
    assert stored["none"] - stored["cheap"] == 4 * BATCH * (trained + frozen)
    # of frozen attention: q, k, v, output, one statistic per head and token, and LayerNorm's two
    assert stored["cheap"] - stored["both"] == 4 * BATCH * 2 * (4 * N * D + 2 * N + 2 * N)


@pytest.mark.parametrize("level", ["none", "cheap", "both"])
@pytest.mark.parametrize(("dtype", "bound", "ratio"), [("bf16", 0.004, 0.54), ("int8", 0.015, 0.32)])
def test_narrow_storage(level: str, dtype: str, bound: float, ratio: float) -> None:
    loss, exact, stored = run(make(), recompute=level)
    same, grads, less = run(make(), recompute=level, activation_dtype=dtype)
    assert torch.equal(loss, same)
    assert 0 < error(grads, exact) < bound
    assert less < ratio * stored


@pytest.mark.parametrize(("rate", "bound", "ratio"), [(0.5, 0.3, 0.84), (0.9, 0.6, 0.69)])
def test_pruned_storage_is_bounded_and_smaller(rate: float, bound: float, ratio: float) -> None:
    loss, exact, stored = run(make())
    same, grads, less = run(make(), prune_rate=rate)
    assert torch.equal(loss, same)
    assert 0 < error(grads, exact) < bound
    assert less < ratio * stored
    assert run(make(), prune_rate=rate, activation_dtype="int8")[2] < 0.4 * less
    # what is recomputed starts from tensors that are not pruned: only LayerNorm's inputs in frozen blocks are
    assert error(run(make(), prune_rate=rate, recompute="cheap")[1], exact) < bound / 3


def test_pruning_almost_nothing_is_almost_exact() -> None:
    assert error(run(make(), prune_rate=0.001)[1], run(make())[1]) < 1e-3


def test_packed_parts() -> None:
    flat = torch.randn(2 * 501)
    values, scale = to_int8(flat)
    assert values.dtype == torch.int8 and len(scale) == -(-len(flat) // GROUP)
    peak = F.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP).abs().amax(1).repeat_interleave(GROUP)[: len(flat)]
    assert ((from_int8(values, scale, len(flat)) - flat).abs() <= peak / 254 * 1.001).all()
    assert torch.equal(from_int8(*to_int8(torch.zeros(70)), 70), torch.zeros(70))

    kept, mask = prune(flat, num_samples=2, rate=0.9)
    assert len(kept) == 2 * 50 and len(mask) == -(-len(flat) // 8) and mask.dtype == torch.uint8
    back = unprune(kept, mask, len(flat)).view(2, -1)
    for sample, original in zip(back, flat.view(2, -1), strict=True):
        there = sample != 0
        assert there.sum() == 50 and torch.equal(sample[there], original[there])
        assert original[~there].abs().max() <= sample[there].abs().min()
    tied, _ = prune(torch.zeros(100), num_samples=1, rate=0.9)
    assert len(tied) == 10  # a threshold would keep all of them


def test_statistics_weights_and_scores_stay_exact() -> None:
    """Under autocast weights are stored as copies, whose storages are not the parameters'."""
    from m3bsr.bsr import storage

    seen = []
    packed = storage._Packed.__init__

    def spy(self, tensor, *args):
        seen.append(tuple(tensor.shape))
        packed(self, tensor, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage._Packed, "__init__", spy)
        run(make(), autocast=True, activation_dtype="int8")
    assert seen
    for shape in seen:
        assert shape[-1] > 1 and shape not in {(64, 192), (192, 64), (64, 64), (64, 256), (256, 64)}
        assert torch.Size(shape).numel() >= BATCH * 16 * 64


@pytest.mark.parametrize(
    "plan", [{"recompute": "both"}, {"activation_dtype": "int8"}, {"recompute": "cheap", "prune_rate": 0.5}]
)
def test_autocast_keeps_fewer_bytes_too(plan: dict) -> None:
    _, exact, stored = run(make(), autocast=True)
    _, grads, less = run(make(), autocast=True, **plan)
    assert error(grads, exact) < (0.4 if "prune_rate" in plan else 0.05)
    assert less < 0.85 * stored


def test_inside_another_checkpoint_nothing_is_stored() -> None:
    def wrapped(model, x):
        return checkpoint(model, x, use_reentrant=False)

    _, exact, _ = run(make(), activation_dtype="int8")
    _, grads, stored = run(make(), wrap=wrapped, activation_dtype="int8")
    assert stored < 1000
    assert error(grads, exact) < 1e-6


def test_compiled_model_gives_the_same_gradients() -> None:
    torch.compiler.reset()
    plan = {"recompute": "cheap", "train_blocks": (0,), "drop_blocks": ()}
    _, eager, _ = run(make(depth=2), **plan)
    compiled = lambda model, x: torch.compile(model, backend="aot_eager")(x)  # noqa: E731
    assert error(run(make(depth=2), wrap=compiled, **plan)[1], eager) < 1e-5
    torch.compiler.reset()


def test_nothing_outlives_the_graph_and_no_grad_stores_nothing() -> None:
    from m3bsr.bsr import storage

    alive = []
    packed = storage._Packed.__init__

    def spy(self, *args):
        alive.append(weakref.ref(self))
        packed(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage._Packed, "__init__", spy)
        model = reprogram(make(), Plan(**PLAN, activation_dtype="int8", prune_rate=0.5))
        loss = model(images()).sum()
        count = len(alive)
        assert count and all(ref() is not None for ref in alive)
        loss.backward()
        del loss
        gc.collect()
        assert all(ref() is None for ref in alive)
        with torch.no_grad():
            model(images())
        reprogram(model, Plan(**PLAN, recompute="both"))(images())
        assert len(alive) == count
