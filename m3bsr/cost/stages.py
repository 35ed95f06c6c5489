"""What half a block of a ViT costs in a training step, as formulas: the terms that ``predict`` adds up.

All formulas count elements a token, times the tokens of all rows. D is the width of the tokens, A that of all heads
together (``h`` of them), H that of the MLP's hidden layer, N the tokens of one image. Stored until the backward pass:

==========================  ====================================================  ========================
half of a block             frozen, behind the first trained block                trained: also
==========================  ====================================================  ========================
attention                   D + 2 (LayerNorm), 4A (q, k, v, result) + h           D (input of qkv)
attention written out       D + 2, 3A + h N (softmax)                             D + A (input of proj)
MLP                         D + 2, H (input of GELU)                              D + H (inputs of fc1, fc2)
MoE, k experts of width m   D + 2, k (m + D), gate                                D, k (D + m)
==========================  ====================================================  ========================

A block before the first trained one has no graph and stores nothing. ``Plan.recompute`` takes terms away: "cheap" the
trained column and the LayerNorm statistics of trained blocks, and of frozen MLPs all but their input; "frozen" all but
the input of both halves of frozen blocks, "all" the same of every block. ``activation_dtype`` and ``prune_rate`` change
the bytes an element takes. Tokens aside (``Plan.drop_from``) are run without a graph; of them attention stores keys
and values, ``2A``, and what learns attends to them all: N counts both. Under autocast everything but x, statistics and
gradients of parameters has two bytes, and every Linear of the graph stores a copy of its weight.

Multiply-accumulates a token: qkv and proj ``4 D A``, attention ``2 N A`` forward, ``5 N A`` backward (fused attention
computes Q K^T again; ``4 N A`` where it is written out), MLP ``2 D H``, MoE ``2 k D m + D E``. A Linear takes as much
again for the gradient of its input, and again for that of its weight if it trains.

Beside what is stored the peak has working tensors, named where they are added up.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from timm.models.vision_transformer import Block
from torch import nn

from m3bsr.bsr.attention import RECEIVED_CHUNK

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


class Role(NamedTuple):
    """What a half does in one step."""

    graph: bool
    """Autograd goes through it."""
    trained: bool
    recompute: str = "none"
    scores: str = "none"
    """"none", "class_row" or "received", as ``bsr.attention`` has it."""
    own_scores: bool = False
    """Gradients go through the scores."""
    num_trained_experts: int | None = None
    """Of a trained MoE block; ``None``: all."""

    @property
    def whole(self) -> bool:
        """All but the input is computed again."""
        return self.recompute == "all" or (not self.trained and self.recompute in ("frozen", "both"))


def bytes_of(
    activation_dtype: str = "same", prune_rate: float = 0.0, autocast: bool = False, written_out: int = 0
) -> Bytes:
    """Bytes of the elements that a plan stores, in fp32 or (``autocast``) in 16 bits."""
    work = 2 if autocast else FLOAT

    def stored(size: float) -> float:
        return {"same": size, "bf16": min(size, 2.0), "int8": INT8}[activation_dtype]

    def pruned(size: float) -> float:
        return (1 - prune_rate) * stored(size) + 1 / 8 if prune_rate else stored(size)

    packed = activation_dtype != "same"
    return Bytes(pruned(FLOAT), stored(FLOAT), pruned(work), stored(work), work, packed, prune_rate, written_out)


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


@cache
def attention_half(shape: BlockShape, rows: int, tokens: int, role: Role, size: Bytes, aside: int = 0) -> Stage:
    """``x + attn(norm1(x))`` on ``rows`` images of ``tokens`` tokens, and of ``aside`` tokens without a graph."""
    s, n, a, w = shape, rows * tokens, rows * aside, size.work
    D, A, h, keys = s.dim, s.inner, s.heads, tokens + aside
    scoring = {"none": 0, "class_row": (n + a) * A * h, "received": (n + a) * keys * A}[role.scores]
    of_aside = a * (4 * D * A + 2 * keys * A)
    forward = n * (4 * D * A + 2 * keys * A) + of_aside + scoring
    normed = D * (FLOAT if w == FLOAT else FLOAT + w)
    # some rows of the attention matrix at a time, before and behind softmax; queries and keys in order
    chunk = (
        FLOAT * (rows * min(keys, RECEIVED_CHUNK) * keys * h * 2 + 2 * (n + a) * A) if role.scores == "received" else 0
    )
    # x, its norm, q, k, v, their result, what proj makes of it
    without_graph = FLOAT * D + normed + w * (4 * A + D)
    if not role.graph:
        return Stage(0, (n + a) * without_graph + chunk, 0, 0, forward, 0)

    written_out = keys <= size.written_out
    # written out: scaled queries, copies of keys and values (of a single image views, which keep q, too), softmax
    attention = size.act * (3 * A + (A if rows == 1 else 0) + h * keys) if written_out else size.act * 4 * A + FLOAT * h
    if s.qk_norm:
        attention += size.act * 2 * A + FLOAT * 4 * h
    # keys and values of both kinds lie in tensors of their own; with norms q, k and v stay, too
    keys_aside = size.act * (2 * A * a + (n * A if s.qk_norm else 0)) if aside else 0
    weights = 4 * D * A * w if w < FLOAT else 0
    again = recomputed = 0.0
    if role.trained and role.recompute in ("cheap", "both"):
        stored = n * (size.x_again * D + attention) + keys_aside + weights / 4
    else:
        stored = n * (size.x * D + 2 * FLOAT + attention + (size.inputs * D if role.trained else 0)) + weights
        stored += keys_aside
    if role.trained:
        separate = written_out or s.qk_norm  # the input of proj is a copy of attention's result
        stored += n * ((size.act * D if s.layer_scale else 0) + (size.inputs * A if separate else 0))
    if role.whole:
        stored, recomputed = n * size.x_again * D + FLOAT * a * D, stored - n * size.x * D
        # up to the last tensor that is stored: proj only where one comes behind it
        again = n * (3 * D * A + 2 * keys * A) + a * 3 * D * A + scoring
        if scoring or s.layer_scale or s.drop_path:
            again += n * D * A + (of_aside - a * 3 * D * A if scoring else 0)
    if role.own_scores:
        # block-diagonal query, softmax over the tokens
        stored += (
            FLOAT * (rows * A * h + (n + a) * h) if role.scores == "class_row" else FLOAT * (n + a) * (2 * A + h * keys)
        )
    linear = n * 4 * D * A
    backward = linear + n * keys * A * (4 if written_out else 5) + again + (linear if role.trained else 0)
    backward += 2 * scoring if role.own_scores else 0
    # gradients of the residual stream, of attention's result, and of q, k and v; packed tensors unpacked, q, k, v each
    # as the whole that they are views of
    working = n * (FLOAT * D + w * 4 * A + (w * 10 * A if size.packed else 0)) + a * w * 4 * A
    if written_out:
        working += n * w * 2 * h * keys
    gradient = FLOAT * s.attention_params if role.trained else 0
    in_flight = n * (normed + w * D if not role.trained else 2 * FLOAT * D) + recomputed + chunk
    return Stage(
        round(stored),
        round(stored + in_flight + a * (without_graph - FLOAT * D)),
        round(stored + recomputed + working + (FLOAT * A * D if role.trained else 0)),
        gradient,
        forward,
        round(backward),
    )


@cache
def mlp_half(shape: BlockShape, rows: int, tokens: int, role: Role, size: Bytes, aside: int = 0) -> Stage:
    """``x + mlp(norm2(x))`` on ``rows`` images of ``tokens`` tokens, and before them of ``aside`` without a graph."""
    if aside:
        first = mlp_half(shape, rows, aside, Role(graph=False, trained=False), size)
        then = mlp_half(shape, rows, tokens, role, size)
        peak = max(then.forward_peak, first.forward_peak - FLOAT * rows * aside * shape.dim)
        return then._replace(forward_peak=peak, forward_macs=then.forward_macs + first.forward_macs)
    if shape.num_experts:
        return _moe_half(shape, rows * tokens, role, size)
    s, n, w = shape, rows * tokens, size.work
    D, H = s.dim, s.hidden
    linear = n * 2 * D * H
    normed = D * (FLOAT if w == FLOAT else FLOAT + w)
    if not role.graph:  # x, its norm, the hidden layer before and behind GELU
        return Stage(0, n * (FLOAT * D + normed + w * 2 * H), 0, 0, linear, 0)
    weights = 2 * D * H * w if w < FLOAT else 0
    again = recomputed = 0.0
    held = n * size.inputs * (D + H) if role.trained else 0.0
    if role.trained and role.recompute in ("cheap", "both"):
        stored, held = n * (size.x_again * D + size.act * H), 0.0
    else:
        stored = n * (size.x * D + 2 * FLOAT + size.act * H) + held + weights
    if role.trained and s.layer_scale:
        stored += n * size.act * D
    if role.whole or (not role.trained and role.recompute == "cheap"):
        stored, recomputed = n * size.x_again * D, stored - n * size.x * D
        again = n * D * H * (2 if s.layer_scale or s.drop_path else 1)
    released = n * size.inputs * H if held else 0.0  # GELU's result, by the time of GELU's two gradients
    # gradients of the residual stream, and of GELU's result and input; packed: one of them unpacked, pruned: with
    # bytes, flags and positions of its mask
    unpacking = float(w * H if size.packed else 0)
    if size.pruned and role.trained:
        unpacking = (1 + 18 * (1 - size.pruned)) * H  # as measured
    working = n * (FLOAT * D + w * 2 * H + unpacking) - released
    if role.trained:
        working += FLOAT * D * H
    in_flight = 2 * FLOAT * D if role.trained else normed + w * (H + D)
    return Stage(
        round(stored),
        round(stored + n * in_flight + (0 if role.trained else recomputed)),
        round(stored + recomputed + working),
        FLOAT * s.mlp_params if role.trained else 0,
        linear,
        round(linear + again + (linear if role.trained else 0)),
    )


def _moe_half(s: BlockShape, n: int, role: Role, size: Bytes) -> Stage:
    """The same with experts; a row of the sorted buffer is a token and one of its experts."""
    D, m, w = s.dim, s.hidden, size.work
    rows = n * s.top_k
    linear, gate = rows * 2 * D * m, n * D * s.num_experts
    share, gradient = 1.0, FLOAT * s.mlp_params if role.trained else 0
    if role.trained and role.num_trained_experts is not None:
        share = role.num_trained_experts / s.num_experts
        gradient -= FLOAT * s.expert_params * (s.num_experts - role.num_trained_experts)
    # logits, probabilities, their sums; for every choice its weight, before and behind normalising, and indices
    routing = n * FLOAT * (3 * s.num_experts + 3) + rows * (3 * FLOAT + 4 * INDEX)
    normed = D * (FLOAT if w == FLOAT else FLOAT + w)
    working = n * (FLOAT * D + normed + w * D) + rows * w * 2 * max(D, m) + rows * w * min(D, m) + routing
    if not role.graph:
        return Stage(0, round(working), 0, 0, linear + gate, 0)
    kept = 0.0 if s.low_memory else rows * size.act * (m + D)
    if role.trained and not s.low_memory:
        kept += rows * size.inputs * share * (D + m)
    # under autocast a copy of every expert's weights, whether or not they train: gradients go through them
    weights = 2 * D * m * s.num_experts * w if w < FLOAT and not s.low_memory else 0
    stored = n * (size.x * D + 2 * FLOAT) + kept + routing + weights
    if role.trained or s.low_memory:
        stored += n * size.inputs * D
    again, recomputed = 0.0, 0.0
    if s.low_memory:  # tokens of all rows, hidden layer before and behind GELU; with their gradients 3 D + 4 m
        again, recomputed = linear / 2, rows * w * (3 * D + 4 * m - 2 * max(D, m)) + gradient / 2
    if role.whole:
        again, recomputed, stored = linear + gate, stored, n * size.x_again * D
    back = n * FLOAT * D + rows * w * 2 * max(D, m)
    return Stage(
        round(stored),
        round(max(stored + rows * w * D, working)),
        round(stored + recomputed + back + gradient / 2),
        gradient,
        linear + gate,
        round(linear + gate + again + (share * linear + gate if role.trained else 0)),
    )
