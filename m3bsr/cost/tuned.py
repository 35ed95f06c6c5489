"""What trains of blocks that the plan freezes, read off the model: biases, norms, LoRA, adapters (``m3bsr.methods``).

A method lets these train behind ``set_plan``. A new one that trains such things needs nothing here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from m3bsr.cost.stages import Tuned
from m3bsr.plan import Plan

Halves = tuple[Tuned, Tuned]
"""Of the attention and of the MLP of a block."""


def tuned_halves(vit: nn.Module, plan: Plan) -> dict[int, Halves]:
    """Of every block that ``plan`` freezes and that has parameters that train, what they are.

    Empty for a model that has another plan: what trains in it says nothing about this one.

    Raises:
        ValueError: a parameter trains that no formula knows.
    """
    if getattr(vit, "plan", None) != plan or plan.train_blocks == "all":
        return {}
    found: dict[int, Halves] = {}
    blocks: Any = vit.blocks
    for i, block in enumerate(blocks):
        if i in plan.train_blocks or not any(p.requires_grad for p in block.parameters()):
            continue
        unknown = [name for name, p in block.named_parameters() if p.requires_grad and not _is_known(block, name, p)]
        if unknown:
            raise ValueError(
                "costs are predicted where biases, norms, LoRA and adapters train in a frozen block, "
                f"not for blocks.{i}.{unknown[0]}"
            )
        ranks = {linear.r[name] for linear in _with_lora(block) for name in linear.lora_A}
        adapter = getattr(block.ls2, "adapter", None)
        found[i] = (
            Tuned(_num_trained(block.norm1, block.attn, block.ls1), _trains(block.norm1), rank=max(ranks, default=0)),
            Tuned(
                _num_trained(block.norm2, block.mlp, block.ls2),
                _trains(block.norm2),
                width=0 if adapter is None else adapter["down"].out_features,
            ),
        )
    return found


def _is_known(block: nn.Module, name: str, parameter: Tensor) -> bool:
    path, _, own = name.rpartition(".")
    within = path.split(".")
    added = within[:2] == ["ls2", "adapter"] or within[:1] == ["attn"] and {"lora_A", "lora_B"} & {*within}
    return own == "bias" or bool(added) or parameter.ndim == 1 and "norm" in within[-1]


def _with_lora(block: Any) -> list[Any]:
    return [linear for linear in (block.attn.qkv, block.attn.proj) if hasattr(linear, "lora_A")]


def _num_trained(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
