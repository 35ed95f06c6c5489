"""``tools/plan.py CONFIG --memory 1.5GB --step-ratio 0.4 [--verify]``: plans that fit, at several batch sizes.

Every block counts as equally worth training, and every token as equally worth keeping: nothing is measured, so the
answer is there at once. Which blocks the data ask for is what ``m3bsr.suggest_plan`` measures.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from m3bsr.bsr import tokens_left
from m3bsr.build import build_model
from m3bsr.cli.common import one_line_errors, pick_device
from m3bsr.cli.measure_cost import job_of, measure
from m3bsr.cli.options import parse_cli
from m3bsr.config import Config, Plan, replace
from m3bsr.cost import search_plans
from m3bsr.cost.parts import Parts, backbone_parts, backbone_shape
from m3bsr.cost.search import PlanRow
from m3bsr.cost.stages import Stage
from m3bsr.engine.predict_cost import levels_read, precision_of, predict
from m3bsr.engine.step_cost import StepJob

DESCRIPTION = (
    "Plans for CONFIG that fit: --memory 1.5GB (peak of a training step), --step-ratio 0.4 (work of a step over that "
    "of full fine-tuning), --num-blocks 3, --top 3 (plans a batch size), --verify (measure them), --json."
)
UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
# Batch sizes that are tried, over that of the config.
BATCHES = (4, 2, 1, 0.5, 0.25)
NEW_FIELDS = ("train_blocks", "drop_blocks", "keep_rate", "score_source", "restore_before", "recompute")
# These are the config's where it has a choice of its own.
HOW_TO_DROP = ("select", "fuse", "restore")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error, such as a budget that no plan meets."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    memory = _take(arguments, "--memory", parse_bytes)
    ratio = _take(arguments, "--step-ratio", _number)
    num_blocks = _take(arguments, "--num-blocks", _count) or 3
    top = _take(arguments, "--top", _count) or 3
    verify, as_json = (_flag(arguments, name) for name in ("--verify", "--json"))
    config, path = parse_cli(arguments, DESCRIPTION)
    rows = find_plans(config, memory, ratio, num_blocks=num_blocks, top=top)
    if verify:
        for row in rows:
            row |= verified(config, row)
    if as_json:
        print(json.dumps([{**row, "plan": row["plan"].to_dict()} for row in rows], indent=2))
        return 0
    print(as_text(rows))
    print(f"\nbest: tools/train.py {path} {as_options(max(rows, key=lambda row: row['value']))}")
    return 0


def parse_bytes(text: str) -> int:
    """``1.5GB``, ``800MB``, ``200000``: bytes; a KB has 1024 of them, as everywhere in this project.

    Raises:
        ValueError: anything else, or nothing at all.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?B?)\s*", text.upper())
    unit = found[2].replace("I", "") if found else ""
    unit = unit if unit in UNITS else unit + "B"
    try:
        size = int(float(found[1]) * UNITS[unit]) if found else 0
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise ValueError(f"--memory needs a size such as 1.5GB or 800MB, got {text!r}")
    return size


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise ValueError(f"--step-ratio must lie in (0, 1], got {text!r}")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--num-blocks and --top need a positive integer, got {text!r}")
    return int(text)


def _take(arguments: list[str], option: str, parse: Any) -> Any:
    for position, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name != option:
            continue
        end = position + 1
        if not given:
            value, end = (arguments[end] if end < len(arguments) else ""), end + 1
        del arguments[position:end]
        return parse(value)
    return None


def _flag(arguments: list[str], option: str) -> bool:
    there = option in arguments
    while option in arguments:
        arguments.remove(option)
    return there


def empty_job(config: Config) -> StepJob:
    """The training step of a config on the meta device: no weights are made or read.

    Raises:
        ValueError, FileNotFoundError: as ``build_model`` does.
    """
    config = replace(config, {"model.weights": "", "model.method": "bsr", "bsr": Plan()})
    with torch.device("meta"):
        return job_of(config, build_model(config), pick_device(config.run.device), torch.empty)


class PredictedCosts:
    """Costs of plans for one step: formulas for the blocks, what lies behind them traced once."""

    def __init__(self, job: StepJob) -> None:
        backbone: Any = job.model.get_submodule("backbone")
        self.batch_size, self.full = len(job.batch["image"]), predict(job, Plan())
        height, width = job.batch["image"].shape[-2:]
        self.shape = backbone_shape(backbone, (height, width), len(job.tasks))
        self.dense = any(task.dense for task in job.tasks.values())
        self._precision = precision_of(job.device, job.precision)
        self._levels = levels_read(job.model, job.tasks)
        self._behind = self.full.parts[-1][1]

    def __call__(self, plan: Plan) -> tuple[float, int]:
        parts, shape = self._parts(plan), self.shape
        behind = self._behind
        if not self.dense:  # a classifier gets the tokens that are left
            left = tokens_left(plan, shape.num_patches, shape.num_prefix, shape.depth)
            share = left / (shape.num_prefix + shape.num_patches)
            stored, forward, backward = (round(share * part) for part in behind[:3])
            behind = Stage(stored, forward, backward, *behind[3:])
        step = dataclasses.replace(self.full, parts=(*parts, ("behind", behind)))
        return step.train_step_macs / self.full.train_step_macs, step.peak_bytes

    def at(self, batch_size: int) -> PredictedCosts:
        """The same step with another batch: what is traced grows with it, but for gradients of parameters."""
        factor, new, behind = batch_size / self.batch_size, copy.copy(self), self._behind
        stored, forward, *macs = (round(factor * part) for part in (*behind[:2], *behind[4:6]))
        backward = round(factor * (behind.backward_peak - behind.gradient)) + behind.gradient
        new.batch_size, new._behind = batch_size, Stage(stored, forward, backward, behind.gradient, *macs)
        new.full = dataclasses.replace(
            self.full,
            parts=(*new._parts(Plan()), ("behind", new._behind)),
            batch_size=batch_size,
            input_bytes=round(factor * self.full.input_bytes),
        )
        return new

    def stored(self, plan: Plan) -> int:
        return sum(part.stored for _, part in self._parts(plan))

    def _parts(self, plan: Plan) -> Parts:
        return backbone_parts(
            self.shape, plan, self.batch_size, restored=self.dense, precision=self._precision, levels=self._levels
        )


def find_plans(
    config: Config,
    memory_bytes: int | None,
    step_ratio: float | None,
    *,
    num_blocks: int = 3,
    top: int = 3,
    sizes: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Plans that fit, best first, for the batch sizes ``sizes`` (several around the config's), largest first.

    Each row: ``plan`` (the config's with blocks, drops and recomputation replaced), ``batch_size``, ``value`` (coverage
    of the blocks times tokens kept, as in ``suggest_plan``), ``step_ratio``, ``predicted_peak_bytes``, ``step_gmacs`` a
    sample.

    Raises:
        ValueError: nothing fits, at the smallest batch either; says what would.
    """
    sizes = sorted(set(sizes or (max(1, round(config.train.batch_size * factor)) for factor in BATCHES)))
    rows: list[dict[str, Any]] = []
    traced = PredictedCosts(empty_job(config))
    depth = traced.shape.depth
    if num_blocks > depth:
        raise ValueError(f"--num-blocks {num_blocks}: the model has {depth} blocks")
    for size in sizes:
        costs = traced.at(size)
        try:
            _, table = search_plans(
                [1.0] * depth, None, costs, num_blocks, tuple(range(depth)), memory_bytes, step_ratio, costs.dense
            )
        except ValueError as error:
            if rows:
                break  # larger batches need no less
            raise ValueError(f"no plan fits: {error}") from None
        fitting = [row for row in table.plans if row.verdict.startswith(("fits", "taken"))]
        best = sorted(fitting, key=lambda row: -row.value)[:top]
        rows = [_as_row(config, costs, row) for row in best] + rows
    return rows


def _as_row(config: Config, costs: PredictedCosts, row: PlanRow) -> dict[str, Any]:
    free = [name for name in HOW_TO_DROP if getattr(config.bsr, name) == getattr(Plan(), name)]
    plan = dataclasses.replace(config.bsr, **{name: getattr(row.plan, name) for name in (*NEW_FIELDS, *free)})
    full_gmacs = costs.full.train_step_macs / costs.batch_size / 1e9
    return {
        "plan": plan,
        "batch_size": costs.batch_size,
        "value": row.value,
        "step_ratio": row.compute,
        "step_gmacs": row.compute * full_gmacs,
        "predicted_peak_bytes": row.peak_bytes,
    }


def verified(config: Config, row: dict[str, Any]) -> dict[str, Any]:
    """Peak and GMACs of a real step under the plan of ``row``."""
    changes = {"bsr": row["plan"], "train.batch_size": row["batch_size"], "model.weights": "", "model.method": "bsr"}
    report = measure(replace(config, changes), repeats=1)
    return {"measured_peak_bytes": report.measured_peak_bytes, "measured_gmacs": report.train_step_gmacs}


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, the one of highest value marked."""
    lines = [
        f"{'batch':>5}  {'train':<12} {'drop':<12} {'keep':>4}  {'recompute':<9}  value  step ratio  GMACs  peak, MB"
        + ("  measured: GMACs  peak, MB" if "measured_gmacs" in rows[0] else "")
    ]
    best = max(rows, key=lambda row: row["value"])
    for row in rows:
        p: Plan = row["plan"]
        train, drops = (" ".join(map(str, blocks)) or "-" for blocks in (p.train_blocks, p.drop_blocks))
        rate = f"{min(p.keep_rates.values()):.1f}" if p.drop_blocks else "-"
        line = (
            f"{row['batch_size']:>5}  {train:<12} {drops:<12} {rate:>4}  {p.recompute:<9}  {row['value']:.3f}  "
            f"{row['step_ratio']:>10.3f}  {row['step_gmacs']:>5.2f}  {row['predicted_peak_bytes'] / 2**20:>8.1f}"
        )
        if "measured_gmacs" in row:
            line += f"  {row['measured_gmacs']:>15.2f}  {row['measured_peak_bytes'] / 2**20:>8.1f}"
        lines.append(line + ("  best" if row is best else ""))
    return "\n".join(lines)


def as_options(row: dict[str, Any]) -> str:
    """The command line options that give a run this plan."""
    plan: Plan = row["plan"]
    words = [f"--train.batch-size {row['batch_size']}"]
    for name in (*NEW_FIELDS, *HOW_TO_DROP):
        value = getattr(plan, name)
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(f"--bsr.{name.replace('_', '-')} {text}".rstrip())
    return " ".join(words)
