"""A complete run as plain data: frozen dataclasses, checked when made; the command line overrides (``cli.options``).

A config file (``configs/*.py``) builds one ``Config`` named ``config``. Its JSON goes into the run folder and every
checkpoint, and evaluation rebuilds the model from that alone.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from m3bsr.plan import MERGED as MERGED
from m3bsr.plan import Plan
from m3bsr.utils.checks import (
    check_fields,
    check_known,
    check_not_negative,
    check_positive,
    check_share,
    did_you_mean,
    tuples,
)


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    name: str = "nyud"
    """Data set (a name in m3bsr.data.DATASETS)."""
    root: str = "datasets/nyud/NYUD_MT"
    """Folder of the data; relative to $M3BSR_DATASETS where that is set."""
    tasks: tuple[str, ...] = ("semseg", "depth", "normals", "edge")
    """Tasks to train and evaluate."""
    image_size: tuple[int, int] = (480, 640)
    """Height and width that the network sees; multiples of the patch size."""
    augment: str = "astmt"
    """Transform recipe of training (a name in m3bsr.data.RECIPES); validation only resizes."""
    num_views: int | None = None
    """Augmented views of each training sample, the same in all epochs and taking turns; None: always new ones."""
    num_workers: int = 2
    """Loader processes; 0 loads in the training process."""
    train_split: str = "train"
    """Split file to train on."""
    val_split: str = "val"
    """Split file to evaluate on."""
    test_split: str = ""
    """Split to score once, at the end, with the checkpoint that is best on val_split; empty: none."""
    max_train: int | None = None
    """Use only the first so many training samples."""
    max_val: int | None = None
    """Use only the first so many validation samples."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a damaged sample does: end the run, or be logged, counted and replaced by another."""
    max_skipped: float = 0.01
    """Share of the training and of the validation samples that may be damaged with on_error skip."""
    num_classes: dict[str, int] = field(default_factory=dict)
    """Classes per task where they differ from the data set's own; filled in where only the folder knows them."""
    sets: dict[str, str] = field(default_factory=dict)
    """Several classification data sets at once, in place of name and root: task and "data set:folder" (tasks names
    them too); every batch comes from one of them."""
    mixup: float = 0.0
    """Mixup of training images (parameter of the Beta distribution; 0: none), classification only."""
    cutmix: float = 0.0
    """CutMix of training images, likewise; with both, one is drawn for each batch."""
    interleave: str = "proportional"
    """Whose turn it is among sets: proportional (to their sizes), round_robin, temperature."""
    temperature: float = 2.0
    """With interleave temperature: sets are drawn with probability size ** (1 / temperature)."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        check_positive(self, "data", "image_size", "num_views", "max_train", "max_val", "num_classes", "temperature")
        check_not_negative(self, "data", "num_workers", "mixup", "cutmix")
        check_share(self, "data", "max_skipped", bounds="[0, 1]")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"data.tasks must name at least one task, each once, got {self.tasks}")
        if self.sets and not set(self.tasks) <= set(self.sets):
            raise ValueError(f"data.tasks {self.tasks} must be names of data.sets ({', '.join(self.sets)})")


@dataclass(frozen=True)
class ModelConfig:
    """Backbone and heads."""

    backbone: str = "m3vit_small_patch16"
    """m3vit_{tiny,small,base}_patch16, or any timm VisionTransformer."""
    weights: str = ""
    """Where the backbone starts: a file (.safetensors, .pth, .npz), "timm" (its hub), or empty for random weights."""
    head: str = "light"
    """Head of every dense task (a name in m3bsr.heads.HEADS)."""
    head_dim: int = 128
    """Width of the heads (upsample keeps its published 256)."""
    head_blocks: tuple[int, ...] | None = None
    """The four blocks that the multilevel head reads, the last one last; None: evenly spread."""
    refine_dim: int = 0
    """Width of the cross-task refinement (M3ViT's TAM, any number of tasks), in training only; 0: none."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block."""
    method: str = "bsr"
    """How to fine-tune: bsr (the plan in section bsr), full, head, last:BLOCKS, bitfit, norm, lora[:RANK],
    adapter[:WIDTH], token_drop[:KEEP], checkpointing, backrazor[:PRUNE] (see m3bsr.methods.METHODS). All but bsr put
    the plan aside; token_drop takes where and how it drops."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_positive(self, "model", "head_dim")
        check_not_negative(self, "model", "refine_dim")
        if any(block < 0 for block in self.head_blocks or ()):
            raise ValueError(f"model.head_blocks must hold integers from 0, got {self.head_blocks}")
        check_share(self, "model", "drop_path")


@dataclass(frozen=True)
class MoEConfig:
    """Mixtures of experts."""

    blocks: tuple[int, ...] | None = None
    """Blocks with experts; None: the backbone's own (odd ones in m3vit), an empty list: none."""
    num_experts: int | tuple[int, ...] = 16
    """Experts per block: one number for all, or one for each of moe.blocks."""
    top_k: int = 4
    """Experts that serve a token."""
    mlp_ratio: float = 1.0
    """Width of an expert over the embedding width."""
    gate: str = "vmoe"
    """Kind of gate (a name in m3bsr.moe.GATES)."""
    gate_mode: Literal["shared", "per_task", "task_conditioned"] = "per_task"
    """One gate for all, one per task, or one that is told the task."""
    gate_input: Literal["after", "before"] = "after"
    """Gates read what the experts read, after attention, or the block's input, before it."""
    experts_per_task: int | None = None
    """Give each task its own window of so many experts, evenly spread; None: all experts for all tasks."""
    task_dim: int = 64
    """Width of the code that tells a task_conditioned gate its task."""
    noise_std: float = 0.0
    """Noise of the gate in training."""
    renormalize: bool = True
    """Make the weights of the chosen experts sum to one."""
    upcycle: Literal["copy", "split", "none"] = "split"
    """How dense MLP weights become experts."""
    upcycle_noise: float = 0.0
    """Relative noise on upcycled weights, to tell the experts apart."""
    backend: str = "auto"
    """How experts are run (a name in m3bsr.moe.backends.BACKENDS)."""
    expert_parallel: int = 1
    """Processes of torchrun that share the experts of every layer out among them; 1: each process has all of them."""
    balance_weight: float = 0.01
    """Weight of the balance loss."""
    z_weight: float = 0.0
    """Weight of the router z-loss."""

    def __post_init__(self) -> None:
        check_fields(self, "moe")
        check_positive(self, "moe", "num_experts", "top_k", "mlp_ratio", "experts_per_task", "task_dim")
        check_positive(self, "moe", "expert_parallel")
        check_not_negative(self, "moe", "noise_std", "upcycle_noise", "balance_weight", "z_weight")
        numbers = self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,)
        if self.top_k > min(numbers, default=self.top_k):
            raise ValueError(f"moe.top_k {self.top_k} is more than moe.num_experts {self.num_experts}")
        if any(number % self.expert_parallel for number in numbers):
            raise ValueError(
                f"moe.expert_parallel {self.expert_parallel} must divide moe.num_experts {self.num_experts}"
            )
        if self.experts_per_task is not None and not self.top_k <= self.experts_per_task <= min(numbers, default=0):
            raise ValueError(
                f"moe.experts_per_task must lie between moe.top_k {self.top_k} and moe.num_experts {self.num_experts}, "
                f"got {self.experts_per_task}"
            )
        blocks = self.blocks or ()
        if isinstance(self.num_experts, tuple) and self.blocks is not None and len(numbers) != len(blocks):
            raise ValueError(f"moe.num_experts {numbers} must hold one number for each of moe.blocks {blocks}")
        if len(set(blocks)) != len(blocks) or any(block < 0 for block in blocks):
            raise ValueError(f"moe.blocks must hold integers from 0, each once, got {blocks}")


@dataclass(frozen=True)
class LossConfig:
    """How losses are put together."""

    weights: dict[str, float] = field(default_factory=dict)
    """Weight per task; tasks left out take their default."""
    balance: Literal["fixed", "uncertainty", "dwa"] = "fixed"
    """What becomes of the weights on the way (m3bsr.engine.balance.BALANCES)."""
    conflict: str = "none"
    """What makes one gradient of those of the tasks (m3bsr.engine.conflict.CONFLICTS: pcgrad, cagrad, nash_mtl, upgrad,
    mgda, imtl_g, aligned_mtl ...; pip install 'm3bsr[mtl]'); none adds them up."""
    stride: int = 1
    """Compute training losses at 1/stride of the resolution (evaluation stays exact)."""
    label_smoothing: float = 0.0
    """Label smoothing of classification and segmentation."""
    refine_weight: float = 1.0
    """Weight of the auxiliary losses of model.refine_dim, beside the weights of the tasks."""

    def __post_init__(self) -> None:
        check_fields(self, "loss")
        check_positive(self, "loss", "stride")
        check_not_negative(self, "loss", "refine_weight", "weights")
        check_share(self, "loss", "label_smoothing")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 10
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, whatever the epochs say."""
    batch_size: int = 8
    """Images per step and process (before accumulation)."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type; fp16 with a gradient scaler, on CUDA only."""
    clip_norm: float = 1.0
    """Gradient norm to clip to; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights that train; it is what is evaluated and saved. 0: none."""
    eval_every: int = 1
    """Evaluate after so many epochs; 0: only at the end."""
    eval_batch_size: int = 8
    """Images per evaluation step."""
    save_every: int | None = None
    """Write `last` every so many steps too, not only after each epoch."""
    log_every: int = 10
    """Steps between lines in log.jsonl."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes (torchrun): each has the whole model (ddp), or a part of its parameters, gradients and
    optimizer state (fsdp, for what does not fit)."""
    compile: bool = False
    """Compile the halves of the blocks by torch.compile; needs a C++ compiler, and minutes for the first steps."""
    timeout_s: float = 600.0
    """Of several processes: how long to wait for one that does not answer before the run ends."""

    def __post_init__(self) -> None:
        check_fields(self, "train")
        check_positive(self, "train", "epochs", "max_steps", "batch_size", "accumulate", "eval_batch_size")
        check_positive(self, "train", "save_every", "log_every", "timeout_s")
        check_not_negative(self, "train", "clip_norm", "eval_every")
        check_share(self, "train", "ema_decay")
        if self.compile and self.parallel == "fsdp":
            raise ValueError("train.compile: not with train.parallel fsdp; leave one of them out")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    lr: float = 1e-4
    """Peak learning rate."""
    head_lr_scale: float = 1.0
    """Learning rate of the heads over that of the backbone."""
    layer_decay: float = 1.0
    """Learning rate of a block over that of the block behind it, in (0, 1] (BEiT); 1: the same for all."""
    weight_decay: float = 0.05
    """Weight decay of matrices (never of biases, norms, embeddings)."""
    momentum: float = 0.9
    """Momentum (sgd)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moment decay rates (adamw)."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """Learning-rate schedule over all steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    poly_power: float = 0.9
    """Power of the poly schedule."""

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        check_positive(self, "optim", "lr", "head_lr_scale", "poly_power")
        check_not_negative(self, "optim", "weight_decay", "momentum", "warmup_steps", "min_lr")
        check_share(self, "optim", "layer_decay", bounds="(0, 1]")
        check_share(self, "optim", "betas")


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it starts."""

    dir: str = "runs/default"
    """Run folder."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on from the last checkpoint in the run folder."""
    overwrite: bool = False
    """Throw away what the run folder holds."""
    cache_dir: str = ""
    """Folder of the prefix cache (bsr.cache_prefix), which runs may share; empty: prefix_cache in the run folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        check_fields(self, "run")
        check_not_negative(self, "run", "seed")
        if not self.dir:
            raise ValueError("run.dir must not be empty")


@dataclass(frozen=True)
class Config:
    """One complete run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    bsr: Plan = field(default_factory=Plan)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            value, kind = getattr(self, section.name), section.default_factory
            assert isinstance(kind, type)
            if not isinstance(value, kind):
                raise ValueError(f"section {section.name} must be a {kind.__name__}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Inverse of :meth:`to_dict`, also after JSON made lists of the tuples.

        Raises:
            ValueError: an unknown section or field (with the nearest known one), or a bad value.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a config must hold sections, got {data!r}")
        sections = {section.name: section for section in dataclasses.fields(cls)}
        built: dict[str, Any] = {}
        for name, values in data.items():
            check_known(name, sections, "section")
            make = sections[name].default_factory
            assert isinstance(make, type)
            if not isinstance(values, Mapping):
                raise ValueError(f"section {name} must hold fields, got {values!r}")
            known = {f.name for f in dataclasses.fields(make)}
            for key in values:
                check_known(key, known, f"field {name}.")
            built[name] = make(**{key: tuples(value) for key, value in values.items()})
        return cls(**built)


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with dotted fields or whole sections changed: ``replace(config, {"bsr.keep_rate": 0.7})``.

    Raises:
        ValueError: an unknown field, or a bad value.
    """
    per_section: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, _, name = path.partition(".")
        check_known(section, {f.name for f in dataclasses.fields(config)}, "section")
        if not name:
            config = dataclasses.replace(config, **{section: value})
            continue
        check_known(name, {f.name for f in dataclasses.fields(getattr(config, section))}, f"field {section}.")
        per_section.setdefault(section, {})[name] = value
    new = {s: dataclasses.replace(getattr(config, s), **changes) for s, changes in per_section.items()}
    return dataclasses.replace(config, **new)


def load_config(path: str | Path) -> Config:
    """Run a config file and take its ``config``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an error inside the file (with its line), or no ``Config`` named ``config``.
    """
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path, map(str, path.parent.glob("*.py")))
        raise FileNotFoundError(f"no such config file: {path}{near}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # whatever a user's file may raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
        raise ValueError(f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{path} must define `config = Config(...)`, found {type(config).__name__}")
    return config
