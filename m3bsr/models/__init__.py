"""Whole models: a backbone and one head per task."""

from m3bsr.models.multitask import ModelOutput, MultiTaskModel
from m3bsr.models.weights import is_model_state, load_model_weights

__all__ = ["ModelOutput", "MultiTaskModel", "is_model_state", "load_model_weights"]
