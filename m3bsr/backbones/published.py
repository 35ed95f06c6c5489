"""Published M3ViT checkpoints (fastmoe names) in and out of our backbone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from m3bsr.backbones.task_vit import TaskViTMixin
from m3bsr.backbones.weights import read_weights
from m3bsr.moe.published import from_published, join_ranks, split_ranks, to_published

_BLOCK = re.compile(r"(?P<block>blocks\.\d+\.mlp)\.(?P<rest>(?:experts|gate|gates)\..*)")


def read_published(path: str | Path) -> dict[str, Tensor]:
    """A published checkpoint: one file, or a folder ``0.pth, 1.pth, ...`` of an expert-parallel run.

    Raises:
        FileNotFoundError: no such file, or a folder without ``0.pth``.
        ValueError: a damaged file, or ranks that do not fit together.
    """
    path = Path(path)
    if not path.is_dir():
        return read_weights(path)
    files = sorted(path.glob("*.pth"), key=lambda f: (len(f.stem), f.stem))
    if not files or [f.stem for f in files] != [str(i) for i in range(len(files))]:
        raise FileNotFoundError(f"{path} needs the files 0.pth to n.pth of all ranks, found {[f.name for f in files]}")
    return join_ranks([read_weights(f) for f in files])


def load_published_weights(backbone: TaskViTMixin, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load a published M3ViT checkpoint; heads and other parts beside the backbone are passed over.

    The order of ``backbone.tasks`` must be that of the checkpoint's gates.

    Args:
        backbone: built with the sizes of the checkpoint.
        source: file, folder of ranks, or state dict, with or without a ``backbone.`` prefix.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_published`; keys or shapes that do not fit.
    """
    state = dict(source) if isinstance(source, Mapping) else read_published(source)
    if any(key.startswith("backbone.") for key in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    ours: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if match := _BLOCK.fullmatch(key):
            layers.setdefault(match["block"], {})[match["rest"]] = tensor
        else:
            ours[key] = tensor
    for block, layer in layers.items():
        ours |= {f"{block}.{name}": tensor for name, tensor in from_published(layer, backbone.tasks).items()}
    own = backbone.state_dict()
    problems = [f"missing {k}" for k in own if k not in ours] + [f"unknown {k}" for k in ours if k not in own]
    problems += [
        f"{k} is {tuple(ours[k].shape)}, the model needs {tuple(own[k].shape)}"
        for k in own
        if k in ours and ours[k].shape != own[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the checkpoint does not fit the backbone: {'; '.join(problems[:3])}{more}")
    backbone.load_state_dict(ours)


def published_state_dict(backbone: TaskViTMixin) -> dict[str, Tensor]:
    """The backbone's weights under the published names (``backbone.`` prefix included)."""
    theirs: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in backbone.state_dict().items():
        if match := _BLOCK.fullmatch(key):
            layers.setdefault(match["block"], {})[match["rest"]] = tensor
        else:
            theirs[f"backbone.{key}"] = tensor
    for block, layer in layers.items():
        theirs |= {f"backbone.{block}.{k}": v for k, v in to_published(layer, backbone.tasks).items()}
    return theirs


def save_published_weights(backbone: TaskViTMixin, path: str | Path, num_ranks: int | None = None) -> None:
    """Write :func:`published_state_dict` as ``{"state_dict": ...}``, for the published code or for
    :func:`load_published_weights`.

    Args:
        path: one file; with ``num_ranks`` a folder, which is made and holds ``0.pth`` to ``n.pth``, the experts divided
            among them in order.

    Raises:
        ValueError: experts that do not divide among the ranks, a tensor without a published name, or a folder with
            files of more ranks.
    """
    path, state = Path(path), published_state_dict(backbone)
    if num_ranks is None:
        torch.save({"state_dict": state}, path)
        return
    parts = split_ranks(state, num_ranks)
    path.mkdir(parents=True, exist_ok=True)
    names = [f"{rank}.pth" for rank in range(num_ranks)]
    if others := sorted({file.name for file in path.glob("*.pth")} - {*names}):
        raise ValueError(f"{path} holds {others[0]}, which is none of {num_ranks} ranks: choose an empty folder")
    for name, part in zip(names, parts, strict=True):
        torch.save({"state_dict": part}, path / name)
