"""Whole models: a backbone and one head per task."""

from m3bsr.models.multitask import ModelOutput, MultiTaskModel

__all__ = ["ModelOutput", "MultiTaskModel"]
