"""From a config to objects: the only place that knows both.

Every function takes the whole ``Config`` and returns plain objects; what they are built from takes keyword arguments.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import Dataset

from m3bsr.backbones import DENSE_NAMES, TaskViTMixin, add_moe, load_weights, read_weights, task_backbone
from m3bsr.config import Config
from m3bsr.data import DATASETS, build_transform
from m3bsr.engine.loader import steps_in_run
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.schedule import make_schedule
from m3bsr.heads import HEADS, set_output_bias
from m3bsr.models import MultiTaskModel, is_model_state, load_model_weights
from m3bsr.tasks import TASKS
from m3bsr.tasks.base import Task
from m3bsr.utils.log import get_logger
from m3bsr.utils.lookup import lookup

log = get_logger(__name__)


def build_tasks(config: Config) -> dict[str, Task]:
    """The tasks of the config, with the data set's own settings (number of classes, edge tolerance).

    Raises:
        ValueError: a task that nobody knows, or that the data set has no labels for.
    """
    dataset = lookup(DATASETS, config.data.name, "data.name")
    tasks = {}
    for name in config.data.tasks:
        task = lookup(TASKS, name, "data.tasks")
        lookup(dict.fromkeys(dataset.known_tasks), name, f"data.tasks of {config.data.name}")
        tasks[name] = task(**dataset.task_kwargs.get(name, {}))
    return tasks


def build_backbone(config: Config) -> TaskViTMixin:
    """The backbone with its experts, before any plan or weights.

    Raises:
        ValueError: an unknown backbone, gate or backend, blocks out of range.
    """
    name, moe = config.model.backbone, config.moe
    common: dict[str, Any] = {"img_size": config.data.image_size}
    experts: dict[str, Any] = {
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "gate": moe.gate,
        "gate_mode": moe.gate_mode,
        "noise_std": moe.noise_std,
        "renormalize": moe.renormalize,
        "backend": moe.backend,
    }
    if name in DENSE_NAMES:
        backbone: Any = timm.create_model(
            name,
            tasks=config.data.tasks,
            moe_blocks=moe.blocks,
            moe_mlp_ratio=moe.mlp_ratio,
            drop_path=config.model.drop_path,
            **common,
            **experts,
        )
    else:
        backbone = task_backbone(_timm_vit(name, drop_path_rate=config.model.drop_path, **common), config.data.tasks)
        if moe.blocks:
            add_moe(backbone, blocks=moe.blocks, tasks=config.data.tasks, mlp_ratio=moe.mlp_ratio, **experts)
    patch = backbone.patch_embed.patch_size
    if any(side % step for side, step in zip(config.data.image_size, patch, strict=True)):
        raise ValueError(f"data.image_size {config.data.image_size} must be multiples of the patch size {patch}")
    return backbone


def _load(config: Config, model: MultiTaskModel) -> None:
    """Weights of ``config.model.weights``: timm's hub, a backbone file, or the whole model of another run."""
    name, moe = config.model.weights, config.moe
    if name == "timm":
        dense = DENSE_NAMES.get(config.model.backbone, config.model.backbone)
        source: Any = timm.create_model(dense, pretrained=True).state_dict()
    else:
        source = name if name.endswith(".npz") else read_weights(name)
    if isinstance(source, dict) and is_model_state(source):
        fresh = load_model_weights(model, source, name)
        log.info("%s: model of another run%s", name, f", fresh: {', '.join(fresh)}" if fresh else "")
        return
    report = load_weights(model.backbone, source, upcycle=moe.upcycle, noise=moe.upcycle_noise, name=name)
    log.info("%s: %s", name, report)


def _timm_vit(name: str, **kwargs: Any) -> VisionTransformer:
    """A timm model by name, checked to be a ``VisionTransformer``."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models("*vit*"), *timm.list_models("*deit*")], 1)
        raise ValueError(f"model.backbone: unknown model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        model = timm.create_model(name, num_classes=0, **kwargs)
    except TypeError:  # other families take other arguments
        model = timm.create_model(name, num_classes=0)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model.backbone: {name} is a {type(model).__name__}, not a timm VisionTransformer")
    return model


def build_model(config: Config) -> MultiTaskModel:
    """Backbone, heads and weights, with ``config.bsr`` applied: frozen parameters have ``requires_grad=False``."""
    tasks = build_tasks(config)
    backbone = build_backbone(config)
    head = lookup(HEADS, config.model.head, "model.head")
    heads: dict[str, nn.Module] = {
        name: head(backbone.embed_dim, task.num_channels, head_dim=config.model.head_dim)
        for name, task in tasks.items()
    }
    for name, task in tasks.items():
        set_output_bias(heads[name], task.output_bias)
    model = MultiTaskModel(backbone, heads)
    backbone.set_plan(config.bsr)
    if config.model.weights:
        _load(config, model)
    return model


def build_datasets(config: Config, target_size: str = "network") -> tuple[Dataset, Dataset]:
    """Training and validation set; ``target_size="original"`` leaves the validation labels at their own size."""
    data = config.data
    dataset = lookup(DATASETS, data.name, "data.name")
    train = dataset(
        data.root,
        data.train_split,
        data.tasks,
        transform=build_transform(data.augment, data.image_size, train=True),
        max_samples=data.max_train,
    )
    val = dataset(
        data.root,
        data.val_split,
        data.tasks,
        transform=build_transform("none", data.image_size, train=False),
        max_samples=data.max_val,
        target_size=target_size,
    )
    return train, val


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the parameters that train."""
    o = config.optim
    return make_optimizer(
        o.name,
        model,
        lr=o.lr,
        weight_decay=o.weight_decay,
        head_lr_scale=o.head_lr_scale,
        momentum=o.momentum,
        betas=o.betas,
    )


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer, num_samples: int) -> Scheduler:
    """The learning-rate schedule over all steps of a run on ``num_samples`` training images."""
    o, t = config.optim, config.train
    total_steps = steps_in_run(
        num_samples, epochs=t.epochs, batch_size=t.batch_size, accumulate=t.accumulate, max_steps=t.max_steps
    )
    return make_schedule(
        o.schedule,
        optimizer,
        total_steps=total_steps,
        warmup_steps=o.warmup_steps,
        min_lr=o.min_lr,
        poly_power=o.poly_power,
    )
