"""What autograd keeps of the blocks until the backward pass: less of it, in fewer bits, or only its largest entries.

Three choices of a plan, all about memory alone: the forward pass never changes, and by default nothing here runs.

* ``recompute``: what is not stored but computed again from something that is stored anyway (exact gradients);
* ``activation_dtype``: what is stored is stored in bfloat16 or in 8 bits (gradients get a rounding error);
* ``prune_rate``: of what enters a Linear for its weight gradient, or a LayerNorm, only the largest entries are stored
  (BackRazor, NeurIPS 2022; gradients of the weights become approximate).

The first is non-reentrant checkpointing of short stretches: recomputation stops at the last tensor that the stretch
would have stored, so its closing Linear never runs twice. The others are ``saved_tensors_hooks``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from m3bsr.plan import Plan

# Neighbours in memory that share one scale in 8-bit storage: outlier channels spoil their own group only.
GROUP = 64
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)

Run = Callable[..., Any]
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def call(fn: Run, *args: Any) -> Any:
    """Run ``fn``; autograd stores what it likes."""
    return fn(*args)


def recompute(fn: Run, *args: Any) -> Any:
    """Run ``fn``, store only its arguments, and run it again in the backward pass as far as needed."""
    return checkpoint(fn, *args, use_reentrant=False)


class Storage(NamedTuple):
    """How the two halves of a block run, which is what decides what they store."""

    attention: Run = call
    mlp: Run = call
    stretch: Run = call
    """Runs LayerNorm + Linear, or activation + Linear, inside a half; see :func:`lean_mlp`."""
    drop: Run = call


def choose_storage(plan: Plan, packer: Packer | None, block: nn.Module, trained: bool) -> Storage:
    """The storage of a block that autograd goes through."""
    keep = packer.run if packer is not None else call
    stretch = packer.recompute if packer is not None else recompute
    whole = partial(_recompute_packed, packer) if packer is not None else recompute
    if plan.recompute == "all":
        return Storage(whole, whole, drop=keep)
    if trained:
        return Storage(keep, keep, stretch if plan.recompute in ("cheap", "both") else call, keep)
    if plan.recompute in ("frozen", "both"):
        return Storage(whole, whole, drop=keep)
    return Storage(keep, whole if plan.recompute == "cheap" and type(block.mlp) is Mlp else keep, drop=keep)


def _recompute_packed(packer: Packer, fn: Run, *args: Any) -> Any:
    return packer.run(partial(packer.recompute, fn), *args)


def lean_qkv(block: Block, x_BND: Tensor, stretch: Run) -> Tensor:
    """``qkv(norm1(x))``; of a trained block only ``x`` is stored, its LayerNorm runs again for the weight gradient."""
    attn: Any = block.attn
    return stretch(lambda x: attn.qkv(block.norm1(x)), x_BND)


def lean_mlp(block: Block, x_BND: Tensor, stretch: Run) -> Tensor:
    """``mlp(norm2(x))`` of timm's ``Mlp``; only ``x`` and the input of the activation are stored."""
    mlp: Any = block.mlp
    hidden_BNH = stretch(lambda x: mlp.fc1(block.norm2(x)), x_BND)
    return stretch(lambda hidden: mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(mlp.act(hidden))))), hidden_BNH)


class Packer:
    """Runs functions so that the large activations that they store are stored smaller; one for one forward pass.

    Stored exactly: parameters (also their copies under autocast), integers, and everything below a quarter of the
    tokens' own size, such as the statistics of softmax and LayerNorm, scores and routing weights.

    Pruned: contiguous inputs of a Linear and of a LayerNorm. Never pruned: the input of an activation function (a zero
    there has derivative 1/2, a dropped -2 has -.09), and queries, keys and values (the backward pass of fused attention
    takes ``exp(q k - logsumexp)``, which explodes), nor anything that is recomputed from, nor MoE layers.
    """

    def __init__(self, dtype: str, prune_rate: float) -> None:
        self.dtype, self.prune_rate = dtype, prune_rate
        self._recomputing = False
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Packed]]] = {}

    @classmethod
    def of(cls, plan: Plan) -> Packer | None:
        """``None`` if the plan stores activations as they are."""
        if plan.activation_dtype == "same" and plan.prune_rate == 0:
            return None
        return cls(plan.activation_dtype, plan.prune_rate)

    def recompute(self, fn: Run, *args: Any) -> Any:
        """:func:`recompute` inside :meth:`run`: its arguments may be rounded, but not pruned."""
        self._recomputing = True
        try:
            return recompute(fn, *args)
        finally:
            self._recomputing = False

    @torch.compiler.disable
    def run(self, fn: Run, block: nn.Module, index: int, x_BND: Tensor, *args: Any) -> Any:
        """Call ``fn(block, index, x_BND, ...)``, half a block that gets the tokens ``[B, N, D]``."""
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        weights = {tuple(p.shape) for p in block.parameters()}
        weights |= {shape[::-1] for shape in weights}
        prunes = self.prune_rate > 0 and type(block.mlp) is Mlp and isinstance(block.attn, Attention)
        # The graph keeps ``pack`` itself, and with it all that it mentions: its size may be mentioned, x_BND may not.
        shape, num_samples, smallest = x_BND.shape, len(x_BND), x_BND.numel() // 4

        def pack(tensor: Tensor) -> _Exact | _View:
            numel = tensor.untyped_storage().nbytes() // tensor.element_size()
            is_weight = tuple(tensor.shape[-2:]) in weights
            if not tensor.is_floating_point() or is_weight or numel < smallest:
                return _Exact(tensor, outer)
            is_input = tensor.ndim == 2 or tensor.shape == shape
            prune_here = prunes and is_input and tensor.is_contiguous() and not self._recomputing
            return _View(self._packed_once(tensor, num_samples, self.prune_rate if prune_here else 0.0, outer), tensor)

        with saved_tensors_hooks(pack, _unpack):
            return fn(block, index, x_BND, *args)

    def _packed_once(self, tensor: Tensor, num_samples: int, prune_rate: float, outer: Hooks | None) -> _Packed:
        """Pack a storage the first time that autograd stores a view of it; the first view decides how."""
        key = (tensor.untyped_storage()._cdata, tensor._version)
        storage, known = self._known.get(key, (None, None))
        if storage is not None and known is not None and not storage.expired():  # else the address is used again
            packed = known()
            if packed is not None:
                return packed
        packed = _Packed(tensor, num_samples, self.dtype, prune_rate, outer)
        self._known[key] = StorageWeakRef(tensor.untyped_storage()), weakref.ref(packed)
        return packed


def _unpack(stored: _Exact | _View) -> Tensor:
    return stored.unpack()


class _Exact:
    """A tensor as it is, handed on to the hooks around ours (PyTorch itself calls the innermost hooks only)."""

    def __init__(self, tensor: Tensor, outer: Hooks | None) -> None:
        self._outer = outer
        self._kept = tensor if outer is None else outer[0](tensor)

    def unpack(self, again: bool = False) -> Tensor:
        """``again``: more calls will come, but a checkpoint around us answers only once."""
        tensor = self._kept if self._outer is None else self._outer[1](self._kept)
        if again:
            self._kept, self._outer = tensor, None
        return tensor


class _View:
    """A view of a packed storage."""

    def __init__(self, whole: _Packed, tensor: Tensor) -> None:
        self._whole, self._place = whole, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self) -> Tensor:
        return self._whole.unpack().as_strided(*self._place)


class _Packed:
    """One storage, packed: kept values, their scales (8 bits), the mask of what was kept (pruned)."""

    def __init__(self, tensor: Tensor, num_samples: int, dtype: str, prune_rate: float, outer: Hooks | None) -> None:
        with torch.no_grad():
            numel = tensor.untyped_storage().nbytes() // tensor.element_size()
            flat = tensor.detach().as_strided((numel,), (1,), 0)
            self._dtype, self._numel = flat.dtype, numel
            parts: dict[str, Tensor] = {}
            if prune_rate > 0:
                flat, parts["mask"] = prune(flat, num_samples, prune_rate)
            self._num_kept = len(flat)
            if dtype == "int8":
                parts["values"], parts["scale"] = to_int8(flat)
            else:
                narrow = dtype == "bf16" and flat.element_size() > 2
                parts["values"] = flat.to(torch.bfloat16) if narrow else flat
            self._parts = {name: _Exact(part, outer) for name, part in parts.items()}

    def unpack(self) -> Tensor:
        parts = {name: part.unpack(again=True) for name, part in self._parts.items()}
        with torch.no_grad():
            flat = parts["values"]
            if "scale" in parts:
                flat = from_int8(flat, parts["scale"], self._num_kept)
            flat = flat.to(self._dtype)
            return flat if "mask" not in parts else unprune(flat, parts["mask"], self._numel)


def to_int8(flat: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit values and one scale per ``GROUP`` of neighbours; off by at most 1/254 of the group's peak."""
    groups = F.pad(flat, (0, -len(flat) % GROUP)).float().view(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (groups / scale).round_().to(torch.int8), scale


def from_int8(values: Tensor, scale: Tensor, numel: int) -> Tensor:
    """Inverse of :func:`to_int8`."""
    return (values * scale).flatten()[:numel]


def prune(flat: Tensor, num_samples: int, rate: float) -> tuple[Tensor, Tensor]:
    """The ``1 - rate`` largest entries of every sample, in order, and where they stood, one bit an entry."""
    samples = flat.view(num_samples if len(flat) % num_samples == 0 else 1, -1)
    num_keep = max(1, round((1 - rate) * samples.shape[1]))
    places = samples.abs().topk(num_keep, dim=1, sorted=False).indices.sort(dim=1).values
    mask = torch.zeros_like(samples, dtype=torch.uint8).scatter_(1, places, 1).flatten()
    bits = F.pad(mask, (0, -len(mask) % 8)).view(-1, 8) * mask.new_tensor(_BITS)
    return samples.gather(1, places).flatten(), bits.sum(1, dtype=torch.uint8)


def unprune(kept: Tensor, mask: Tensor, numel: int) -> Tensor:
    """Inverse of :func:`prune`, with zeros for what was dropped."""
    where = (mask[:, None] & mask.new_tensor(_BITS)).bool().flatten()[:numel]
    return kept.new_zeros(numel).masked_scatter_(where, kept)
