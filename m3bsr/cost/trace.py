"""What lies behind the blocks of a model, its decoders and losses, traced on tensors without content.

Such a part has no formula of its own: everybody may add a decoder or a task. Fake tensors have shape, type and
device only, so a step over them takes no memory and next to no time, and autocast acts as on real ones. Unseen are
temporaries inside an operator (``memory.peak_growth`` sees them).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3bsr.cost.flops import count_macs
from m3bsr.cost.stages import Stage

Behind = Callable[..., Tensor]
Level = tuple[int, int, int, bool]
"""Shape ``[rows, N, D]`` of what a decoder reads of an earlier block, and whether a gradient goes on into that."""


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make: ``with LiveBytes() as live: ...; live.now, live.peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def restart_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and self._is_new(leaf):  # it was there before: it does not count
                self._known[leaf.untyped_storage()._cdata] = weakref.ref(leaf.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self._is_new(leaf):
                self._add(leaf)
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known is None or known() is None

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size, key = storage.nbytes(), storage._cdata

        def freed(_: Any) -> None:
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def fake_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy without content and without the ViT's blocks; call it under a ``FakeTensorMode``."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.Module):
            memo[id(blocks)] = nn.Sequential()
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, memo)


def trace_behind(
    model: nn.Module,
    behind: Behind,
    features: tuple[int, int, int],
    needs_grad: bool,
    autocast: bool = False,
    levels: Sequence[Level] = (),
) -> Stage:
    """Cost of ``behind(copy of model, features, *levels) -> loss`` forward and backward; every parameter that it uses
    trains.

    Args:
        features: shape ``[rows, N, D]`` of the tokens behind the last block; they count if they are stored.
        needs_grad: whether a gradient goes on into the blocks.
        autocast: to bfloat16.
        levels: outputs of earlier blocks, which count there; their gradients count here, too.
    """
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = fake_copy(model, device).train()
        twin.requires_grad_(True)
        earlier = [torch.empty(shape, device=device, requires_grad=grad) for *shape, grad in levels]

        def loss() -> Tensor:
            # Not a leaf of the graph, which would keep it even if nothing needs it for its gradient.
            x_BND = torch.empty(features, device=device) + torch.zeros(1, device=device, requires_grad=needs_grad)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                return behind(twin, x_BND, *earlier)

        macs = count_macs(lambda: loss().backward())
        for tensor in (*twin.parameters(), *earlier):
            tensor.grad = None
        with LiveBytes() as live:
            value = loss()
            stored, forward = live.now, live.peak
            live.restart_peak()
            value.backward()
        gradient = sum(p.nbytes for p in twin.parameters() if p.grad is not None)
    return Stage(stored, forward, live.peak, gradient, macs.forward, macs.backward)
