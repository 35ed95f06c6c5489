"""The whole model: one path per task, plans end to end, weights of another run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from m3bsr import Plan
from m3bsr.bsr import patches_kept
from m3bsr.build import build_model, build_optimizer, build_tasks
from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig, replace
from m3bsr.engine.losses import task_losses
from m3bsr.models import MultiTaskModel, load_model_weights

TASKS = ("semseg", "depth", "normals")
TINY = Config(
    data=DataConfig(tasks=TASKS, image_size=(64, 96)),
    model=ModelConfig(backbone="m3vit_tiny_patch16", head_dim=16),
    moe=MoEConfig(blocks=(9, 11), num_experts=4, top_k=2, mlp_ratio=1.0),
)


ALL = Plan()


def make(plan: Plan = ALL, **changes) -> MultiTaskModel:
    torch.manual_seed(0)
    return build_model(replace(TINY, {"bsr": plan, **changes}))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def test_predictions_have_the_size_asked_for_and_one_task_costs_one_path() -> None:
    model = make().eval()
    output = model(images())
    assert {t: p.shape[1:] for t, p in output.predictions.items()} == {
        "semseg": (40, 64, 96),
        "depth": (1, 64, 96),
        "normals": (3, 64, 96),
    }
    small = model(images(), tasks=("depth",), size=(16, 24))
    assert list(small.predictions) == ["depth"] and small.predictions["depth"].shape == (2, 1, 16, 24)

    def flops(tasks) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(), tasks=tasks)
        return counter.get_total_flops()

    alone, all_three = flops(("depth",)), flops(TASKS)
    assert alone < 0.75 * all_three  # blocks 0 to 9 (up to the attention) are shared


def losses(plan: Plan, steps: int = 3) -> tuple[list[float], MultiTaskModel, dict[str, torch.Tensor]]:
    model = make(plan).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config, tasks = replace(TINY, {"bsr": plan}), build_tasks(TINY)
    optimizer = build_optimizer(config, model)
    generator = torch.Generator().manual_seed(5)
    targets = {
        "semseg": torch.randint(40, (2, 1, 64, 96), generator=generator),
        "depth": 1 + torch.rand(2, 1, 64, 96, generator=generator),
        "normals": torch.randn(2, 3, 64, 96, generator=generator),
    }
    values = []
    for _ in range(steps):
        output = model(images())
        loss = sum(task.loss(output.predictions[name], targets[name]) for name, task in tasks.items())
        loss = loss + 0.01 * output.balance_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, model, before


def test_keep_rate_one_and_all_trained_is_bit_equal_to_plain_fine_tuning() -> None:
    plain, _, _ = losses(Plan())
    bsr, _, _ = losses(Plan(drop_blocks=(3, 6), keep_rate=1.0, score_source="own", restore_before=9))
    assert bsr == plain and plain[-1] != plain[0]


def test_frozen_parameters_are_bit_identical_after_training() -> None:
    plan = Plan(train_blocks=(9, 11), train_experts=((0, 2), (1,)), drop_blocks=(8,), keep_rate=0.5, restore_before=11)
    _, model, before = losses(plan)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith(("backbone.blocks.9.", "backbone.blocks.11.", "heads.")) for name in changed)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed <= trained
    experts = {name for name in changed if ".experts." in name and ".blocks.9." in name}
    assert experts and all(".0." in name.split("experts.")[1] or ".2." in name.split("experts.")[1] for name in experts)


@pytest.mark.parametrize("restore", ["bypass", "adapt", "interpolate", "transfer", "unmerge"])
def test_every_way_of_restoring_gives_full_maps(restore: str) -> None:
    model = make(Plan(train_blocks=(9, 11), drop_blocks=(3, 6), keep_rate=0.5, restore=restore))
    output = model(images())
    assert output.predictions["depth"].shape == (2, 1, 64, 96)
    kept = patches_kept(output.stages["depth"], output.grid)
    assert [int(mask.sum()) for mask in kept] == [2 * 12, 2 * 6] or [int(mask.sum()) for mask in kept] == [24, 14]
    output.predictions["depth"].mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_head_of_levels_trains_on_the_blocks_that_it_reads() -> None:
    """Frozen blocks before the first trained one feed the head and get no gradient; every head learns."""
    plan = Plan(train_blocks=(9, 11), drop_blocks=(3, 6), keep_rate=0.5, restore_before=11)
    model = make(plan, **{"model.head": "multilevel", "model.head_blocks": (1, 4, 9, 11)}).train()
    output = model(images(), size=(16, 24))
    assert {task: p.shape[1:] for task, p in output.predictions.items()} == {
        "semseg": (40, 16, 24),
        "depth": (1, 16, 24),
        "normals": (3, 16, 24),
    }
    sum(p.square().mean() for p in output.predictions.values()).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == with_gradient
    assert {name.split(".")[2] for name in with_gradient if name.startswith("backbone.blocks.")} == {"9", "11"}
    depth = model.eval()(images(), tasks=("depth",)).predictions["depth"]
    torch.testing.assert_close(depth, model(images()).predictions["depth"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["light", "multilevel"])
def test_refinement_trains_with_the_tasks_and_evaluation_does_without(head: str) -> None:
    plan = Plan(train_blocks=(11,), drop_blocks=(8,), keep_rate=0.5)
    model = make(plan, **{"model.head": head, "model.refine_dim": 8, "loss.refine_weight": 0.5})
    plain = make(plan, **{"model.head": head})
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("refinement.")})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        evaluated = model.eval()(images())
    with FlopCounterMode(display=False) as plain_counter, torch.no_grad():
        expected = plain.eval()(images())
    assert counter.get_total_flops() == plain_counter.get_total_flops() and evaluated.auxiliary == {}
    assert all(torch.equal(evaluated.predictions[task], expected.predictions[task]) for task in TASKS)

    tasks, size = build_tasks(TINY), (16, 24)
    targets = {"semseg": torch.randint(40, (2, 1, 64, 96)), "depth": 1 + torch.rand(2, 1, 64, 96)}
    targets["normals"] = torch.randn(2, 3, 64, 96)
    weights = {"semseg": 1.0, "depth": 2.0, "normals": 3.0}
    output = model.train()(images(), size=size)
    assert {task: p.shape for task, p in output.auxiliary.items()} == {
        t: p.shape for t, p in output.predictions.items()
    }
    parts = task_losses(output, targets, tasks, weights)
    small = {name: tasks[name].resize_target(target, size) for name, target in targets.items()}
    auxiliary = sum(weights[t] * tasks[t].loss(output.auxiliary[t], small[t]) for t in TASKS)
    torch.testing.assert_close(parts["auxiliary_loss"], 0.5 * auxiliary)
    own = sum(weights[t] * parts[f"losses/{t}"] for t in TASKS)
    torch.testing.assert_close(parts["loss"], own + parts["auxiliary_loss"])
    tasks["semseg"].loss(output.auxiliary["semseg"], small["semseg"]).backward()
    heard = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"depth", "normals", "semseg", "blocks"} <= heard  # the loss of one task teaches the heads of all
    assert model(images(), tasks=("depth",)).auxiliary == {}
    names = {name for group in build_optimizer(TINY, model).param_groups for name in group["param_names"]}
    assert {name for name, _ in model.refinement.named_parameters("refinement")} <= names


def test_weights_of_another_run_start_a_model_with_a_new_task() -> None:
    source = make(**{"data.tasks": ("semseg", "depth")})
    model = make()
    fresh = load_model_weights(model, source.state_dict(), "source")
    own, other = model.state_dict(), source.state_dict()
    assert all(torch.equal(own[key], value) for key, value in other.items())
    assert fresh and all("normals" in name for name in fresh)
    with pytest.raises(ValueError, match="has shape"):
        load_model_weights(make(**{"data.image_size": (64, 64)}), other, "source")
    with pytest.raises(ValueError, match="lacks backbone"):
        load_model_weights(model, {k: v for k, v in other.items() if "patch_embed" not in k}, "source")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.backbone": "m3vit_tny_patch16"}, "did you mean 'm3vit_tiny_patch16'"),
        ({"model.backbone": "resnet18"}, "not a timm VisionTransformer"),
        ({"model.head": "lite"}, "did you mean 'light'"),
        (
            {"model.refine_dim": 8, "data.tasks": ("depth",)},
            "model.refine_dim needs two dense tasks or more, got depth",
        ),
        ({"model.head_blocks": (2, 5, 8, 11)}, "light reads the last block alone"),
        ({"model.head": "multilevel", "model.head_blocks": (2, 5, 8, 10)}, "must end with the last block"),
        ({"model.head": "multilevel", "model.head_blocks": (2, 5, 11)}, "must name 4 blocks"),
        ({"data.tasks": ("semseg", "dept")}, "did you mean 'depth'"),
        ({"data.tasks": ("saliency",)}, "saliency"),
        ({"moe.gate": "vmo"}, "did you mean 'vmoe'"),
        ({"moe.blocks": (12,)}, "out of range"),
        ({"bsr": Plan(train_blocks=(3,), drop_blocks=(11,), keep_rate=0.5)}, "last block"),
        ({"data.image_size": (60, 96)}, "image_size"),
    ],
)
def test_bad_configs_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_any_timm_vit_with_experts_serves_as_backbone() -> None:
    model = make(**{"model.backbone": "vit_tiny_patch16_224", "moe.blocks": (11,)}).eval()
    assert model.backbone.moe_blocks == (11,)
    assert model(images()).predictions["semseg"].shape == (2, 40, 64, 96)
