"""Where a run stands, and keeping it safe."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from m3bsr.engine import checkpoint, distributed
from m3bsr.engine.ema import Ema
from m3bsr.engine.evaluate import Metrics
from m3bsr.engine.expert_shares import ExpertShares
from m3bsr.engine.log import Window
from m3bsr.engine.rng import get_rng_state


@dataclass
class Progress:
    """Where a run stands. Plain data; every checkpoint holds it."""

    total_steps: int
    step: int = 0
    """Steps finished."""
    evaluated_step: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    protocol: str = ""
    best_step: int = 0
    best_score: float = -math.inf
    best_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_overflows: int = 0
    """Steps that the fp16 loss scaler skipped."""
    damaged: dict[str, list[str]] = field(default_factory=dict)
    """Samples found damaged and replaced, a line each, by split."""
    loss_balance: dict[str, Any] = field(default_factory=dict)
    """State of the rule that weighs the losses."""
    window: dict[str, Any] = field(default_factory=dict)
    """Sums since the last line of the log."""

    def note_evaluation(self, metrics: Metrics, score: float) -> bool:
        """Take over the metrics of the present step; whether they are the best so far."""
        self.evaluated_step, self.metrics, self.protocol = self.step, dict(metrics), metrics.protocol
        is_best = self.best_step == 0 or score > self.best_score
        if is_best:
            self.best_step, self.best_score, self.best_metrics = self.step, score, dict(metrics)
        return is_best


class Saver:
    """Saves and restores a run: the objects that have a state, and the folder of its checkpoints."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        scaler: Any,
        ema: Ema | None = None,
        shares: ExpertShares | None = None,
    ) -> None:
        self.folder, self.config = folder, config
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        self.ema, self.shares = ema, shares
        self.last_good: Path | None = None

    def save(self, name: str, progress: Progress, must: bool = False) -> None:
        """Save as ``name``; called by all processes, written by the first.

        A full disk is a warning and the old checkpoint stays, unless it is the last chance.
        """
        state = {**asdict(progress), "window": Window(progress.window).together()}
        rng = distributed.gather(get_rng_state())
        try:
            with self.averaged():
                model, optimizer = self.shares.to_save() if self.shares else (self.model, self.optimizer)
                checkpoint.save_checkpoint(
                    self.folder / name,
                    config=self.config,
                    progress=state,
                    model=model,
                    optimizer=optimizer,
                    scheduler=self.scheduler,
                    scaler=self.scaler,
                    ema=self.ema,
                    rng=rng,
                    keep_previous=name == "last",
                )
            self.last_good = self.folder / name
        except OSError as error:
            if must:
                raise
            say(f"warning: step {progress.step}: could not write checkpoint {self.folder / name}: {error}")

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are evaluated and saved: averaged, if the run averages."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def resume(self, total_steps: int) -> Progress:
        """Put back the newest whole checkpoint; a fresh start if there never was one.

        Raises:
            CheckpointError: every checkpoint is damaged, or the newest is of another model.
        """
        folder, complaints = distributed.from_main(lambda: checkpoint.newest_checkpoint(self.folder))
        for complaint in complaints:
            say(f"warning: {complaint}")
        if folder is None:
            if complaints:
                raise checkpoint.CheckpointError(f"no whole checkpoint is left in {self.folder}: start the run anew")
            say(f"no checkpoint in {self.folder} yet: starting from the beginning")
            return Progress(total_steps)
        optimizer = self.shares.optimizer if self.shares else self.optimizer
        saved = checkpoint.resume(
            folder, self.model, optimizer, self.scheduler, self.scaler, total_steps=total_steps, ema=self.ema
        )
        if not distributed.is_main():
            saved.get("window", {}).pop("routing", None)  # process 0 has that of all
        self.last_good = folder
        say(f"going on from {folder} after step {saved['step']}")
        try:
            progress = Progress(**{**saved, "total_steps": total_steps})
        except TypeError:
            newer = sorted(set(saved) - {f.name for f in fields(Progress)})
            raise checkpoint.CheckpointError(
                f"checkpoint {folder}: unknown progress {newer}; use a newer m3bsr"
            ) from None
        distributed.wait_for_all()  # they have read what is renamed and tidied now
        if folder.name != "last":  # a crash between two writes: `best` or a half-renamed folder is ahead of `last`
            self.save("last", progress)
        if distributed.is_main():
            checkpoint.tidy(self.folder)
        return progress


def say(line: str) -> None:
    """A line for the person who waits, on stderr; of several processes the first speaks."""
    if distributed.is_main():
        print(line, file=sys.stderr, flush=True)
