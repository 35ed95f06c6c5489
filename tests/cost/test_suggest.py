"""Suggested plans: planted information is found, budgets hold when measured, and the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m3bsr import Plan, Suggestion, reprogram, suggest_plan
from m3bsr.backbones import MoEVisionTransformer
from m3bsr.cost import measure_step, published_plan
from m3bsr.heads import LightHead
from m3bsr.models import MultiTaskModel

DEPTH = 6


def make(**options) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": DEPTH, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**{**sizes, **options})


def data(number: int = 2, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(number)
    ]


def cross_entropy(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def measured(model: nn.Module, plan: Plan, batch, loss=cross_entropy) -> tuple[float, int]:
    """Share of full fine-tuning's work, and peak, of a real step."""
    reports = []
    for each in (Plan(), plan):
        twin = copy.deepcopy(model).train()
        vit = getattr(twin, "backbone", None)
        if vit is None:
            twin = reprogram(twin, each)
        else:
            vit.set_plan(each)
        optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad])
        reports.append(measure_step(twin, batch, loss, optimizer, batch_size=len(batch[0]), repeats=1))
    return reports[1].train_step_gmacs / reports[0].train_step_gmacs, reports[1].measured_peak_bytes


@pytest.mark.parametrize("planted", [1, 4])
def test_planted_information_is_found(planted: int) -> None:
    vit = make(init_values=1.0)
    with torch.no_grad():  # a block without layer scale changes nothing, and its weights have no gradient
        for i, block in enumerate(vit.blocks):
            for scale in (block.ls1.gamma, block.ls2.gamma):
                scale.fill_(1.0 if i == planted else 0.0)
    for block in vit.blocks:
        block.ls1.requires_grad_(False)
    plan, table = suggest_plan(vit, data(), num_blocks=1, compute=0.9)
    information = [row.information for row in table.blocks]
    assert max(range(DEPTH), key=information.__getitem__) == planted
    assert sum(information) == pytest.approx(1)
    assert plan.train_blocks == (planted,)
    assert [row.block for row in table.blocks if row.chosen] == [planted]


@pytest.mark.parametrize(
    "budget", [{"compute": 0.4}, {"memory_bytes": 5 * 2**20}, {"memory_bytes": 6 * 2**20, "compute": 0.5}, {}], ids=str
)
def test_budgets_hold_when_measured(budget: dict) -> None:
    vit, batches = make(), data()
    suggestion = suggest_plan(vit, batches, num_blocks=2, **budget)
    share, peak = measured(vit, suggestion.plan, batches[0])
    row = next(row for row in suggestion.table.plans if row.plan == suggestion.plan)
    assert row.compute == pytest.approx(share, rel=0.01)
    assert row.peak_bytes == pytest.approx(peak, rel=0.03)
    assert share <= budget.get("compute", 1)
    assert peak <= budget.get("memory_bytes", peak)
    fitting = [row for row in suggestion.table.plans if row.verdict.startswith(("fits", "taken"))]
    assert row.value == max(r.value for r in fitting)
    if not budget:
        assert share <= suggestion.table.plans[-1].compute + 1e-6
    if "memory_bytes" not in budget:
        assert suggestion.plan.recompute == "none"


def test_more_budget_never_means_more_drops() -> None:
    vit, batches = make(), data(1)
    kept = [suggest_plan(vit, batches, 2, compute=compute) for compute in (0.3, 0.5, 0.95)]
    values = [max(r.value for r in s.table.plans if r.verdict.startswith("taken")) for s in kept]
    assert values[0] < values[1] < values[2]
    assert kept[-1].plan.drop_blocks == ()


def test_the_model_is_untouched() -> None:
    vit = reprogram(make(drop_path_rate=0.2, proj_drop_rate=0.1), Plan(train_blocks=(2,), drop_blocks=(3,)))
    vit.train().blocks[1].eval()
    batches = data()
    cross_entropy(vit, batches[0]).backward()
    plan, state = vit.plan, {k: v.clone() for k, v in vit.state_dict().items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in vit.named_parameters()}
    trains = {n: p.requires_grad for n, p in vit.named_parameters()}
    modes = {n: m.training for n, m in vit.named_modules()}
    random = torch.get_rng_state()
    suggest_plan(vit, (batch for batch in batches), num_blocks=2, compute=0.6)
    assert torch.equal(torch.get_rng_state(), random)
    assert vit.plan is plan
    assert {n: m.training for n, m in vit.named_modules()} == modes
    assert {n: p.requires_grad for n, p in vit.named_parameters()} == trains
    assert all(torch.equal(v, state[k]) for k, v in vit.state_dict().items())
    for name, parameter in vit.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])


def test_impossible_budgets_name_the_smallest_possible() -> None:
    vit, batches = make(), data(1)
    with pytest.raises(ValueError, match=r"memory_bytes=100000 .* the smallest possible is (\d+)") as error:
        suggest_plan(vit, batches, 2, memory_bytes=100_000)
    least = int(str(error.value).split("possible is ")[1].split(";")[0])
    assert suggest_plan(vit, batches, 2, memory_bytes=least).plan.recompute != "none"
    with pytest.raises(ValueError, match="smallest possible is"):
        suggest_plan(vit, batches, 2, memory_bytes=least - 1)
    with pytest.raises(ValueError, match="compute=0.05 .* the smallest possible is 0.09"):
        suggest_plan(vit, batches, 2, compute=0.05)


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}], ids=str)
def test_other_tokens(options: dict) -> None:
    vit, batches = make(**options), data(1)
    plan, table = suggest_plan(vit, batches, 2, compute=0.5)
    share, _ = measured(vit, plan, batches[0])
    assert len(plan.train_blocks) == 2 and share <= 0.5
    assert "taken" in str(table)


def test_dense_tasks_with_a_loss_and_experts() -> None:
    torch.manual_seed(0)
    tasks = ("semseg", "depth")
    backbone = MoEVisionTransformer(
        img_size=32, patch_size=4, embed_dim=48, depth=DEPTH, num_heads=3, moe_blocks=(3, 5), num_experts=4, top_k=2,
        tasks=tasks,
    )  # fmt: skip
    model = MultiTaskModel(backbone, {"semseg": LightHead(48, 5, 8), "depth": LightHead(48, 1, 8)})
    images = torch.randn(4, 3, 32, 32)
    batch = (images, torch.randint(5, (4, 32, 32)), torch.rand(4, 1, 32, 32))

    def loss(model: nn.Module, batch) -> torch.Tensor:
        out = model(batch[0])
        labels = F.cross_entropy(out.predictions["semseg"], batch[1])
        return labels + F.l1_loss(out.predictions["depth"], batch[2]) + 0.01 * out.balance_loss

    before = copy.deepcopy(model.state_dict())
    suggestion = suggest_plan(model, [batch], 2, compute=0.6, loss=loss, warm_steps=2)
    plan = suggestion.plan
    assert isinstance(suggestion, Suggestion) and suggestion[0] is plan
    assert plan.drop_blocks and (plan.fuse, plan.select, plan.restore) == ("merge", "similar", "unmerge")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    share, _ = measured(model, plan, batch, loss)
    assert share <= 0.6
    with pytest.raises(ValueError, match=r"give loss=loss\(model, batch\)"):
        suggest_plan(model, [batch])


def test_wrong_arguments() -> None:
    vit = make()
    for arguments, message in [
        ({"batches": []}, "at least one batch"),
        ({"num_blocks": 7}, "num_blocks must lie in 1 to 6"),
        ({"compute": 0.0}, "compute must be positive"),
        ({"blocks": (2, 6)}, "out of range: the model has blocks 0 to 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            suggest_plan(vit, **{"batches": data(1), **arguments})
    with pytest.raises(ValueError, match="needs a timm VisionTransformer"):
        suggest_plan(nn.Linear(2, 2), data(1))
    with pytest.raises(ValueError, match="no classifier"):
        suggest_plan(make(num_classes=0), data(1))


def test_published_choice() -> None:
    plan = published_plan(12)
    assert (plan.train_blocks, plan.drop_blocks, plan.keep_rate) == ((3, 7, 11), (3, 6, 9), 0.5)
    dense = published_plan(12, dense=True)
    assert (dense.drop_blocks, dense.keep_rate, dense.fuse, dense.restore) == ((3, 6, 9), 0.8, "merge", "unmerge")
