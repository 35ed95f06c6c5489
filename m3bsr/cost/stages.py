"""What half a block of a ViT costs in a training step, as formulas: the terms that ``predict`` adds up.

All formulas count elements a token and multiply by ``r`` rows of ``n`` tokens; D is the width of the tokens, A that of
all heads together (``h`` of them), H that of the MLP's hidden layer. Stored until the backward pass, with a graph:

=============================  =======================================  ==========================================
half of a block                frozen                                   trained: also
=============================  =======================================  ==========================================
attention                      D + 2 (norm) + 4A (q, k, v, out) + h     D (input of qkv)
MLP                            D + 2 (norm) + H (input of GELU)         D + H (inputs of fc1 and fc2)
MoE, k experts of width m      D + 2 (norm) + k (m + D) + gate          D + k (D + m)
=============================  =======================================  ==========================================

A frozen block before the first trained one has no graph and stores nothing. ``Plan.recompute`` takes terms away:
"cheap" what the norms give and the GELU output of trained blocks, and the MLP of frozen ones up to its input;
"frozen" all but the inputs of both halves of frozen blocks.

Multiply-accumulates: qkv and proj ``4 D A`` (timm has ``D = A``), attention ``2 n A`` forward and ``5 n A`` backward
(fused attention computes Q K^T again), MLP ``2 D H``; a Linear takes as much again for the gradient of its input, and
again for that of its weight where it trains.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from timm.models.vision_transformer import Block
from torch import nn

FLOAT, INDEX = 4, 8


class Stage(NamedTuple):
    """One part of a training step; bytes and multiply-accumulates (MACs) of the whole batch."""

    stored: int = 0
    """Kept from the forward to the backward pass."""
    forward_peak: int = 0
    """Highest point of the forward pass, above what was there before the stage."""
    backward_peak: int = 0
    """Highest point of the backward pass, above what earlier stages store and later ones have as gradients."""
    gradient: int = 0
    """Gradients of the parameters that train."""
    forward_macs: int = 0
    backward_macs: int = 0


class BlockShape(NamedTuple):
    """Sizes of a block; MoE: ``hidden`` is the width of an expert."""

    dim: int
    inner: int
    heads: int
    hidden: int
    attention_params: int
    mlp_params: int
    layer_scale: bool = False
    qk_norm: bool = False
    experts: int = 0
    top_k: int = 0


class Role(NamedTuple):
    """What a half does in one step."""

    graph: bool
    """Autograd goes through it."""
    trained: bool
    recompute: str = "none"
    scores: str = "none"
    """"none", "class_row" or "received", as ``bsr.attention`` has it."""


def block_shape(block: nn.Module) -> BlockShape:
    """Read the sizes of a timm ``Block`` whose MLP is timm's or a mixture of experts.

    Raises:
        ValueError: another kind of block.
    """
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    known = isinstance(block, Block) and hasattr(attn, "num_heads") and hasattr(attn, "head_dim")
    if not known or not (hasattr(mlp, "experts") or hasattr(mlp, "fc1")):
        raise ValueError(
            f"costs are predicted for timm's Block with attention and an MLP, not for {type(block).__name__}"
        )
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
        qk_norm=not isinstance(a.q_norm, nn.Identity),
        experts=m.num_experts if moe else 0,
        top_k=m.top_k if moe else 0,
    )


def _num_params(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@cache
def attention_half(shape: BlockShape, rows: int, tokens: int, role: Role, num_prefix: int = 1) -> Stage:
    """``x + attn(norm1(x))`` on ``rows`` images of ``tokens`` tokens."""
    s, x = shape, rows * tokens
    linear = x * 4 * s.dim * s.inner
    scoring = 0
    if role.scores == "class_row":
        scoring = x * s.inner * s.heads
    elif role.scores == "received":
        scoring = x * tokens * s.inner
    forward = linear + 2 * x * tokens * s.inner + scoring
    # x, its norm, qkv, out, and proj's result beside the sum
    working = x * (3 * s.dim + 4 * s.inner + 2)
    if not role.graph:
        return Stage(forward_peak=FLOAT * working, forward_macs=forward)

    norms = x * (4 * s.inner if s.qk_norm else 0)
    attention = x * (4 * s.inner + s.heads) + norms
    stored = x * (s.dim + 2) + attention
    again = 0
    scale = x * s.dim if s.layer_scale and role.trained else 0
    if role.trained:
        stored += scale
        if role.recompute in ("cheap", "both"):
            stored -= 2 * x
        else:
            stored += x * s.dim
    elif role.recompute in ("frozen", "both"):
        stored, again = x * s.dim, x * 3 * s.dim * s.inner + 2 * x * tokens * s.inner
    backward = linear + 5 * x * tokens * s.inner + again + (linear if role.trained else 0)
    gradient = s.attention_params if role.trained else 0
    # residual gradient, gradient of out, those of q, k and v; recomputed parts come back first
    recomputed = attention + x * (2 * s.dim + 2) if again else 0
    working_back = recomputed + x * (s.dim + 4 * s.inner)
    return Stage(
        FLOAT * stored,
        FLOAT * (stored + x * 2 * s.dim),
        FLOAT * (stored + working_back + (s.inner * s.dim if role.trained else 0)),
        FLOAT * gradient,
        forward,
        backward,
    )


@cache
def mlp_half(shape: BlockShape, rows: int, tokens: int, role: Role) -> Stage:
    """``x + mlp(norm2(x))`` on ``rows`` images of ``tokens`` tokens."""
    if shape.experts:
        return _moe_half(shape, rows, tokens, role)
    s, x = shape, rows * tokens
    linear = x * 2 * s.dim * s.hidden
    if not role.graph:
        return Stage(forward_peak=FLOAT * x * (3 * s.dim + 2 * s.hidden), forward_macs=linear)
    stored, again = x * (s.dim + 2 + s.hidden), 0
    if role.trained:
        stored += x * s.dim if s.layer_scale else 0
        if role.recompute in ("cheap", "both"):
            stored -= 2 * x
        else:
            stored += x * (s.dim + s.hidden)
    elif role.recompute != "none":
        stored, again = x * s.dim, x * s.dim * s.hidden
    gradient = s.mlp_params if role.trained else 0
    backward = linear + again + (linear if role.trained else 0)
    # residual gradient and the hidden layer's two gradients; a trained block has let go of GELU's output by then
    held = x * s.hidden if role.trained and role.recompute not in ("cheap", "both") else 0
    recomputed = x * (s.hidden + s.dim + 2) if again else 0
    working_back = recomputed + x * (s.dim + 2 * s.hidden) - held
    return Stage(
        FLOAT * stored,
        FLOAT * (stored + x * (2 * s.dim + (0 if role.trained else s.hidden + s.dim))),
        FLOAT * (stored + working_back + (s.hidden * s.dim if role.trained else 0)),
        FLOAT * gradient,
        linear,
        backward,
    )


def _moe_half(shape: BlockShape, rows: int, tokens: int, role: Role) -> Stage:
    s, x = shape, rows * tokens
    chosen = x * s.top_k
    linear, gate = chosen * 2 * s.dim * s.hidden, x * s.dim * s.experts
    routing = x * (3 * s.experts + 2) * FLOAT + chosen * (2 * FLOAT + 4 * INDEX)
    working = FLOAT * (3 * x * s.dim + 2 * chosen * (s.dim + s.hidden)) + routing
    if not role.graph:
        return Stage(forward_peak=working, forward_macs=linear + gate)
    stored = x * (s.dim + 2) + chosen * (s.hidden + s.dim)
    if role.trained:
        stored += x * s.dim + chosen * (s.dim + s.hidden)
    stored_bytes, again = FLOAT * stored + routing, 0
    if not role.trained and role.recompute in ("frozen", "both"):
        stored_bytes, again = FLOAT * x * s.dim, linear + gate
    gradient = s.mlp_params if role.trained else 0
    working_back = FLOAT * (x * s.dim + chosen * 2 * max(s.hidden, s.dim))
    return Stage(
        stored_bytes,
        max(stored_bytes, working),
        stored_bytes + working_back + (working if again else 0) + FLOAT * gradient // 2,
        FLOAT * gradient,
        linear + gate,
        linear + gate + again + (linear + gate if role.trained else 0),
    )
