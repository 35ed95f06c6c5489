"""The predicted step of the loop against the measured one: what the loop adds to a plain step."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from m3bsr.backbones import task_backbone
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.predict_cost import predict
from m3bsr.engine.step_cost import StepJob
from m3bsr.heads import HEADS
from m3bsr.models import MultiTaskModel
from m3bsr.plan import Plan
from m3bsr.tasks import TASKS


def job(plan, ema_decay):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=0)
    backbone = task_backbone(vit, ("depth",))
    backbone.set_plan(plan)
    model = MultiTaskModel(backbone, {"depth": HEADS["light"](48, 1, head_dim=8)})
    batch = {"image": torch.randn(2, 3, 32, 32), "depth": 1 + torch.rand(2, 1, 32, 32)}
    optimizer, tasks = make_optimizer("adamw", model, lr=1e-3), {"depth": TASKS["depth"]()}
    return StepJob(model, tasks, batch, optimizer, torch.device("cpu"), ema_decay=ema_decay)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(train_blocks=(1, 3), drop_blocks=(1,), keep_rate=0.5)], ids=["all", "bsr"]
)
def test_a_moving_average_is_one_more_copy_of_what_trains(plan):
    plain, averaged = job(plan, 0.0), job(plan, 0.99)
    predicted = predict(averaged)
    assert predicted.peak_bytes - predict(plain).peak_bytes == predicted.gradient_bytes > 0
    before, after = plain.measured_peak(), averaged.measured_peak()
    assert after - before == predicted.gradient_bytes
    assert predicted.peak_bytes == pytest.approx(after, rel=0.02)
    assert averaged.measure(repeats=1).measured_peak_bytes == after
