"""Every method has a prediction of what its training step costs, and that is what is measured."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m3bsr.backbones import task_backbone
from m3bsr.backbones.moe_vit import MoEVisionTransformer
from m3bsr.bsr import attention
from m3bsr.cost import SavedBytes, count_macs
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.predict_cost import predict
from m3bsr.engine.step_cost import StepJob
from m3bsr.heads import HEADS, ClassifierHead
from m3bsr.methods import METHODS, find_method
from m3bsr.models import MultiTaskModel
from m3bsr.plan import Plan
from m3bsr.tasks import TASKS

D, DEPTH = 48, 4
VALUES = {"last": "last:2", "adapter": "adapter:16", "lora": "lora:4"}
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
EVERY = [pytest.param(VALUES.get(name, name), marks=needs_peft if name == "lora" else (), id=name) for name in METHODS]
SLOW = [("dense", "bf16"), ("moe", "fp32"), ("moe", "bf16")]


def job(method: str, kind: str, precision: str = "fp32", batch: int = 3, **options) -> StepJob:
    """``dense``: a ViT that classifies; ``moe``: two dense tasks with experts and a gate each in blocks 1 and 3."""
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": D, "depth": DEPTH, "num_heads": 3, **options}
    heads: dict[str, nn.Module]
    if kind == "moe":
        tasks = {"semseg": TASKS["semseg"](num_classes=5), "depth": TASKS["depth"]()}
        experts = {"moe_blocks": (1, 3), "num_experts": 4, "top_k": 2, "moe_mlp_ratio": 1.0}
        backbone = MoEVisionTransformer(tasks=tuple(tasks), **sizes, **experts)
        heads = {name: HEADS["light"](D, task.num_channels, head_dim=8) for name, task in tasks.items()}
    else:
        tasks = {"classification": TASKS["classification"](num_classes=7)}
        vit = VisionTransformer(**sizes, num_classes=0)
        heads, backbone = {"classification": ClassifierHead(vit, 7)}, task_backbone(vit, tuple(tasks))
    model = MultiTaskModel(backbone, heads)
    found, value = find_method(method)
    backbone.set_plan(found.plan(Plan(train_blocks=(1, 3), drop_blocks=(2,), keep_rate=0.5), DEPTH, value))
    found.change(model, value)
    inputs = {"image": torch.randn(batch, 3, 64, 64)}
    inputs |= {name: task.example_target(batch, (64, 64)) for name, task in tasks.items()}
    optimizer = make_optimizer("adamw", model, lr=1e-3)
    return StepJob(model, tasks, inputs, optimizer, device=torch.device("cpu"), precision=precision, loss_stride=4)


KINDS = [("dense", "fp32"), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW)]


@pytest.mark.parametrize(("kind", "precision"), KINDS)
@pytest.mark.parametrize("method", EVERY)
def test_every_method_has_a_prediction_that_holds(method: str, kind: str, precision: str) -> None:
    step = job(method, kind, precision)
    predicted = predict(step)
    assert predicted.trainable_params == sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    assert predicted.peak_bytes == pytest.approx(step.measured_peak(), rel=0.05), predicted.peak


ADDED = [
    {},
    {"init_values": 0.1},
    {"qk_norm": True},
    {"drop_path_rate": 0.2},
]


@pytest.mark.parametrize("options", ADDED, ids=str)
@pytest.mark.parametrize("method", ["bitfit", "norm", pytest.param("lora:4", marks=needs_peft), "adapter:16"])
def test_what_is_stored_and_counted_where_little_trains(method: str, options: dict) -> None:
    step = job(method, "dense", **options)
    predicted = predict(step)
    inputs = step.inputs()
    with SavedBytes(step.model.train(), list(inputs.values())) as saved:
        loss = step.loss(step.model, inputs)
    macs = count_macs(loss.backward)
    assert predicted.saved_bytes == pytest.approx(saved.bytes, rel=0.005)
    assert predicted.train_step_macs - predicted.forward_macs == pytest.approx(macs.total, rel=0.002)


@pytest.mark.slow
def test_attention_written_out_under_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    for emulated in (False, True):
        monkeypatch.setattr(attention, "cpu_emulates_bf16", lambda emulated=emulated: emulated)
        step = job("lora", "dense", "bf16")
        assert predict(step).peak_bytes == pytest.approx(step.measured_peak(), rel=0.05)


def test_a_weight_that_no_formula_knows() -> None:
    step = job("head", "dense")
    step.model.get_parameter("backbone.blocks.2.mlp.fc1.weight").requires_grad_(True)
    with pytest.raises(ValueError, match=r"not for blocks\.2\.mlp\.fc1\.weight"):
        predict(step)
    assert predict(step, Plan()).peak_bytes > 0  # under another plan the block trains, or does not, as that says
