"""What half a block of a ViT costs in a training step, as formulas.

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

A method may train a little of a frozen block (:class:`Tuned`). Biases and norms add nothing to the frozen column; LoRA
of rank r on qkv and proj adds the inputs of its Linears, ``D + A + 2 r``; an adapter of width a its input and both
sides of its GELU, ``D + 2 a``. The half that the graph begins in lacks what only a gradient of its input needs.

A block before the first trained one has no graph and stores nothing. ``Plan.recompute`` takes terms away: "cheap" the
trained column and the LayerNorm statistics of trained blocks, and of frozen MLPs all but their input; "frozen" all but
the input of both halves of frozen blocks, "all" the same of every block. ``activation_dtype`` and ``prune_rate`` change
the bytes an element takes. Tokens aside (``Plan.drop_from``) are run without a graph; of them attention stores keys
and values, ``2A``, and what learns attends to them all: N counts both. Under autocast everything but x, statistics and
gradients of parameters has two bytes, and every Linear of the graph stores a copy of its weight.

Multiply-accumulates a token: qkv and proj ``4 D A``, attention ``2 N A`` forward, ``5 N A`` backward (fused attention
computes Q K^T again; ``4 N A`` where it is written out), MLP ``2 D H``, MoE ``2 k D m + D E``. A Linear takes as much
again for the gradient of its input, and again for that of its weight if it trains.

Beside what is stored the peak has working tensors, named where they are added up, and what libraries take for
themselves (``scratch``).
"""

from __future__ import annotations

from functools import cache

from m3bsr.bsr.attention import RECEIVED_CHUNK
from m3bsr.cost.scratch import fused_attention_growth, product_growth
from m3bsr.cost.stages import FLOAT, INDEX, BlockShape, Bytes, Role, Stage


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
    buffers, buffers_back = fused_attention_growth(tokens, keys, A // h, size.threads, w)
    # x, its norm, q, k, v, their result; what proj makes of it, or before that the buffers
    without_graph = FLOAT * D + normed + w * 4 * A
    if not role.graph:
        return Stage(0, round((n + a) * without_graph + max((n + a) * w * D, buffers) + chunk), 0, 0, forward, 0)

    written_out = keys <= size.written_out
    if written_out:
        buffers = buffers_back = 0
    # written out: scaled queries, copies of keys and values (of a single image views, which keep q, too), softmax
    attention = size.act * (3 * A + (A if rows == 1 else 0) + h * keys) if written_out else size.act * 4 * A + FLOAT * h
    if s.qk_norm:
        attention += size.act * 2 * A + FLOAT * 4 * h
    # keys and values of both kinds lie in tensors of their own; with norms q, k and v stay, too
    keys_aside = size.act * (2 * A * a + (n * A if s.qk_norm else 0)) if aside else 0
    weights = 4 * D * A * w if w < FLOAT else 0
    again = recomputed = kept = 0.0
    if role.trained and role.recompute in ("cheap", "both"):
        stored = n * (size.x_again * D + attention) + keys_aside + weights / 4
        kept = weights * 3 / 4
    else:
        stored = n * (size.x * D + 2 * FLOAT + attention + (size.inputs * D if role.trained else 0)) + weights
        stored += keys_aside
    separate = written_out or s.qk_norm  # the input of proj is a copy of attention's result
    if role.trained:
        stored += n * ((size.act * D if s.layer_scale else 0) + (size.inputs * A if separate else 0))
    if role.begins_inside:
        stored -= n * (size.x * D + 2 * FLOAT) + weights * 3 / 4
    linear = n * 4 * D * A
    backward: float = linear - (n * 3 * D * A if role.begins_inside else 0)
    in_flight: float = n * (normed if not role.trained else FLOAT * D) + max(n * w * D, buffers)
    if r := role.tuned.rank:
        lora = 2 * r * (D + 2 * A)  # weights of both pairs
        stored += n * size.inputs * (D + 2 * r + (A if separate else 0)) + (lora * w if w < FLOAT else 0)
        forward += n * lora
        backward += n * 2 * lora - (n * r * D if role.begins_inside else 0)
        # qkv's result, LoRA's scaled, their sum
        in_flight = n * (w * 5 * A + (FLOAT * D if w < FLOAT else 0))
    if role.whole:
        stored, recomputed = n * size.x_again * D + FLOAT * a * D, stored - n * size.x * D
        # up to the last tensor that is stored: proj only where one comes behind it
        again = n * (3 * D * A + 2 * keys * A) + a * 3 * D * A + scoring
        kept = weights if role.trained else 0.0
        if scoring or s.layer_scale or s.drop_path:
            again += n * D * A + (of_aside - a * 3 * D * A if scoring else 0)
    if role.own_scores:
        stored += _scores_stored(s, rows, keys, role.scores)
        if written_out and rows > 1 and not s.qk_norm:  # the keys that are scored are a view of qkv
            stored += n * size.act * 3 * A
    backward += n * keys * A * (4 if written_out else 5) + again + (linear if role.trained else 0)
    backward += 2 * scoring if role.own_scores else 0
    # gradients of the residual stream, of attention's result, and of q, k and v; packed tensors unpacked, q, k, v each
    # as the whole that they are views of
    working: float = n * (FLOAT * D + w * 4 * A + (w * 10 * A if size.packed else 0)) + a * w * 4 * A
    working += n * w * 2 * h * keys if written_out else buffers_back
    gradient = FLOAT * (s.attention_params if role.trained else role.tuned.params)
    in_flight += max(recomputed, kept) + chunk
    return Stage(
        round(stored),
        round(stored + in_flight + a * (without_graph + w * D - FLOAT * D)),
        round(stored + recomputed + working + (FLOAT * A * D if role.trained else 0)),
        gradient,
        forward,
        round(backward),
        kept=round(kept),
    )


def _scores_stored(s: BlockShape, rows: int, keys: int, kind: str) -> int:
    """What scores store that gradients go through: block-diagonal query, softmax over the tokens; or that of all."""
    if kind == "class_row":
        return FLOAT * rows * s.heads * (s.inner + keys)
    return FLOAT * rows * keys * (2 * s.inner + s.heads * keys)


@cache
def mlp_half(shape: BlockShape, rows: int, tokens: int, role: Role, size: Bytes, aside: int = 0) -> Stage:
    """``x + mlp(norm2(x))`` on ``rows`` images of ``tokens`` tokens, and before them of ``aside`` without a graph."""
    if aside:
        before = mlp_half(shape, rows, aside, Role(graph=False, trained=False), size)
        then = mlp_half(shape, rows, tokens, role, size)
        peak = max(then.forward_peak, before.forward_peak - FLOAT * rows * aside * shape.dim)
        return then._replace(forward_peak=peak, forward_macs=then.forward_macs + before.forward_macs)
    if role.tuned.width:
        return _with_adapter(shape, rows, tokens, role, size)
    if shape.num_experts:
        return _moe_half(shape, rows * tokens, role, size)
    s, n, w = shape, rows * tokens, size.work
    D, H = s.dim, s.hidden
    linear = n * 2 * D * H
    normed = D * (FLOAT if w == FLOAT else FLOAT + w)
    if not role.graph:  # x, its norm, the hidden layer before and behind GELU
        return Stage(0, n * (FLOAT * D + normed + w * 2 * H), 0, 0, linear, 0)
    weights = 2 * D * H * w if w < FLOAT else 0
    again = recomputed = kept = 0.0
    held = n * size.inputs * (D + H) if role.trained else 0.0
    if role.trained and role.recompute in ("cheap", "both"):
        stored, held, kept = n * (size.x_again * D + size.act * H), 0.0, weights
    else:
        stored = n * (size.x * D + 2 * FLOAT + size.act * H) + held + weights
    if role.trained and s.layer_scale:
        stored += n * size.act * D
    if role.whole or (not role.trained and role.recompute == "cheap"):
        stored, recomputed = n * size.x_again * D, stored - n * size.x * D
        again = n * D * H * (2 if s.layer_scale or s.drop_path else 1)
        kept = weights if role.trained else 0.0
    released = n * size.inputs * H if held else 0.0  # GELU's result, by the time of GELU's two gradients
    # gradients of the residual stream, and of GELU's result and input; packed: one of them unpacked, pruned: with
    # bytes, flags and positions of its mask
    unpacking = float(w * H if size.packed else 0)
    if size.pruned and role.trained:
        unpacking = (1 + 18 * (1 - size.pruned)) * H  # as measured
    working = n * (FLOAT * D + w * 2 * H + unpacking) - released
    if role.trained:
        working += FLOAT * D * H
        # before that fc2's gradients, in the type of the step, and what the library takes for the one of its weight
        first = n * (FLOAT * D + w * H) + w * D * H + (n * w * D if w < FLOAT else 0) + product_growth(n, D, H, size)
        working = max(working, first)
    in_flight = n * (2 * FLOAT * D if role.trained else normed + w * (H + D)) + kept
    if recomputed:  # nothing is stored: its norm, the hidden layer before and behind GELU
        in_flight = n * (FLOAT * D + w * 2 * H) + kept / 2
    return Stage(
        round(stored),
        round(stored + in_flight),
        round(stored + recomputed + working),
        FLOAT * (s.mlp_params if role.trained else role.tuned.params),
        linear,
        round(linear + again + (linear if role.trained else 0)),
        kept=round(kept),
    )


def _with_adapter(shape: BlockShape, rows: int, tokens: int, role: Role, size: Bytes) -> Stage:
    """The same with ``y + up(gelu(down(y)))`` on the result ``y``; the graph may begin with ``down``."""
    n, D, a, w = rows * tokens, shape.dim, role.tuned.width, size.work
    before = role._replace(graph=role.entered or role.tuned.norm, tuned=role.tuned._replace(width=0))
    half = mlp_half(shape, rows, tokens, before, size)
    linear, of_half = n * 2 * D * a, FLOAT * role.tuned.params
    stored = half.stored + n * size.inputs * (D + 2 * a) + (2 * D * a * w if w < FLOAT else 0)
    return Stage(
        round(stored),
        # what up makes, and the sum
        round(max(half.forward_peak, stored + n * w * 2 * D + (0 if half.stored else n * FLOAT * D))),
        # gradients of the residual stream, and of y by both ways
        round(max(half.backward_peak, stored + n * (FLOAT + 2 * w) * D) + of_half),
        of_half,
        half.forward_macs + linear,
        half.backward_macs + 2 * linear - (0 if before.graph else n * D * a),
    )


def _moe_half(s: BlockShape, n: int, role: Role, size: Bytes) -> Stage:
    """The same with experts; a row of the sorted buffer is a token and one of its experts."""
    D, m, w = s.dim, s.hidden, size.work
    rows = n * s.top_k + s.num_experts * (size.pad_rows - 1) // 2  # half of what may be filled up
    linear, gate = rows * 2 * D * m, n * D * s.num_experts
    share, gradient = 1.0, FLOAT * (s.mlp_params if role.trained else role.tuned.params)
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
