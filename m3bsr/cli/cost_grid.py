"""``tools/cost_grid.py``: the predicted peak of a training step beside the measured one, over a grid of settings."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3bsr.cli.common import one_line_errors
from m3bsr.cli.measure_cost import step_job
from m3bsr.config import Config, DataConfig, LossConfig, ModelConfig, MoEConfig, Plan, RunConfig, TrainConfig, replace
from m3bsr.engine.predict_cost import predict

PUBLISHED: dict[str, Any] = {"train_blocks": (3, 7, 11), "drop_blocks": (3, 6, 9), "keep_rate": 0.5}
DENSE: dict[str, Any] = {"train_blocks": (3, 7, 11), "drop_blocks": (8,), "keep_rate": 0.7, "restore_before": 11}
STORAGE: dict[str, dict[str, Any]] = {
    "": {},
    ", cheap": {"recompute": "cheap"},
    ", both": {"recompute": "both"},
    ", int8": {"activation_dtype": "int8"},
    ", bf16": {"activation_dtype": "bf16", "recompute": "cheap"},
    ", pruned": {"prune_rate": 0.9},
}
WHOLE: dict[str, dict[str, Any]] = {
    "full": {},
    "full, all": {"recompute": "all"},
    "head": {"train_blocks": ()},
    "blocks": {"train_blocks": (2, 8)},
}
METHODS = ("bitfit", "norm", "lora", "adapter", "last:3", "token_drop", "checkpointing", "backrazor")
"""Ways of fine-tuning that are no plan of the lists above."""
CLASSIFIERS = {"deit_tiny_patch16_224": (1, 8), "vit_small_patch32_224": (4, 16), "deit_small_patch16_224": (4,)}
EXPERTS = {"m3vit_tiny_patch16": (1, 4), "m3vit_small_patch16": (2,)}


@dataclass(frozen=True)
class Row:
    """One setting and its peaks in bytes."""

    model: str
    plan: str
    batch_size: int
    precision: str
    predicted: int
    measured: int
    highest_at: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def cases(*, quick: bool = False) -> Iterator[tuple[str, Config]]:
    """Name of the plan or method, and config, of every setting; ``quick``: a small model of each kind, batches of 2."""
    for model, sizes in {"deit_tiny_patch16_224": (2,)}.items() if quick else CLASSIFIERS.items():
        size = (64, 64) if quick else (224, 224)
        for name, plan in _plans("BSR .5", PUBLISHED):
            for batch in sizes:
                yield name, _classifier(model, plan, batch, size)
    for model, sizes in {"m3vit_tiny_patch16": (2,)}.items() if quick else EXPERTS.items():
        for name, plan in _plans("BSR .7, restored", DENSE):
            for batch in sizes:
                yield name, _experts(model, plan, batch)
    yield from _in_bf16(quick)
    yield from _methods(quick)
    for name, plan in {"full": {}, "BSR .5": {**PUBLISHED, "restore": "bypass"}, "BSR .7, restored": DENSE}.items():
        yield f"multilevel, {name}", replace(_experts("m3vit_tiny_patch16", plan, 2), {"model.head": "multilevel"})


def _in_bf16(quick: bool) -> Iterator[tuple[str, Config]]:
    """Both kinds of model under autocast: all parts, none, and with what is stored taken away."""
    for name, plan in {**WHOLE, "BSR .5": PUBLISHED, "BSR .5, both": {**PUBLISHED, "recompute": "both"}}.items():
        for batch in (2,) if quick else (2, 16):
            yield name, _classifier("deit_tiny_patch16_224", plan, batch, (64, 64) if quick else (224, 224), "bf16")
    for name, plan in {**WHOLE, "BSR .7, restored": DENSE, "BSR .7, cheap": {**DENSE, "recompute": "cheap"}}.items():
        yield name, _experts("m3vit_tiny_patch16", plan, 2 if quick else 4, "bf16")


def _methods(quick: bool) -> Iterator[tuple[str, Config]]:
    """Both kinds of model by every method, in both precisions."""
    for method in METHODS:
        for precision in ("fp32", "bf16"):
            size, batch = ((64, 64), 2) if quick else ((112, 112), 32)
            dense = _classifier("deit_tiny_patch16_224", PUBLISHED, batch, size, precision)
            experts = _experts("m3vit_tiny_patch16", DENSE, 2 if quick else 4, precision)
            yield from ((method, replace(config, {"model.method": method})) for config in (dense, experts))


def _plans(name: str, bsr: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from WHOLE.items()
    for more, options in STORAGE.items():
        yield name + more, {**bsr, **options}


def _classifier(model: str, plan: dict[str, Any], batch: int, size: tuple[int, int], precision: str = "fp32") -> Config:
    classes = {"classification": 10}
    return Config(
        data=DataConfig(name="image_folder", tasks=("classification",), image_size=size, num_classes=classes),
        model=ModelConfig(backbone=model),
        bsr=Plan(**plan),
        train=TrainConfig(batch_size=batch, precision=precision),  # type: ignore[arg-type]
        run=RunConfig(device="cpu"),
    )


def _experts(model: str, plan: dict[str, Any], batch: int, precision: str = "fp32") -> Config:
    return Config(
        data=DataConfig(name="nyud", tasks=("semseg", "depth"), image_size=(96, 128)),
        model=ModelConfig(backbone=model, head_dim=64),
        moe=MoEConfig(blocks=(7, 9, 11), num_experts=8, top_k=2, mlp_ratio=1.0),
        bsr=Plan(**plan),
        loss=LossConfig(stride=4),
        train=TrainConfig(batch_size=batch, precision=precision),  # type: ignore[arg-type]
        run=RunConfig(device="cpu"),
    )


def label(name: str, config: Config) -> str:
    """What ``--only`` looks in."""
    return f"{config.model.backbone} {name} b{config.train.batch_size} {config.train.precision}"


def compare(name: str, config: Config) -> Row:
    """Predict and measure a step of ``config``."""
    gc.collect()  # the last model is in cycles
    job = step_job(config)
    peak, where = predict(job).peak
    measured = job.measured_peak()
    return Row(config.model.backbone, name, config.train.batch_size, config.train.precision, peak, measured, where)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="settings whose model, plan, batch and precision contain TEXT")
    parser.add_argument("--quick", action="store_true", help="small models only")
    parser.add_argument("--plot", metavar="FILE.png", help="draw predicted against measured")
    parser.add_argument("--json", metavar="FILE.json", help="write the rows")
    options = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    rows = []
    print(f"{'model':<24} {'plan':<24} {'batch':>5} {'precision':>9} {'predicted, MB':>13} {'measured, MB':>12}  error")
    for name, config in cases(quick=options.quick):
        if options.only and options.only not in label(name, config):
            continue
        rows.append(row := compare(name, config))
        print(
            f"{row.model:<24} {row.plan:<24} {row.batch_size:>5} {row.precision:>9} {row.predicted / 2**20:>13.1f} "
            f"{row.measured / 2**20:>12.1f} {row.error:>+7.2%}  {row.highest_at}",
            flush=True,
        )
    if not rows:
        raise ValueError(f"--only {options.only}: no setting is called so")
    errors = [abs(row.error) for row in rows]
    print(f"{len(rows)} settings: error at most {max(errors):.2%}, median {statistics.median(errors):.2%}")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.plot:
        plot(rows, Path(options.plot))
    return 0


def plot(rows: Sequence[Row], path: Path) -> None:
    """Predicted over measured peak, one point a setting, and the band of 5 %."""
    import matplotlib.figure
    import matplotlib.ticker

    figure = matplotlib.figure.Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    ends = [0.8 * min(r.measured for r in rows) / 2**20, 1.25 * max(r.measured for r in rows) / 2**20]
    axes.fill_between(ends, [0.95 * e for e in ends], [1.05 * e for e in ends], color="0.85", label="within 5 %")
    axes.plot(ends, ends, color="0.5", linewidth=0.8)
    for model in dict.fromkeys(row.model for row in rows):
        of = [row for row in rows if row.model == model]
        x, y = ([getattr(row, name) / 2**20 for row in of] for name in ("measured", "predicted"))
        axes.scatter(x, y, s=18, label=model, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured peak, MB", ylabel="predicted peak, MB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_title(f"Peak of a training step, {len(rows)} settings")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
