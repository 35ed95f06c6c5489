"""A training run of a fraction of a second, for the tests of the engine. Imported by path (see conftest.py)."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from torch import nn

from m3bsr.engine import train
from m3bsr.engine.loader import steps_in_run
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.schedule import make_schedule
from m3bsr.moe import Routing
from m3bsr.tasks import TASKS

CONFIG = {"name": "tiny"}


class TinySet(torch.utils.data.Dataset):
    """Images with a random shift as augmentation: its random numbers must come out the same after a resume."""

    def __init__(self, num_samples=12, augment=True, size=(8, 8), label_size=None):
        self.num_samples, self.augment, self.size, self.label_size = num_samples, augment, size, label_size or size

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, *self.size, generator=generator)
        depth = 1 + torch.rand(1, *self.label_size, generator=generator)
        semseg = torch.randint(0, 3, (1, *self.label_size), generator=generator)
        if self.augment:
            image = image + torch.rand(1)
        return {"image": image, "depth": depth, "semseg": semseg, "name": f"{index:03d}.jpg", "index": index}


class TinyModel(nn.Module):
    """A trunk with a frozen layer and dropout, a head per task; with experts it says which of 4 the pixels would take.

    The choices change with the weights and the dropout, so they differ from step to step.
    """

    def __init__(self, width=6, dropout=0.2, experts=False):
        super().__init__()
        self.experts = experts
        self.stem = nn.Conv2d(3, width, 1).requires_grad_(False)
        self.trunk = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(dropout))
        self.heads = nn.ModuleDict({"depth": nn.Conv2d(width, 1, 1), "semseg": nn.Conv2d(width, 3, 1)})
        self.steps = []
        self.on_step = lambda step: None

    def set_step(self, step):
        self.steps.append(step)
        self.on_step(step)

    def forward(self, images, tasks=None, size=None):
        x = self.trunk(self.stem(images))
        predictions = {task: self.heads[task](x) for task in tasks}
        if size is not None:
            predictions = {t: nn.functional.interpolate(p, size=size) for t, p in predictions.items()}
        output = SimpleNamespace(predictions=predictions, balance_loss=x.square().mean(), z_loss=x.new_zeros(()))
        if self.experts:
            pixels_TC = torch.cat([x, x.square()]).transpose(1, 3).flatten(0, 2)
            experts_TK = pixels_TC[:, :4].topk(2).indices
            weights_TK = torch.full_like(experts_TK, 0.5, dtype=torch.float32)
            output.routing = {5: Routing(weights_TK, experts_TK, output.z_loss, output.z_loss, 4, tuple(tasks))}
        return output


def make_parts(
    *,
    epochs=2,
    batch_size=3,
    accumulate=1,
    max_steps=None,
    lr=0.05,
    width=6,
    dropout=0.2,
    train_set=None,
    experts=False,
):
    """Model, tasks, data, optimizer and schedule of a run of 4 steps an epoch."""
    torch.manual_seed(0)
    model = TinyModel(width, dropout, experts)
    tasks = {"depth": TASKS["depth"](), "semseg": TASKS["semseg"](num_classes=3)}
    train_set = train_set or TinySet()
    optimizer = make_optimizer("adamw", model, lr=lr)
    steps = steps_in_run(
        len(train_set), epochs=epochs, batch_size=batch_size, accumulate=accumulate, max_steps=max_steps
    )
    scheduler = make_schedule("cosine", optimizer, total_steps=steps, warmup_steps=min(2, steps - 1))
    return model, tasks, train_set, TinySet(4, augment=False), optimizer, scheduler


def run(run_dir, *, parts=None, **kwargs):
    """Train the tiny model; keyword arguments are those of ``train``."""
    shape = {"epochs": 2, "batch_size": 3, "accumulate": 1, "max_steps": None}
    shape |= {name: kwargs.pop(name) for name in list(kwargs) if name in shape}
    parts = parts or make_parts(**shape, experts=kwargs.pop("experts", False))
    kwargs = {"log_every": 1, "tensorboard": False, "progress_bar": False, "balance_weight": 0.01, **kwargs}
    return parts[0], train(*parts, run_dir=run_dir, config_dict=CONFIG, **shape, **kwargs)


def run_slowly(run_dir, step_s=0.0, **kwargs):
    """Train, saying each step and sleeping in it; the exit code that a command would have."""
    parts = make_parts(epochs=kwargs.get("epochs", 2))

    def on_step(step):
        print("step", step, flush=True)
        time.sleep(step_s)

    parts[0].on_step = on_step
    result = run(run_dir, parts=parts, **kwargs)[1]
    return 128 + result.stopped_by if result.stopped_by else 0


def same_bits(one, other):
    """Whether what a checkpoint holds is the same."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return one == other
