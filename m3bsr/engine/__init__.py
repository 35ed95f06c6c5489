"""Training, evaluation, checkpoints and logs. Everything here receives objects; a config is only carried along."""

from __future__ import annotations

from m3bsr.engine.checkpoint import CheckpointError, load_weights, newest_checkpoint, save_checkpoint
from m3bsr.engine.evaluate import Metrics, evaluate
from m3bsr.engine.finite import NonFiniteError
from m3bsr.engine.log import read_log
from m3bsr.engine.train import TrainResult, train

__all__ = [
    "CheckpointError",
    "Metrics",
    "NonFiniteError",
    "TrainResult",
    "evaluate",
    "load_weights",
    "newest_checkpoint",
    "read_log",
    "save_checkpoint",
    "train",
]
