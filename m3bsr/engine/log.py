"""The log of a run: ``log.jsonl``, one JSON object a line, and TensorBoard events.

Training lines hold ``kind="train", step, epoch, loss, losses {task}, balance_loss, z_loss, lr, grad_norm,
samples_per_s, step_ms, data_wait``: means over the steps since the line before; ``step_ms`` is without waiting for
data and ``data_wait`` the share of time that was waited; ``auxiliary_loss`` (cross-task refinement) is the weighted
sum; ``loss_weights {task}``, where they are learned, are those of the next step. Validation lines hold
``kind="val", step, epoch, best_step, protocol, metrics {task: {metric}}``. Models with experts add
``routing {block: {load, entropy, overlap, ...}}`` (see ``m3bsr.moe.stats``) to both, over the steps since the line
before or the whole evaluation. ``step`` counts finished
steps. A damaged sample that was replaced has a line ``kind="damaged", step, split, error``, once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from m3bsr.engine.distributed import is_main, sum_of_all
from m3bsr.moe.stats import RoutingCounts, routing_stats


class RunLog:
    """Writes the log of one run. Lines after ``start_step`` that a killed run left are dropped, so none is double.

    Of several processes only the first writes.
    """

    def __init__(self, run_dir: str | Path, start_step: int = 0, tensorboard: bool = True) -> None:
        self._writer: Any = None
        self._file: Any = None
        if not is_main():
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "log.jsonl"
        _truncate(self.path, start_step)
        self._file = self.path.open("a")
        if tensorboard:
            self._writer = _summary_writer(run_dir, start_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line and send its numbers to TensorBoard as ``kind/name/of/the/value``."""
        if self._file is None:
            return
        with _full_disk_is_no_reason_to_stop(self.path):
            self._file.write(json.dumps(_finite(record)) + "\n")
            self._file.flush()
            if self._writer is not None:
                for tag, value in _scalars(record):
                    if tag != "step":
                        self._writer.add_scalar(f"{record['kind']}/{tag}", value, record["step"])

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Send uint8 pictures ``[H, W, 3]`` to TensorBoard, by tag."""
        if self._writer is not None:
            with _full_disk_is_no_reason_to_stop(self.path):
                for tag, picture in pictures.items():
                    self._writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._file is None:
            return
        with _full_disk_is_no_reason_to_stop(self.path):
            self._file.close()
            if self._writer is not None:
                self._writer.close()


class Window:
    """Sums since the last line of the log; plain data and tensors, so that it can go into a checkpoint."""

    def __init__(self, sums: Mapping[str, Any] | None = None) -> None:
        self.sums: dict[str, Any] = dict(sums or {})
        if "steps" in self.sums:  # of a checkpoint from before values were counted each for itself
            steps = self.sums.pop("steps")
            self.sums["num"] = {name: steps for name in self.sums if name != "routing"}

    def add(self, **values: float) -> None:
        num = self.sums.setdefault("num", {})
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            num[name] = num.get(name, 0) + 1

    def add_routing(self, output: Any) -> None:
        """Count where a forward pass sent its tokens, on the device and without waiting for it."""
        RoutingCounts(self.sums.setdefault("routing", {})).add(output)

    def together(self) -> dict[str, Any]:
        """The sums for a checkpoint, called by all: with the routing of all processes; the rest is equal on all."""
        routing = sum_of_all(self.sums.get("routing", {}))
        return {**self.sums, **({"routing": routing} if routing else {})}

    def pop_means(self) -> dict[str, Any]:
        """Mean of each value over the steps that had it, and the statistics of ``routing`` if there was any, that of
        all processes together; called by all, starts anew."""
        num, counts = self.sums.pop("num"), RoutingCounts(sum_of_all(self.sums.pop("routing", {}))).per_task()
        means = {name: value / num[name] for name, value in self.sums.items()}
        self.sums = {}
        return {**means, "routing": routing_stats(counts)} if counts else means


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a ``log.jsonl``; one that a crash cut short is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


@contextmanager
def _full_disk_is_no_reason_to_stop(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        print(f"warning: could not write {path}: {error}", file=sys.stderr)


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= step]
    aside = path.with_name(path.name + ".writing")
    aside.write_text("".join(lines))
    os.replace(aside, path)


def _summary_writer(run_dir: Path, start_step: int) -> Any:
    # Imported here: it takes a second, and a run without TensorBoard installed still has its log.jsonl.
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    goes_on = any(run_dir.glob("events.out.tfevents.*"))  # also from step 0, after a crash before the first checkpoint
    return SummaryWriter(str(run_dir), purge_step=start_step + 1 if goes_on else None)


def _scalars(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat.append((prefix + name, value))
    return flat


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no other word for them."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
