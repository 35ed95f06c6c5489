"""From a dense MLP to experts: the normal way into a mixture (Komatsuzaki et al. 2023, "Sparse Upcycling").

Shapes: E experts, D embed_dim, F hidden width of the dense MLP, H hidden width of an expert, S = F / H slices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

METHODS = ("copy", "split")


def upcycle_mlp(
    dense_state: Mapping[str, Tensor],
    num_experts: int,
    hidden_dim: int,
    top_k: int,
    method: str,
    *,
    noise: float = 0.0,
    renormalize: bool = True,
) -> dict[str, Tensor]:
    """Stacked expert tensors from `fc1.weight [F, D]`, `fc1.bias`, `fc2.weight [D, F]`, `fc2.bias`.

    "copy" puts the whole MLP into every expert (H = F): with weights that sum to 1 the layer equals the dense MLP.
    "split" cuts the hidden units into S slices; expert e holds slice `e % S`, its fc2 weight S times as large, so that
    the expected output is the dense one. It is exactly the dense one where each token visits complete groups of
    slices, which `tie_gate_columns` brings about if top_k is a multiple of S. Weights that are not renormalised sum to
    about top_k / E at the start; fc2 is scaled by the inverse.
    `noise` adds normal noise of that many times each tensor's own std to the weights, to break the symmetry.

    Returns: `fc1.weight [E, H, D]`, `fc1.bias [E, H]`, `fc2.weight [E, D, H]`, `fc2.bias [E, D]`.

    Raises:
        ValueError: for a missing tensor, shapes that are not an MLP's, or a width that does not divide.
    """
    w1, b1, w2, b2 = _dense_tensors(dense_state)
    slices = num_slices(method, w1.shape[0], hidden_dim)
    if slices > num_experts:
        raise ValueError(f"upcycling by split needs at least {slices} experts to hold every slice, got {num_experts}")
    ids = torch.arange(num_experts, device=w1.device) % slices
    scale = 1.0 if renormalize else num_experts / top_k
    stacked = {
        "fc1.weight": w1.view(slices, hidden_dim, -1)[ids],
        "fc1.bias": b1.view(slices, hidden_dim)[ids],
        "fc2.weight": w2.view(-1, slices, hidden_dim).transpose(0, 1)[ids] * (slices * scale),
        "fc2.bias": b2.expand(num_experts, -1) * scale,
    }
    if noise > 0:
        for name in ("fc1.weight", "fc2.weight"):
            stacked[name] = stacked[name] + torch.randn_like(stacked[name]) * (noise * stacked[name].std())
    return {name: tensor.contiguous() for name, tensor in stacked.items()}


def num_slices(method: str, dense_hidden: int, hidden_dim: int) -> int:
    """Slices that the dense hidden units are cut into: 1 for "copy".

    Raises:
        ValueError: for an unknown method, or widths that it cannot serve.
    """
    if method not in METHODS:
        raise ValueError(f'upcycling method must be one of {", ".join(METHODS)}, got "{method}"')
    if method == "copy" and hidden_dim != dense_hidden:
        raise ValueError(
            f"upcycling by copy needs experts as wide as the dense MLP: {dense_hidden} hidden units, experts have "
            f'{hidden_dim}; use "split" or another mlp_ratio'
        )
    if dense_hidden % hidden_dim:
        raise ValueError(f"upcycling by split: {dense_hidden} hidden units do not divide into experts of {hidden_dim}")
    return dense_hidden // hidden_dim


def tie_gate_columns(w_gate_DE: Tensor, slices: int) -> Tensor:
    """A gate weight whose experts of one group (`slices` neighbours) share a column, so that they are chosen together.

    With it, `split`, renormalised weights and top_k a multiple of `slices`, the layer starts exactly as the dense MLP
    ("virtual groups", He et al. 2024, "Upcycling Large Language Models into Mixture of Experts"). The experts of a
    group hold different slices, so their columns part as soon as they train.
    """
    ids = torch.arange(w_gate_DE.shape[1], device=w_gate_DE.device) // slices * slices
    return w_gate_DE[:, ids]


def _dense_tensors(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    absent = [name for name in names if name not in state]
    if absent:
        raise ValueError(
            f"the dense MLP to upcycle lacks {', '.join(absent)}; it holds {', '.join(state) or 'nothing'}"
        )
    w1, b1, w2, b2 = (state[name] for name in names)
    if w1.dim() != 2 or w2.shape != w1.shape[::-1] or b1.shape != w1.shape[:1] or b2.shape != w1.shape[1:]:
        shapes = ", ".join(f"{name} {tuple(state[name].shape)}" for name in names)
        raise ValueError(f"these tensors are no two-layer MLP: {shapes}")
    return w1, b1, w2, b2
