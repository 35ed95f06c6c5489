"""Weights in: any timm ViT/DeiT checkpoint into a backbone, position embeddings resampled, MLPs upcycled to experts.

Files are read without ever unpickling foreign objects: safetensors, ``torch.load(weights_only=True)``, and
``.npz`` (ImageNet-21k) through timm's own reader, which refuses pickled arrays. What claims more than it holds (a zip
bomb) is refused before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from m3bsr.backbones.task_vit import TaskViTMixin
from m3bsr.moe import MoEMlp
from m3bsr.moe.upcycle import num_slices, tie_gate_columns, upcycle_mlp
from m3bsr.utils.foreign import check_npz, load_tensors, one_line

# Checkpoints do not say how many heads they were trained with. These widths have one well-known answer.
USUAL_NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
# Parts of a classifier that a backbone has no use for.
CLASSIFIER_PREFIXES = ("head.", "head_dist.", "norm.", "fc_norm.", "pre_logits.", "attn_pool.")


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint."""

    num_loaded: int
    upcycled_blocks: tuple[int, ...]
    ignored: tuple[str, ...]
    final: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What the checkpoint holds behind the last block: norms and pooling, for a classifier that wants them."""

    def __str__(self) -> str:
        upcycled = f", MLPs of blocks {self.upcycled_blocks} upcycled to experts" if self.upcycled_blocks else ""
        ignored = f", ignored {', '.join(self.ignored)}" if self.ignored else ""
        return f"{self.num_loaded} tensors loaded{upcycled}{ignored}"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors``, ``.pth``/``.pt``/``.bin`` file into a flat state dict on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, damaged, or holding anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model.weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = load_tensors(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"model.weights: cannot read {path} safely: {one_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"model.weights: {error}") from None
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"model.weights: {path} holds no plain state dict of tensors")
    return {str(k).removeprefix("module."): v for k, v in loaded.items()}


def load_weights(
    backbone: TaskViTMixin,
    source: str | Path | Mapping[str, Tensor],
    *,
    upcycle: str = "copy",
    noise: float = 0.0,
    num_heads: int | None = None,
    name: str = "",
) -> LoadReport:
    """Load dense (or our own MoE) timm weights into a backbone.

    Args:
        backbone: a task backbone; its gates stay fresh (after ``split`` the experts of a group share a column).
        source: a file or a state dict with timm's names.
        upcycle: how a dense MLP becomes experts where the backbone has a mixture: ``copy`` or ``split``
            (see :func:`m3bsr.moe.upcycle.upcycle_mlp`), ``none`` leaves the experts fresh.
        noise: standard deviation, relative to each tensor's own, of the noise that tells the experts apart.
        num_heads: heads that the weights were trained with, where the usual number for the width is wrong.
        name: what to call the weights in messages (default: the file).

    Raises:
        FileNotFoundError, ValueError: see :func:`read_weights`; a head count, shape or key that does not fit.
    """
    name = name or ("state dict" if isinstance(source, Mapping) else str(source))
    if isinstance(source, str | Path) and Path(source).suffix == ".npz":
        state = _read_npz(Path(source), backbone)
    else:
        state = dict(source) if isinstance(source, Mapping) else read_weights(source)
    _check_num_heads(backbone, name, num_heads)
    ignored = sorted({k.split(".")[0] for k in state if k.startswith(CLASSIFIER_PREFIXES)})
    final = {k: v for k, v in state.items() if k.startswith(CLASSIFIER_PREFIXES)}
    state = {k: v for k, v in state.items() if k not in final}
    state = _fit_position_embedding(state, backbone)
    state = checkpoint_filter_fn(state, backbone)
    upcycled = _upcycle(state, backbone, upcycle, noise)
    _load(backbone, state, name, fresh_experts=upcycle == "none")
    return LoadReport(len(state), upcycled, tuple(ignored), final)


def _read_npz(path: Path, backbone: TaskViTMixin) -> dict[str, Tensor]:
    """ImageNet-21k weights in JAX layout: timm reads them into a dense twin of the backbone."""
    if not path.is_file():
        raise FileNotFoundError(f"model.weights: no such file: {path}")
    patch = backbone.patch_embed
    mlps: list[Any] = [block.mlp for block in backbone.blocks]
    dense = [mlp.fc1.out_features for mlp in mlps if not isinstance(mlp, MoEMlp)]
    twin = VisionTransformer(
        img_size=patch.img_size,
        patch_size=patch.patch_size,
        embed_dim=backbone.embed_dim,
        depth=len(backbone.blocks),
        num_heads=_num_heads(backbone),
        mlp_ratio=dense[0] / backbone.embed_dim if dense else 4.0,
        num_classes=0,
    )
    try:
        check_npz(path)
        twin.load_pretrained(str(path))
    except Exception as error:  # timm's reader takes the arrays as they come: a wrong one fails in many ways
        raise ValueError(f"model.weights: cannot read {path} as ViT weights in JAX layout: {one_line(error)}") from None
    return twin.state_dict()


def _num_heads(backbone: TaskViTMixin) -> int:
    attention: Any = backbone.blocks[0].attn
    return attention.num_heads


def _check_num_heads(backbone: TaskViTMixin, name: str, num_heads: int | None) -> None:
    has = _num_heads(backbone)
    expected = num_heads or USUAL_NUM_HEADS.get(backbone.embed_dim, has)
    if has != expected:
        raise ValueError(
            f"{name}: weights of width {backbone.embed_dim} have {expected} attention heads, the model has {has}: "
            f"they would fit by shape but mean nothing. Build the model with num_heads={expected}, or pass "
            f"num_heads={has} to load_weights if these weights really were trained so"
        )


def _fit_position_embedding(state: dict[str, Tensor], backbone: TaskViTMixin) -> dict[str, Tensor]:
    """Resample to the backbone's grid; timm's filter misses grids of another shape with as many patches."""
    pos_embed = state.get("pos_embed")
    if pos_embed is None or backbone.pos_embed is None:
        return state
    num_prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    side = round((pos_embed.shape[1] - num_prefix) ** 0.5)
    if side * side != pos_embed.shape[1] - num_prefix:
        return state  # not square: ours, or it will fail on its shape below
    grid = tuple(backbone.patch_embed.grid_size)
    if grid != (side, side):
        pos_embed = resample_abs_pos_embed(pos_embed, list(grid), [side, side], num_prefix_tokens=num_prefix)
    return {**state, "pos_embed": pos_embed}


def _upcycle(state: dict[str, Tensor], backbone: TaskViTMixin, method: str, noise: float) -> tuple[int, ...]:
    """Replace dense MLP tensors by stacked experts in ``state`` where the backbone has a mixture."""
    upcycled = []
    for i in backbone.moe_blocks:
        mlp: Any = backbone.blocks[i].mlp
        dense = {n: state.pop(f"blocks.{i}.mlp.{n}") for n in _DENSE_MLP if f"blocks.{i}.mlp.{n}" in state}
        if len(dense) < len(_DENSE_MLP) or method == "none":
            continue
        experts = upcycle_mlp(
            dense,
            num_experts=mlp.num_experts,
            hidden_dim=mlp.experts.hidden_dim,
            top_k=mlp.top_k,
            method=method,
            noise=noise,
            renormalize=mlp.renormalize,
        )
        state.update({f"blocks.{i}.mlp.experts.{name}": tensor for name, tensor in experts.items()})
        slices = num_slices(method, dense["fc1.bias"].numel(), mlp.experts.hidden_dim)
        if slices > 1 and mlp.top_k % slices == 0:  # whole groups of slices are chosen: starts as the dense MLP
            for task, gate in mlp.gates.items():
                state[f"blocks.{i}.mlp.gates.{task}.w_gate"] = tie_gate_columns(gate.w_gate.detach(), slices)
        upcycled.append(i)
    return tuple(upcycled)


_DENSE_MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def _load(backbone: TaskViTMixin, state: dict[str, Tensor], name: str, fresh_experts: bool) -> None:
    own = backbone.state_dict()
    for key, tensor in state.items():
        if key in own and own[key].shape != tensor.shape:
            raise ValueError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, the model needs {tuple(own[key].shape)}; "
                f"choose the backbone that these weights belong to"
            )
    unknown = sorted(k for k in state if k not in own)
    may_stay = ("bsr_adapters.", ".mlp.gates.", *((".mlp.experts.",) if fresh_experts else ()))  # a plan's, a task's
    missing = sorted(k for k in own if k not in state and not any(part in k for part in may_stay))
    if unknown or missing:
        parts = [
            f"{what}: {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"
            for what, keys in (("not in the model", unknown), ("missing", missing))
            if keys
        ]
        raise ValueError(f"{name} does not fit the backbone ({'; '.join(parts)})")
    backbone.load_state_dict({**own, **state})
