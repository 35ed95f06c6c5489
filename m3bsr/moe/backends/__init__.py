"""Ways to run the experts of a layer, behind one function; one file and one line here each.

A backend module has `run(x_TD, weights_TK, experts_TK, experts) -> y_TD`, differentiable in the tokens, the weights
and the experts' parameters, and `why_not(device, dtype, experts) -> str | None`: why it cannot serve (None: it can).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from m3bsr.moe.backends import fmoe, grouped, grouped_mm, loop, low_memory
from m3bsr.moe.backends.shared_out import run_shared_out
from m3bsr.moe.experts import Experts
from m3bsr.utils.lookup import lookup

BACKENDS: dict[str, ModuleType] = {
    "grouped_mm": grouped_mm,
    "grouped": grouped,
    "low_memory": low_memory,
    "fmoe": fmoe,
    "loop": loop,
}


def check_backend(name: str) -> None:
    """Raise ValueError for a name that is unknown, or whose library is not there."""
    if name == "auto":
        return
    missing = lookup(BACKENDS, name, "moe backend").missing()
    if missing:
        raise ValueError(f'moe backend "{name}" is not available: {missing}')


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that experts compute in: autocast's where it is on, the tokens' own otherwise."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def resolve_backend(name: str, x: Tensor, experts: Experts) -> ModuleType:
    """The backend for these tokens: the named one, or for `"auto"` grouped_mm where it is fast, else grouped.

    Raises:
        ValueError: with the reason, for a named backend that cannot serve. It is never replaced silently.
    """
    dtype = compute_dtype(x)
    if name == "auto":
        return grouped_mm if grouped_mm.is_fast(x.device, dtype, experts) else grouped
    backend = lookup(BACKENDS, name, "moe backend")
    reason = backend.missing() or backend.why_not(x.device, dtype, experts)
    if reason:
        raise ValueError(f'moe backend "{name}" is not available: {reason}')
    return backend


def run_experts(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: Experts, backend: str) -> Tensor:
    """`y_t = sum_k weights[t, k] * expert[experts[t, k]](x_t)` for tokens `[T, D]`; no capacity, no token is lost."""
    chosen = resolve_backend(backend, x_TD, experts)
    dtype = compute_dtype(x_TD)
    if experts.mesh is None:
        y_TD = chosen.run(x_TD.to(dtype), weights_TK.to(dtype), experts_TK, experts)
    else:
        y_TD = run_shared_out(x_TD.to(dtype), weights_TK.to(dtype), experts_TK, experts, chosen.run)
    assert y_TD.shape == x_TD.shape
    return y_TD
