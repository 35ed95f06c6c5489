"""The halves of the blocks by ``torch.compile``: same modules, same parameters, same ``state_dict`` keys.

Compiled are the attention half of every timm ``Block`` and the MLP half of those with timm's dense ``Mlp``. Drops,
restoring and MoE layers (whose shapes change with the routing) run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from m3bsr.bsr.forward import attention_half, mlp_half, plain_mlp
from m3bsr.bsr.reprogram import ReprogrammedMixin
from m3bsr.bsr.storage import Run, call

# Programs that dynamo may make of one half: blocks differ in what trains, in their drop path, and in their number of
# tokens, and all of it once more for evaluation and for a smaller last batch. Beyond its limit dynamo stops compiling.
MAX_PROGRAMS = 256


def compile_blocks(vit: ReprogrammedMixin, backend: str | Callable[..., Any] = "inductor") -> None:
    """From now on run the halves of the blocks compiled, on the first batch of each shape after compiling them.

    Shapes are never made symbolic: which program serves a batch then depends on the batch alone and not on those
    before it, so a resumed run computes the same bits. Raises dynamo's ``recompile_limit`` for the whole process.

    Args:
        vit: a reprogrammed model; its weights may still change and move to another device.
        backend: of ``torch.compile``.

    Raises:
        ValueError: a plan that decides what autograd stores, or whose number of tokens changes from step to step; names
            the fields. A model without timm's plain blocks.
    """
    plan = vit.plan
    hindrances = {
        f"bsr.recompute {plan.recompute}": plan.recompute != "none",
        f"bsr.activation_dtype {plan.activation_dtype}": plan.activation_dtype != "same",
        f"bsr.prune_rate {plan.prune_rate}": plan.prune_rate > 0,
        f"bsr.schedule {plan.schedule}": plan.schedule != "constant" and bool(plan.drop_blocks),
    }
    if found := [name for name, hinders in hindrances.items() if hinders]:
        raise ValueError(f"train.compile: not with {', '.join(found)} (or a model.method of that kind); leave one out")
    blocks = [block for block in vit.blocks if isinstance(block, Block)]
    if not blocks:
        raise ValueError(f"train.compile: {type(vit).__name__} has none of timm's plain Blocks; leave it out")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_PROGRAMS)
    compiled: dict[Run, Run] = {
        half: torch.compile(half, dynamic=False, backend=backend) for half in (attention_half, mlp_half)
    }
    for block in blocks:  # no module, so no part of the state
        block.run_half = partial(_run_half, compiled)  # type: ignore[assignment]


def _run_half(compiled: Mapping[Run, Run], run: Run, half: Run, block: nn.Module, *args: Any) -> Any:
    """``half(block, ...)``, compiled where it can be."""
    assert run is call, "plans that store otherwise were refused"
    if half is attention_half:
        return compiled[half](block, *args)
    if type(block.mlp) is not Mlp:
        return half(block, *args)
    index, x_BND, before_BND, *_, stretch = args
    # run_mlp is a closure of this forward pass, for MoE layers; dynamo would compile for each new one.
    return compiled[half](block, index, x_BND, before_BND, plain_mlp, stretch)


def check_compiler(device: torch.device) -> None:
    """Compile one line, to find out now and not after the first batch whether that works here.

    Raises:
        ValueError: it does not; says why.
    """
    # Without the cache: it may know this one line, but not the blocks.
    compiled = torch.compile(_probe, dynamic=False, options={"fx_graph_cache": False})
    try:
        compiled(torch.ones(2, device=device))
    except (RuntimeError, OSError) as error:
        lines = [" ".join(line.split()) for line in str(error).strip().splitlines()] or [type(error).__name__]
        raise ValueError(
            f"train.compile: torch.compile does not work here: {lines[0]}; it needs a C++ compiler (g++ in PATH, or "
            f"the variable CXX), on CUDA Triton, too. Leave train.compile out otherwise"
        ) from None


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1
