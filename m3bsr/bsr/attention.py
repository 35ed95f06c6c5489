"""Self-attention that also says how much each token matters, without keeping the N x N matrix.

Shapes: B images, H heads, N tokens (P prefix tokens first, then M others), R tokens aside, d = head width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from m3bsr.utils.bf16 import cpu_emulates_bf16

ScoreKind = Literal["none", "class_row", "received"]
# Rows of the attention matrix that are alive at once while received attention is summed.
RECEIVED_CHUNK = 256


class Attended(NamedTuple):
    """What one attention layer gives: its output, the scores of the non-prefix tokens, and their keys."""

    x_BND: Tensor
    scores_BM: Tensor | None
    keys_BMd: Tensor | None
    aside_BRD: Tensor | None = None


def use_explicit_attention(device: torch.device, dtype: torch.dtype, num_tokens: int, needs_grad: bool) -> bool:
    """Whether softmax(QK^T)V written out beats ``scaled_dot_product_attention`` here.

    Only on a CPU with bfloat16 arithmetic, in that type, with a backward pass and few tokens: there the fused
    kernel's backward is slow (up to 1.8 times at 197 tokens). Everywhere else the fused form is about as fast or
    faster and never stores the N x N matrix; where bfloat16 is emulated the explicit form is three times slower.
    ``tools/bench_attention.py`` prints the ratios, LOG.md keeps them.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or cpu_emulates_bf16():
        return False
    return needs_grad and num_tokens <= 512


def explicit_attention(
    q_BHNd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    scale: float,
    dropout: float = 0.0,
    bias_B11N: Tensor | None = None,
) -> Tensor:
    """``softmax(QK^T) V`` written out; autograd keeps the N x N weights."""
    logits_BHNN = (q_BHNd * scale) @ k_BHNd.transpose(-2, -1)
    weights_BHNN = (logits_BHNN if bias_B11N is None else logits_BHNN + bias_B11N).softmax(dim=-1)
    return F.dropout(weights_BHNN, dropout) @ v_BHNd


def check_attention(attn: nn.Module, block: int) -> Attention:
    """Return ``attn`` as timm's plain ``Attention``.

    Raises:
        ValueError: another attention class, whose scores this library does not know how to read.
    """
    if not isinstance(attn, Attention):
        raise ValueError(
            f"block {block} uses {type(attn).__name__}; token dropping reads the scores of timm's Attention only. "
            f"Leave this block out of bsr.drop_blocks and do not let it score"
        )
    return attn


def attend(
    attn: Attention,
    x_BND: Tensor | None,
    *,
    score: ScoreKind,
    num_prefix: int,
    want_keys: bool,
    qkv_BNC: Tensor | None = None,
    aside_BRD: Tensor | None = None,
    size_BN: Tensor | None = None,
) -> Attended:
    """Run timm's ``Attention`` on ``x_BND`` and, on demand, score its tokens.

    Args:
        attn: the layer; its weights and options (qk-norm, gating, dropout) are used as they are.
        x_BND: normalised tokens ``[B, N, D]``.
        score: ``"class_row"``: the class token's attention to the other tokens, ``mean_h softmax(q_cls K^T/sqrt(d))``;
            ``"received"``: the mean attention that a token receives, for models without a class token.
        num_prefix: number P of prefix tokens, which get no score.
        want_keys: also return the keys, averaged over heads ``[B, M, d]`` (for matching tokens by similarity).
        qkv_BNC: ``attn.qkv(x_BND)`` where it is known already; ``x_BND`` is then read by gated attention only.
        aside_BRD: normalised tokens without a graph. Both kinds attend to both, gradients flow to ``x_BND`` alone.
        size_BN: number of patches that each token stands for; its keys count as often (proportional attention).

    Returns:
        Output ``[B, N, D]``, for tokens aside ``[B, R, D]``; scores ``[B, M]`` as the softmax over all tokens gives
        them (they sum to at most 1).
    """
    if qkv_BNC is None:
        qkv_BNC = attn.qkv(x_BND)
    num_scored = qkv_BNC.shape[1] - num_prefix
    bias = None if size_BN is None else size_BN.log()[:, None, None].to(qkv_BNC.dtype)
    q, k, v = _heads(attn, qkv_BNC)
    all_q, own_k, q_aside = q, k, None
    if aside_BRD is not None:
        with torch.no_grad():
            q_aside, k_aside, v_aside = _heads(attn, attn.qkv(aside_BRD))
        # A copy of the queries, too: autograd would keep all of qkv for a view.
        q, k, v = _joined(q), _joined(k, k_aside), _joined(v, v_aside)
        all_q = torch.cat([q, q_aside], dim=2) if score == "received" else q
    out_BND = _project(attn, _weigh(attn, q, k, v, bias), x_BND)
    if q_aside is not None:
        with torch.no_grad():
            out_BRD = _project(attn, _weigh(attn, q_aside, k.detach(), v.detach(), bias), aside_BRD)
    return Attended(
        out_BND,
        None if score == "none" else token_scores(all_q, k, attn.scale, score, num_prefix, bias)[:, :num_scored],
        own_k[:, :, num_prefix:].mean(1).detach() if want_keys else None,
        out_BRD if q_aside is not None else None,
    )


def _heads(attn: Attention, qkv_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, N, d]``."""
    B, N, _ = qkv_BNC.shape
    q, k, v = qkv_BNC.reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _joined(*parts_BHNd: Tensor) -> Tensor:
    """A copy ``[B, H, N, d]`` with one list of tokens behind the other; in memory the heads of a token are neighbours,
    as in ``qkv``, so that merging them is a view."""
    return torch.cat([part.transpose(1, 2) for part in parts_BHNd], dim=1).transpose(1, 2)


def _weigh(attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias_B11N: Tensor | None) -> Tensor:
    """``softmax(QK^T + bias) V`` ``[B, H, N, d]``."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    if use_explicit_attention(q.device, q.dtype, k.shape[2], torch.is_grad_enabled() and q.requires_grad):
        return explicit_attention(q, k, v, attn.scale, dropout, bias_B11N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11N, dropout_p=dropout)


def _project(attn: Attention, out_BHNd: Tensor, x_BND: Tensor | None) -> Tensor:
    """Heads side by side, then all that timm's layer has behind them."""
    out_BND = out_BHNd.transpose(1, 2).flatten(2)
    for_output, gate = (getattr(attn, name, None) for name in ("norm", "gate"))  # older timm has neither
    if for_output is not None:
        out_BND = for_output(out_BND)
    if gate is not None:
        out_BND = out_BND * gate(x_BND).sigmoid()
    return attn.proj_drop(attn.proj(out_BND))


def token_scores(
    q_BHNd: Tensor,
    k_BHNd: Tensor,
    scale: float,
    score: ScoreKind,
    num_prefix: int,
    bias_B11N: Tensor | None = None,
) -> Tensor:
    """Scores ``[B, M]`` of the tokens behind the prefix, in float32 (see :func:`attend`)."""
    if score == "class_row":
        # All heads in one product: keys [B, N, H*d] are a view of qkv, whereas a product per head would copy them (and
        # keep the copy for the backward pass). The query becomes block-diagonal [B, H*d, H].
        q_BHd = q_BHNd[:, :, 0] * scale
        q_BDH = torch.diag_embed(q_BHd.transpose(1, 2)).transpose(1, 2).flatten(1, 2)
        row_BNH = torch.bmm(k_BHNd.transpose(1, 2).flatten(2), q_BDH).float()
        if bias_B11N is not None:
            row_BNH = row_BNH + bias_B11N.flatten(1).unsqueeze(2).float()
        return row_BNH.softmax(dim=1)[:, num_prefix:].mean(2)
    q, k = q_BHNd.float(), k_BHNd.float()
    received_BN = k.new_zeros(k.shape[0], k.shape[2])
    for rows in (q * scale).split(RECEIVED_CHUNK, dim=2):
        logits_BHRN = rows @ k.transpose(-2, -1)
        logits_BHRN = logits_BHRN if bias_B11N is None else logits_BHRN + bias_B11N.float()
        received_BN = received_BN + logits_BHRN.softmax(dim=-1).sum(2).mean(1)
    return received_BN[:, num_prefix:] / q.shape[2]
