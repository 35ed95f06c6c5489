"""From a config to objects: the only place that knows both.

Every function takes the whole ``Config`` and returns plain objects; what they are built from takes keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import Dataset

from m3bsr.backbones import DENSE_NAMES, TaskViTMixin, add_moe, load_weights, read_weights, task_backbone
from m3bsr.backbones.named import pretrained_cfg, timm_vit
from m3bsr.bsr.compiled import check_compiler, compile_blocks
from m3bsr.config import Config, replace
from m3bsr.data import DATASETS, RECIPES, build_transform
from m3bsr.data.files import dataset_path
from m3bsr.data.mix import MixImages
from m3bsr.data.several import SeveralSets
from m3bsr.data.transforms import Pipeline
from m3bsr.engine.damaged import ReplaceDamaged
from m3bsr.engine.loader import steps_in_run
from m3bsr.engine.losses import SmallTargets
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.prefix_cache import PrefixCache, described
from m3bsr.engine.schedule import make_schedule
from m3bsr.heads import HEADS, ClassifierHead, CrossTaskRefinement, DenseHead, set_output_bias, spread_levels
from m3bsr.methods import find_method
from m3bsr.models import MultiTaskModel, is_model_state, load_model_weights
from m3bsr.tasks import TASKS
from m3bsr.tasks.base import Task
from m3bsr.utils.log import get_logger
from m3bsr.utils.lookup import lookup

log = get_logger(__name__)
HAVE_CLASSES = ("semseg", "human_parts", "classification")
HAVE_LABEL_SMOOTHING = ("semseg", "classification")


def build_tasks(config: Config) -> dict[str, Task]:
    """The tasks of the config, with the data set's own settings (number of classes, edge tolerance).

    Raises:
        ValueError: a task that nobody knows, or that the data set has no labels for; a setting that it does not take.
        FileNotFoundError: the number of classes is not in the config and the data set's folder is not there.
    """
    if config.data.sets:
        return {name: build_tasks(member)["classification"] for name, member in members(config).items()}
    dataset = lookup(DATASETS, config.data.name, "data.name")
    settings = task_settings(config)
    tasks = {}
    for name in config.data.tasks:
        task = lookup(TASKS, name, "data.tasks")
        lookup(dict.fromkeys(dataset.known_tasks), name, f"data.tasks of {config.data.name}")
        tasks[name] = task(**settings.get(name, {}))
    return tasks


def task_settings(config: Config) -> dict[str, dict[str, Any]]:
    """Keyword arguments of every task: the data set's, what its folder says, what the config says."""
    data, dataset = config.data, lookup(DATASETS, config.data.name, "data.name")
    settings = {name: dict(values) for name, values in dataset.task_kwargs.items()}
    counted = {name for name in data.tasks if name in HAVE_CLASSES}
    if hasattr(dataset, "read_task_kwargs") and not counted <= set(data.num_classes):
        for name, values in dataset.read_task_kwargs(data.root).items():
            settings.setdefault(name, {}).update(values)
    for name, number in data.num_classes.items():
        lookup(dict.fromkeys(dataset.known_tasks), name, "data.num_classes: task")
        settings.setdefault(name, {})["num_classes"] = number
    if config.loss.label_smoothing:
        for name in set(data.tasks) & set(HAVE_LABEL_SMOOTHING):
            settings.setdefault(name, {})["label_smoothing"] = config.loss.label_smoothing
    return settings


def members(config: Config) -> dict[str, Config]:
    """Of several data sets (``data.sets``) each as the data of a config of its own, by task.

    Raises:
        ValueError: not "data set:folder", or a data set that does not classify.
    """
    configs = {}
    for task in config.data.tasks:
        name, _, root = config.data.sets[task].partition(":")
        if "classification" not in lookup(DATASETS, name, f"data.sets of {task}").known_tasks:
            raise ValueError(f"data.sets of {task}: {name} has no image classes; only classification sets go together")
        changes: dict[str, Any] = {"data.name": name, "data.root": root or ".", "data.tasks": ("classification",)}
        known = {"classification": config.data.num_classes[task]} if task in config.data.num_classes else {}
        configs[task] = replace(config, {**changes, "data.sets": {}, "data.num_classes": known})
    return configs


def with_found_classes(config: Config) -> Config:
    """The config with the numbers of classes that only the data's folder knows, so that it stands for itself."""
    if config.data.sets:
        return replace(config, {"data.num_classes": {n: t.num_channels for n, t in build_tasks(config).items()}})
    dataset = lookup(DATASETS, config.data.name, "data.name")
    if not hasattr(dataset, "read_task_kwargs"):
        return config
    found = {n: v["num_classes"] for n, v in task_settings(config).items() if "num_classes" in v}
    return replace(config, {"data.num_classes": {n: v for n, v in found.items() if n in config.data.tasks}})


def build_backbone(config: Config) -> TaskViTMixin:
    """The backbone with its experts, before any plan or weights.

    Raises:
        ValueError: an unknown backbone, gate or backend, blocks out of range.
    """
    return _build_backbone(config)[0]


def _build_backbone(
    config: Config, num_classes: Mapping[str, int] | None = None
) -> tuple[TaskViTMixin, dict[str, nn.Module]]:
    """The backbone, and a classifier with its final layers for each task of ``num_classes``."""
    num_classes = num_classes or {}
    name, moe = config.model.backbone, config.moe
    common: dict[str, Any] = {"img_size": config.data.image_size}
    experts: dict[str, Any] = {
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "gate": moe.gate,
        "gate_mode": moe.gate_mode,
        "gate_input": moe.gate_input,
        "experts_per_task": moe.experts_per_task,
        "task_dim": moe.task_dim,
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
        classifiers = {task: ClassifierHead(backbone, number) for task, number in num_classes.items()}
    else:
        vit = timm_vit(name, drop_path_rate=config.model.drop_path, **common)
        # Now: as a backbone for tasks it has no final layers any more.
        classifiers = {task: ClassifierHead(vit, number) for task, number in num_classes.items()}
        backbone = task_backbone(vit, config.data.tasks)
        if moe.blocks:
            add_moe(backbone, blocks=moe.blocks, tasks=config.data.tasks, mlp_ratio=moe.mlp_ratio, **experts)
    patch = backbone.patch_embed.patch_size
    if any(side % step for side, step in zip(config.data.image_size, patch, strict=True)):
        raise ValueError(f"data.image_size {config.data.image_size} must be multiples of the patch size {patch}")
    return backbone, {**classifiers}


def _read(config: Config) -> Any:
    """What ``config.model.weights`` names: a state dict, or the path of a file in JAX layout; None for nothing."""
    name = config.model.weights
    if name == "timm":
        dense = DENSE_NAMES.get(config.model.backbone, config.model.backbone)
        return timm.create_model(dense, pretrained=True).state_dict()
    return name if name.endswith(".npz") else read_weights(name) if name else None


def _load_backbone(config: Config, model: MultiTaskModel, source: Any) -> None:
    """Weights of a backbone, its MLPs upcycled to experts; final layers go to the classifiers."""
    name, moe = config.model.weights, config.moe
    report = load_weights(model.backbone, source, upcycle=moe.upcycle, noise=moe.upcycle_noise, name=name)
    for head in model.heads.values():
        if isinstance(head, ClassifierHead):
            head.load_final(report.final)
    log.info("%s: %s", name, report)


def _load_model(config: Config, model: MultiTaskModel, state: Mapping[str, torch.Tensor]) -> None:
    """Weights of the whole model of another run."""
    fresh = load_model_weights(model, state, config.model.weights)
    log.info("%s: model of another run%s", config.model.weights, f", fresh: {', '.join(fresh)}" if fresh else "")


def build_model(config: Config) -> MultiTaskModel:
    """Backbone, heads and weights, to be fine-tuned by ``config.model.method``: what stays frozen has
    ``requires_grad=False``."""
    method, value = find_method(config.model.method)
    tasks = build_tasks(config)
    backbone, heads = _build_backbone(config, {n: task.num_channels for n, task in tasks.items() if not task.dense})
    for name, task in tasks.items():
        if task.dense:
            heads[name] = _dense_head(config, backbone, task.num_channels)
            set_output_bias(heads[name], task.output_bias)
    refinement = None
    if config.model.refine_dim:
        meeting = {name: head for name in tasks if isinstance(head := heads[name], DenseHead)}
        refinement = CrossTaskRefinement(meeting, config.model.refine_dim, config.loss.refine_weight)
    model = MultiTaskModel(backbone, {name: heads[name] for name in tasks}, refinement)
    backbone.set_plan(method.plan(config.bsr, len(backbone.blocks), value))
    source = _read(config)
    is_model = isinstance(source, dict) and is_model_state(source)
    if source is not None and not is_model:
        _load_backbone(config, model, source)
    method.change(model, value)
    if is_model:
        _load_model(config, model, source)
    return model


def compile_model(config: Config, model: MultiTaskModel, device: torch.device) -> None:
    """Compile the blocks of the backbone, if asked for.

    Raises:
        ValueError: other settings do not go with it, or nothing can be compiled on this machine.
    """
    if not config.train.compile:
        return
    if config.loss.conflict != "none":  # goes backward through one graph several times
        raise ValueError(f"train.compile: not with loss.conflict {config.loss.conflict}; leave one of them out")
    compile_blocks(model.backbone)
    check_compiler(device)


def _dense_head(config: Config, backbone: TaskViTMixin, num_channels: int) -> nn.Module:
    m, depth = config.model, len(backbone.blocks)
    head = lookup(HEADS, m.head, "model.head")
    levels: dict[str, Any] = {}
    if head.num_levels > 1:
        blocks = spread_levels(depth) if m.head_blocks is None else m.head_blocks
        if blocks[-1:] != (depth - 1,):  # blocks behind it would run for nothing
            raise ValueError(
                f"model.head_blocks must end with the last block of the backbone ({depth - 1}), got {blocks}"
            )
        levels["blocks"] = blocks
    elif m.head_blocks is not None:
        raise ValueError(f"model.head_blocks is for heads of several levels; {m.head} reads the last block alone")
    return head(backbone.embed_dim, num_channels, head_dim=m.head_dim, **levels)


def build_datasets(config: Config, target_size: str = "network") -> tuple[Dataset, Dataset]:
    """Training and validation set; ``target_size="original"`` leaves the validation labels at their own size.

    With ``data.on_error="skip"`` samples that cannot be read are replaced (``engine.damaged``).
    """
    data = config.data
    if data.sets:
        pairs = {task: build_datasets(member, target_size) for task, member in members(config).items()}
        train_sets, val_sets = ({task: pair[i] for task, pair in pairs.items()} for i in (0, 1))
        return SeveralSets(train_sets, data.interleave, data.temperature), SeveralSets(val_sets)  # type: ignore[arg-type]
    dataset = lookup(DATASETS, data.name, "data.name")
    train = dataset(
        data.root,
        data.train_split,
        data.tasks,
        transform=transform_of(config, train=True),
        max_samples=data.max_train,
    )
    val = dataset(
        data.root,
        data.val_split,
        data.tasks,
        transform=transform_of(config, train=False),
        max_samples=data.max_val,
        target_size=target_size,
    )
    settings = task_settings(config)
    for task, names in train.class_names.items():
        if len(names) > settings.get(task, {}).get("num_classes", len(names)):
            number = settings[task]["num_classes"]
            raise ValueError(f"data.num_classes of {task} is {number}, but {data.root} has {len(names)} classes")
    return (ReplaceDamaged(train), ReplaceDamaged(val)) if data.on_error == "skip" else (train, val)


def transform_of(config: Config, *, train: bool) -> Pipeline:
    """The transform of training or validation; ends in the normalisation that the backbone's weights were made with."""
    if config.data.sets:
        config = next(iter(members(config).values()))
    name, dataset = config.model.backbone, lookup(DATASETS, config.data.name, "data.name")
    pretrained = pretrained_cfg(DENSE_NAMES.get(name, name))
    normalisation = {} if pretrained is None else {"mean": pretrained.mean, "std": pretrained.std}
    recipes = getattr(dataset, "recipes", RECIPES)
    recipe = config.data.augment if train else "none"
    return build_transform(recipe, config.data.image_size, train=train, recipes=recipes, **normalisation)


def build_batch_transform(config: Config, tasks: Mapping[str, Task]) -> MixImages | SmallTargets | None:
    """Mixup and CutMix, if asked for; of dense tasks with ``loss.stride`` targets of the size of the losses.

    Raises:
        ValueError: for dense tasks, whose pixels cannot be mixed so.
    """
    data, dense = config.data, {name: task for name, task in tasks.items() if task.dense}
    if not data.mixup and not data.cutmix:
        return SmallTargets(dense, config.loss.stride) if dense and config.loss.stride > 1 else None
    if dense:
        raise ValueError(f"data.mixup and data.cutmix mix classes of whole images, not those of {next(iter(dense))}")
    return MixImages({name: task.num_channels for name, task in tasks.items()}, data.mixup, data.cutmix)


def with_fixed_views(config: Config) -> Config:
    """The config with one view of each sample if it keeps prefixes and does not say how many views."""
    one = config.bsr.cache_prefix and config.data.num_views is None
    return replace(config, {"data.num_views": 1}) if one else config


def build_prefix_cache(config: Config, train_set: Sized) -> PrefixCache | None:
    """The cache of what the frozen first blocks give, if asked for.

    Raises:
        ValueError: together with mixup or CutMix, which make new pictures in every epoch.
    """
    data, views = config.data, config.data.num_views
    if not config.bsr.cache_prefix:
        return None
    if data.mixup or data.cutmix:
        raise ValueError("bsr.cache_prefix keeps fixed views of single pictures: set data.mixup and data.cutmix to 0")
    assert views is not None, "see with_fixed_views"
    roots = {t: member.data.root for t, member in members(config).items()} if data.sets else {data.name: data.root}
    key = {
        "backbone": config.model.backbone,
        "data": {name: str(dataset_path(root).resolve()) for name, root in roots.items()},
        "split": [data.name, data.sets, data.train_split, data.max_train, len(train_set)],
        "transform": [torchvision.__version__, described(transform_of(config, train=True))],
        "views": [config.run.seed, views],
        "batch_size": config.train.batch_size,
    }
    root = Path(config.run.cache_dir or Path(config.run.dir) / "prefix_cache")
    return PrefixCache(root, key, data.image_size, len(train_set) * views)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the parameters that train."""
    o = config.optim
    return make_optimizer(
        o.name,
        model,
        lr=o.lr,
        weight_decay=o.weight_decay,
        head_lr_scale=o.head_lr_scale,
        layer_decay=o.layer_decay,
        momentum=o.momentum,
        betas=o.betas,
    )


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer, train_set: Sized) -> Scheduler:
    """The learning-rate schedule over all steps of a run on ``train_set``."""
    o, t = config.optim, config.train
    total_steps = steps_in_run(
        train_set, epochs=t.epochs, batch_size=t.batch_size, accumulate=t.accumulate, max_steps=t.max_steps
    )
    return make_schedule(
        o.schedule,
        optimizer,
        total_steps=total_steps,
        warmup_steps=o.warmup_steps,
        min_lr=o.min_lr,
        poly_power=o.poly_power,
    )
