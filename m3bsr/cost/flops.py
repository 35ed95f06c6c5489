"""Multiply-accumulates (MACs), counted from the operations that really run.

Every matrix product, convolution and attention kernel that reaches the dispatcher is counted: experts with the rows
that they were given, frozen blocks without their weight gradients, recomputation in a backward pass again. Element-wise
work, norms, softmax and `embedding_bag` count as nothing. One MAC is two FLOPs.

Fused attention computes Q K^T once more in its backward pass. That is run, so it is counted: a training step of
ViT-B/16 at 224 takes 52.93 GMACs with it, 52.57 with the attention written out (``MacCount.fused_again`` is between).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

OUTSIDE = ""
"""Name of operations that ran outside of every module of the model."""


@dataclass(frozen=True)
class MacCount:
    """MACs of one callable; backward includes whatever the backward pass recomputes."""

    forward: int
    backward: int
    by_operator: Mapping[str, int]
    forward_by_module: Mapping[str, int]
    backward_by_module: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.forward + self.backward

    @property
    def fused_again(self) -> int:
        """Of the backward pass: Q K^T that fused attention computes a second time, one of its five products."""
        fused = (n for op, n in self.by_operator.items() if "attention" in op and op.endswith("_backward"))
        return sum(fused) // 5

    def by_module(self, depth: int) -> dict[str, tuple[int, int]]:
        """`(forward, backward)` summed over the first `depth` parts of the modules' names, in order of first use."""
        sums: dict[str, list[int]] = {}
        for column, counts in enumerate((self.forward_by_module, self.backward_by_module)):
            for name, macs in counts.items():
                sums.setdefault(".".join(name.split(".")[:depth]), [0, 0])[column] += macs
        return {name: (forward, backward) for name, (forward, backward) in sums.items()}


def count_macs(fn: Callable[[], Any], model: nn.Module | None = None) -> MacCount:
    """Run `fn` once and count. `fn` may call `backward()`; `model` gives the names for the counts by module."""
    with MacCounter(model) as counter:
        fn()
    return counter.result()


class MacCounter:
    """Counts while it is active: `with MacCounter(model) as counter: ...; counter.result()`.

    An operation of the forward pass belongs to the innermost module that is running. One of the backward pass belongs
    to the module whose forward pass made its autograd node, found by the node's sequence number.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._mode = _CountingMode(self._add)
        self._names = {} if model is None else {id(m): name for name, m in model.named_modules()}
        self._running: list[str] = []
        self._mark_numbers: list[int] = []
        self._mark_names: list[str] = []
        self._by_operator: dict[str, int] = defaultdict(int)
        self._forward: dict[str, int] = defaultdict(int)
        self._backward: dict[str, int] = defaultdict(int)

    def result(self) -> MacCount:
        return MacCount(
            sum(self._forward.values()),
            sum(self._backward.values()),
            dict(self._by_operator),
            dict(self._forward),
            dict(self._backward),
        )

    def __enter__(self) -> MacCounter:
        self._hooks = [
            module_hooks.register_module_forward_pre_hook(self._enter_module),
            module_hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._mark()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._names:
            self._running.append(self._names[id(module)])
            self._mark()

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._names and self._running:
            self._running.pop()
            self._mark()

    def _mark(self) -> None:
        self._mark_numbers.append(torch.autograd._get_sequence_nr())
        self._mark_names.append(self._running[-1] if self._running else OUTSIDE)

    def _add(self, operator: str, macs: int) -> None:
        self._by_operator[operator] += macs
        node = torch._C._current_autograd_node()
        if node is None:
            self._forward[self._running[-1] if self._running else OUTSIDE] += macs
        elif self._running:  # recomputation
            self._backward[self._running[-1]] += macs
        else:
            position = bisect_right(self._mark_numbers, node._sequence_nr()) - 1
            self._backward[self._mark_names[max(position, 0)]] += macs


class _CountingMode(TorchDispatchMode):
    """Calls `add(operator name, MACs)` for every operator with a formula."""

    def __init__(self, add: Callable[[str, int], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and func not in _NEVER_DECOMPOSED:
            # Under inference_mode composite operators arrive whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self._add(str(func._overloadpacket), formula(*args, **kwargs, out_val=result) // 2)
        return result


_NEVER_DECOMPOSED = {torch.ops.prim.device.default}


def _mv_flops(matrix: Any, vector: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _addmv_flops(bias: Any, matrix: Any, vector: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _grouped_mm_flops(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Rows are split among the groups, or (weight gradient, 2-D times 2-D) the inner dimension is."""
    if len(a) == 2 and len(b) == 3:
        return 2 * a[0] * a[1] * b[2]
    if len(a) == 3 and len(b) == 2:
        return 2 * a[1] * a[2] * b[1]
    if len(a) == 2 and len(b) == 2:
        return 2 * a[0] * a[1] * b[1]
    return 2 * prod(a) * b[2]


def _convolution_flops(x: Any, weight: Any, transposed: bool, out: Any) -> int:
    """`weight` has the input channels of one group (transposed: the output channels), so groups need no factor."""
    return 2 * prod(weight[1:]) * (x[0] * x[1] * prod(x[2:]) if transposed else prod(out))


def _convolution_backward_flops(
    grad_out: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    """Each of the two gradients takes as much as the forward pass. Torch's own formula forgets the groups."""
    return (output_mask[0] + output_mask[1]) * _convolution_flops(x, weight, transposed, grad_out)


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(
    grad_out: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad_out, q, k, v)


def _own_formulas() -> dict[Any, Callable[..., int]]:
    """What torch's own registry lacks (attention on the CPU: before 2.15), or counts wrong."""
    formulas: dict[str, Callable[..., int]] = {
        "mv": _mv_flops,
        "addmv": _addmv_flops,
        "_grouped_mm": _grouped_mm_flops,
        "convolution_backward": _convolution_backward_flops,
        "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
    }
    found = {getattr(torch.ops.aten, name, None): shape_wrapper(formula) for name, formula in formulas.items()}
    return {operator: formula for operator, formula in found.items() if operator is not None}


FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **_own_formulas()}
"""FLOPs of an operator from its arguments."""
