"""Backbones: plain and mixture-of-experts ViTs on timm's ``VisionTransformer``, and their weights."""

from m3bsr.backbones.moe_vit import DENSE_NAMES, MoEVisionTransformer, task_backbone
from m3bsr.backbones.published import (
    load_published_weights,
    published_state_dict,
    read_published,
    save_published_weights,
)
from m3bsr.backbones.task_vit import BackboneOutput, TaskViTMixin, add_moe
from m3bsr.backbones.weights import LoadReport, load_weights, read_weights

__all__ = [
    "DENSE_NAMES",
    "BackboneOutput",
    "LoadReport",
    "MoEVisionTransformer",
    "TaskViTMixin",
    "add_moe",
    "load_published_weights",
    "load_weights",
    "published_state_dict",
    "read_published",
    "read_weights",
    "save_published_weights",
    "task_backbone",
]
