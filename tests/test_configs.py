"""Every file under configs/ loads, is headed as it should be, and builds at tiny size."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from m3bsr.build import build_model, build_tasks
from m3bsr.config import Config, load_config, replace
from m3bsr.data import DATASETS, RECIPES

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").rglob("*.py"))
TINY = {
    "model.backbone": "m3vit_tiny_patch16",
    "model.weights": "",
    "model.head_dim": 8,
    "data.image_size": (32, 48),
    "moe.num_experts": 4,
    "moe.top_k": 2,
    "moe.mlp_ratio": 0.25,
}


def test_there_are_configs():
    assert {"moe_nyud.py", "moe_nyud_tiny.py", "scenes_bsr.py", "scenes_source.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_says_command_hardware_time_and_result(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    missing = [head for head in ("Command:", "Hardware:", "Time:", "Expected:") if head not in text]
    assert missing == [] and f"configs/{path.relative_to(ROOT / 'configs')}" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_builds_and_runs_at_tiny_size(path):
    config = load_config(path)
    assert Config.from_dict(config.to_dict()) == config
    dataset = DATASETS[config.data.name]
    assert config.data.augment in getattr(dataset, "recipes", RECIPES)
    tiny = dict(TINY)
    if config.data.sets or hasattr(
        dataset, "read_task_kwargs"
    ):  # the number of classes lies in a folder that is not there
        tiny["data.num_classes"] = dict.fromkeys(config.data.tasks, 3)
    torch.manual_seed(0)
    model = build_model(replace(config, tiny)).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 32, 48), size=(32, 48))
    assert set(output.predictions) == set(config.data.tasks)
    classes = {name: task.num_channels for name, task in build_tasks(replace(config, tiny)).items()}
    for name, prediction in output.predictions.items():
        expected = (1, classes[name]) + ((32, 48) if prediction.ndim == 4 else ())
        assert prediction.shape == expected and prediction.isfinite().all()
