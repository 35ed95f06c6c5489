"""Which parameters train: chosen by exact module path, never by a substring of a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from m3bsr.plan import Plan

# Behind the blocks: always trained. Models have some of them; the task heads of a multi-task model are its own.
HEAD_PATHS = ("norm", "attn_pool", "fc_norm", "head", "head_dist", "bsr_adapters")


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters that train and that stay as they are."""

    trained: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trained + self.frozen


def set_trainable(vit: nn.Module, plan: Plan) -> ParameterCount:
    """Set ``requires_grad`` of every parameter of ``vit`` as ``plan`` says and count them.

    Trained: the blocks in ``plan.train_blocks`` (of their MoE layers only ``plan.train_experts``), the final norm and
    the head; with ``train_blocks="all"`` everything. Gradients of parameters that freeze are discarded.

    Raises:
        ValueError: a tuple of experts per block that does not fit the MoE blocks that train.
    """
    if plan.train_blocks == "all":
        vit.requires_grad_(True)
    else:
        vit.requires_grad_(False)
        for path in (*HEAD_PATHS, *(f"blocks.{i}" for i in plan.train_blocks)):
            module = _submodule(vit, path)
            if module is not None:
                module.requires_grad_(True)
    _set_trainable_experts(vit, plan)
    for parameter in vit.parameters():
        if not parameter.requires_grad:
            parameter.grad = None
    return count_parameters(vit.parameters())


def count_parameters(parameters: Iterable[nn.Parameter]) -> ParameterCount:
    """Count trained and frozen parameters, each tensor once."""
    unique = {id(p): p for p in parameters}.values()
    trained = sum(p.numel() for p in unique if p.requires_grad)
    return ParameterCount(trained, sum(p.numel() for p in unique) - trained)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = dict(model.named_children()).get(name)
        if child is None:
            return None
        model = child
    return model


def _set_trainable_experts(vit: nn.Module, plan: Plan) -> None:
    if plan.train_experts == "all":
        return
    if isinstance(plan.train_experts, str):
        raise ValueError(
            f"bsr.train_experts {plan.train_experts!r} must be measured first: "
            f"tools/train.py does so, in a library use m3bsr.engine.choose_experts and give the tuples"
        )
    blocks = range(len(vit.blocks)) if plan.train_blocks == "all" else plan.train_blocks  # type: ignore[arg-type]
    moe = {i: vit.blocks[i].mlp for i in blocks if hasattr(vit.blocks[i].mlp, "set_trainable_experts")}  # type: ignore[index,union-attr]
    if len(moe) != len(plan.train_experts):
        raise ValueError(
            f"bsr.train_experts needs one tuple per trained MoE block ({len(moe)}: {tuple(moe)}), "
            f"got {len(plan.train_experts)}"
        )
    for mlp, experts in zip(moe.values(), plan.train_experts, strict=True):
        mlp.set_trainable_experts(experts)  # type: ignore[operator]
