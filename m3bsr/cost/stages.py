"""The terms that ``predict`` adds up: what a part of a training step costs, and what its formula needs to know."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.models.vision_transformer import Block
from torch import nn

FLOAT, INDEX = 4, 8
# Neighbours that share a scale in 8-bit storage (``bsr.storage.GROUP``).
INT8 = 1 + FLOAT / 64


class Stage(NamedTuple):
    """One part of a training step; bytes and multiply-accumulates (MACs) of the whole batch."""

    stored: int = 0
    """Kept from the forward to the backward pass."""
    forward_peak: int = 0
    """Highest point of the forward pass, above what earlier stages store."""
    backward_peak: int = 0
    """Highest point of the backward pass, above what earlier stages store and later ones have as gradients."""
    gradient: int = 0
    """Gradients of the parameters that train."""
    forward_macs: int = 0
    backward_macs: int = 0
    held: int = 0
    """Kept in the forward pass only, until the grid is restored."""
    kept: int = 0
    """Kept to the end of the blocks' forward pass, though the graph does not store it: 16-bit copies of weights that
    train (autocast has a cache), and the tokens before the first block."""
    waiting: int = 0
    """Gradient that a decoder of several levels leaves for this part; it waits while later parts run backward."""


class BlockShape(NamedTuple):
    """Sizes of a block; in a MoE block ``hidden`` is the width of an expert."""

    dim: int
    inner: int
    heads: int
    hidden: int
    attention_params: int
    mlp_params: int
    layer_scale: bool = False
    drop_path: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    top_k: int = 0
    expert_params: int = 0
    """Parameters of one expert."""
    low_memory: bool = False
    """MoE backend that computes everything again in the backward pass."""


class Bytes(NamedTuple):
    """Bytes an element takes in a step."""

    x: float = FLOAT
    """Inputs of LayerNorms, stored."""
    x_again: float = FLOAT
    """The same where something is computed again from them (never pruned)."""
    inputs: float = FLOAT
    """Inputs of Linears that train, stored."""
    act: float = FLOAT
    """Other large activations, stored."""
    work: int = FLOAT
    """Activations while they are computed with: 2 under autocast."""
    packed: bool = False
    pruned: float = 0.0
    written_out: int = 0
    """Attention is written out up to this number of tokens."""
    pad_rows: int = 1
    """The rows of every expert are filled up to a multiple of this."""
    threads: int = 0
    """Each has a buffer of its own in fused attention, and in products of bf16 (CPU; elsewhere 0)."""


class Tuned(NamedTuple):
    """What trains of half a block that the plan freezes: biases, norms, and what a method has put in."""

    params: int = 0
    """Parameters that train."""
    norm: bool = False
    """Some of them are the LayerNorm's at the start of the half."""
    rank: int = 0
    """Of LoRA on qkv and proj."""
    width: int = 0
    """Of the adapter behind the MLP."""


class Role(NamedTuple):
    """What a half does in one step."""

    graph: bool
    """Autograd goes through it."""
    trained: bool
    """All of it trains, as the plan has it."""
    recompute: str = "none"
    scores: str = "none"
    """"none", "class_row" or "received", as ``bsr.attention`` has it."""
    own_scores: bool = False
    """Gradients go through the scores."""
    num_trained_experts: int | None = None
    """Of a trained MoE block; ``None``: all."""
    tuned: Tuned = Tuned()
    """What trains where not all does."""
    entered: bool = True
    """Its input needs a gradient: the graph does not begin here."""

    @property
    def begins_inside(self) -> bool:
        """The graph begins behind the LayerNorm, whose input and statistics nobody needs."""
        return not (self.entered or self.trained or self.tuned.norm)

    @property
    def whole(self) -> bool:
        """All but the input is computed again."""
        return self.recompute == "all" or (not self.trained and self.recompute in ("frozen", "both"))


def bytes_of(activation_dtype: str = "same", prune_rate: float = 0.0, autocast: bool = False, **more: int) -> Bytes:
    """Bytes of the elements that a plan stores, in fp32 or (``autocast``) in 16 bits; ``more`` as in :class:`Bytes`."""
    work = 2 if autocast else FLOAT

    def stored(size: float) -> float:
        return {"same": size, "bf16": min(size, 2.0), "int8": INT8}[activation_dtype]

    def pruned(size: float) -> float:
        return (1 - prune_rate) * stored(size) + 1 / 8 if prune_rate else stored(size)

    packed = activation_dtype != "same"
    return Bytes(pruned(FLOAT), stored(FLOAT), pruned(work), stored(work), work, packed, prune_rate, **more)


def block_shape(block: nn.Module) -> BlockShape:
    """Read the sizes of a timm ``Block`` whose MLP is timm's or a mixture of experts.

    Raises:
        ValueError: another kind of block.
    """
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    known = isinstance(block, Block) and hasattr(attn, "num_heads") and hasattr(attn, "head_dim")
    if not known or not (hasattr(mlp, "experts") or hasattr(mlp, "fc1")):
        raise ValueError(f"costs are predicted for timm's Block with attention and MLP, not for {type(block).__name__}")
    a: Any = attn
    m: Any = mlp
    moe = hasattr(m, "experts")
    return BlockShape(
        dim=a.qkv.in_features,
        inner=a.num_heads * a.head_dim,
        heads=a.num_heads,
        hidden=m.hidden_dim if moe else m.fc1.out_features,
        attention_params=_num_params(block.norm1, block.attn, block.ls1),
        mlp_params=_num_params(block.norm2, block.mlp, block.ls2),
        layer_scale=not isinstance(block.ls1, nn.Identity),
        drop_path=not isinstance(block.drop_path1, nn.Identity),
        qk_norm=not isinstance(a.q_norm, nn.Identity),
        num_experts=m.num_experts if moe else 0,
        top_k=m.top_k if moe else 0,
        expert_params=_num_params(m.experts) // m.num_experts if moe else 0,
        low_memory=moe and m.backend == "low_memory",
    )


def _num_params(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
