"""Predicted costs of a training step against measured ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m3bsr import Plan, reprogram
from m3bsr.bsr import attention
from m3bsr.cost import CostReport, Precision, Prediction, SavedBytes, measure_step, predict_step
from m3bsr.cost.memory import allocations
from m3bsr.engine.predict_cost import precision_of

BATCH = 2
BSR = {"train_blocks": (1, 3), "drop_blocks": (1, 2), "keep_rate": 0.5}


def make(**options) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 4, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**{**sizes, **options})


def loss(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def both(vit: VisionTransformer, bf16: bool = False, optimizer: str = "adamw", **plan) -> tuple[Prediction, CostReport]:
    model = reprogram(vit, Plan(**plan)).train()
    batch = (torch.randn(BATCH, 3, 64, 64), torch.arange(BATCH))
    torch.manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = {"adamw": torch.optim.AdamW, "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1)}
    report = measure_step(
        model,
        batch,
        loss,
        kinds[optimizer](trained),
        batch_size=BATCH,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        repeats=1,
    )
    precision = precision_of(torch.device("cpu"), "bf16") if bf16 else None
    return predict_step(vit, model.plan, BATCH, optimizer=optimizer, precision=precision), report


def check(predicted: Prediction, measured: CostReport, peak: float = 0.02, stored: float = 0.01) -> None:
    data = predicted.to_dict()
    for name in ("trainable_params", "total_params", "gradient_bytes"):
        assert data[name] == getattr(measured, name), name
    assert data["state_bytes"] == pytest.approx(measured.state_bytes, rel=0.01)
    assert data["forward_gmacs"] == pytest.approx(measured.forward_gmacs, rel=0.002)
    assert data["train_step_gmacs"] == pytest.approx(measured.train_step_gmacs, rel=0.005)
    assert data["saved_bytes_per_sample"] == pytest.approx(measured.saved_bytes_per_sample, rel=stored)
    assert data["predicted_peak_bytes"] == pytest.approx(measured.measured_peak_bytes, rel=peak), predicted.peak


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"train_blocks": ()},
        {"train_blocks": (1, 3)},
        {"train_blocks": (0, 2), "drop_blocks": (3,), "keep_rate": 0.7, "fuse": "none"},
        BSR,
        {**BSR, "score_source": "own"},
        {**BSR, "drop_blocks": (2,), "fuse": "mean"},
        {**BSR, "drop_from": "backward", "select": "random"},
        {**BSR, "drop_from": "backward", "drop_blocks": (0, 2), "restore_before": 3, "select": "similar"},
        {**BSR, "restore_before": 3, "select": "cover"},
    ],
    ids=str,
)
def test_plans(plan: dict) -> None:
    check(*both(make(), **plan))


@pytest.mark.parametrize(
    "plan",
    [
        {"select": "similar"},
        {"proportional": True, "restore_before": 3, "restore": "unmerge"},
    ],
    ids=str,
)
def test_merging(plan: dict) -> None:
    check(*both(make(), **BSR, fuse="merge", **plan), peak=0.05)


@pytest.mark.parametrize("recompute", ["cheap", "frozen", "both", "all"])
def test_recomputation(recompute: str) -> None:
    check(*both(make(), **BSR, recompute=recompute), peak=0.05)


@pytest.mark.parametrize(
    "storage",
    [
        {"activation_dtype": "bf16"},
        {"activation_dtype": "int8", "recompute": "both"},
        {"prune_rate": 0.9},
        {"prune_rate": 0.5, "activation_dtype": "int8"},
    ],
    ids=str,
)
def test_narrow_and_pruned_storage(storage: dict) -> None:
    check(*both(make(), **BSR, **storage), peak=0.05, stored=0.03)
    check(*both(make(), **storage), peak=0.05, stored=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"init_values": 0.1, "qk_norm": True},
        {"drop_path_rate": 0.2},
    ],
    ids=str,
)
def test_models(options: dict) -> None:
    # Measured bytes have what scoring stores, too, although detached scores let go of it at once.
    check(*both(make(**options), **BSR), peak=0.05, stored=0.3 if "class_token" in options else 0.02)
    check(*both(make(**options), train_blocks=(1, 3), recompute="cheap"), peak=0.03)


def test_sgd_has_less_state() -> None:
    predicted, measured = both(make(), optimizer="sgd", **BSR)
    check(predicted, measured)
    assert predicted.state_bytes == predicted.gradient_bytes


@pytest.mark.parametrize("emulated", [False, True], ids=["written out", "fused"])
@pytest.mark.parametrize("plan", [{}, {"train_blocks": ()}, BSR, {**BSR, "recompute": "cheap"}], ids=str)
def test_autocast(plan: dict, emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of attention: written out where bfloat16 is arithmetic of the processor, fused where it is not."""
    monkeypatch.setattr(attention, "cpu_emulates_bf16", lambda: emulated)
    vit = make(img_size=64, patch_size=8)  # the CPU is slow in bfloat16
    # Measured bytes have what scoring stores, too, although detached scores let go of it at once.
    check(*both(vit, bf16=True, **plan), peak=0.05, stored=0.06 if "drop_blocks" in plan else 0.002)


def test_scratch_of_the_patch_embedding_is_in_the_peak() -> None:
    """Head only: nothing else is as large as what the convolution takes for itself."""
    for bf16 in (False, True):
        predicted, measured = both(make(patch_size=8), bf16=bf16, train_blocks=())
        assert predicted.peak_bytes == pytest.approx(measured.measured_peak_bytes, rel=0.02), predicted.peak


def test_a_fused_optimizer_has_no_temporaries() -> None:
    options = {"train_blocks": (4,), "recompute": "both"}
    vit = make(img_size=16, embed_dim=96)
    with_them, without = (predict_step(vit, Plan(**options), 1, optimizer=kind) for kind in ("adamw", "fused adamw"))
    assert with_them.peak[1] == "optimizer"
    assert without.state_bytes == with_them.state_bytes and without.peak_bytes < with_them.peak_bytes


def test_many_samples_grow_by_what_each_stores() -> None:
    vit, plan = make(), Plan(**BSR)
    small, large = (predict_step(vit, plan, size) for size in (32, 64))
    grown = (large.peak_bytes - small.peak_bytes) / 32
    assert grown == pytest.approx(large.saved_bytes / 64, rel=0.25)
    assert grown > large.saved_bytes / 64
    assert large.train_step_macs == 2 * small.train_step_macs


def test_nothing_runs() -> None:
    """Neither weights nor gradients nor modes nor random numbers change, and a model without weights will do."""
    vit = reprogram(make(), Plan(**BSR)).eval()
    before = copy.deepcopy(vit.state_dict())
    state = torch.get_rng_state()
    predicted = predict_step(vit, Plan(), 8)
    assert torch.equal(torch.get_rng_state(), state) and not vit.training
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert vit.plan == Plan(**BSR) and not vit.blocks[0].mlp.fc1.weight.requires_grad
    with torch.device("meta"):
        empty = make()
    assert predict_step(empty, Plan(), 8).peak == predicted.peak


@pytest.mark.parametrize("storage", [{"activation_dtype": "int8"}, {"prune_rate": 0.5, "recompute": "cheap"}], ids=str)
def test_what_is_alive_behind_the_forward_pass_is_what_is_stored(storage: dict) -> None:
    """A hook that mentions a tensor keeps it as long as the graph, unseen by ``SavedBytes``."""
    model = reprogram(make(), Plan(**BSR, **storage)).train()
    batch = (torch.randn(BATCH, 3, 64, 64), torch.arange(BATCH))
    values = [loss(model, batch)]
    alive = sum(allocations(lambda: values.append(loss(model, batch))))
    with SavedBytes(model, batch) as saved:
        values.append(loss(model, batch))
    assert alive == pytest.approx(saved.bytes, rel=0.05)


def test_what_has_no_formula_says_so() -> None:
    vit = make()
    vit.blocks[2] = nn.Sequential(vit.blocks[2])
    with pytest.raises(ValueError, match="not for Sequential"):
        predict_step(vit, Plan(), 2)
    with pytest.raises(ValueError, match="out of range"):
        predict_step(make(), Plan(train_blocks=(5,)), 2)
    with pytest.raises(ValueError, match="optimizer"):
        predict_step(make(), Plan(), 2, optimizer="lion")


def test_threads_have_buffers_of_their_own_in_attention() -> None:
    """As many as will run: fused attention alone takes 8 bytes a query and key of a block, and thread."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            check(*both(make(), train_blocks=(1, 3), recompute="both"), peak=0.02)
        few, many = (predict_step(make(), Plan(), 2, precision=Precision(threads=n)).peak_bytes for n in (1, 64))
        assert many > few + 60 * 8 * 32 * 257
    finally:
        torch.set_num_threads(before)
