"""timm's models by name, and what timm knows of their weights."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer


def timm_vit(name: str, **kwargs: Any) -> VisionTransformer:
    """A timm model without a classifier, which takes ``kwargs`` where its family does.

    Raises:
        ValueError: an unknown name (with the nearest one), or no ``VisionTransformer``.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models("*vit*"), *timm.list_models("*deit*")], 1)
        raise ValueError(f"model.backbone: unknown model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    pretrained_cfg(name)
    try:
        model = timm.create_model(name, num_classes=0, **kwargs)
    except TypeError:  # other families take other arguments
        model = timm.create_model(name, num_classes=0)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model.backbone: {name} is a {type(model).__name__}, not a timm VisionTransformer")
    return model


def pretrained_cfg(name: str) -> Any:
    """timm's description of the weights of a model; None for one that it does not know.

    Raises:
        ValueError: the model is known, but not the weights behind the dot of its name.
    """
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:
        tags = [tag.partition(".")[2] for tag in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
        raise ValueError(f"model.backbone: unknown weights {name}; there are {', '.join(tags) or 'none'}") from None
