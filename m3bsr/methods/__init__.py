"""Ways of fine-tuning by name. A new one is one file with a :class:`Method` and one line in ``METHODS``."""

from __future__ import annotations

from m3bsr.methods.adapter import ADAPTER
from m3bsr.methods.backrazor import BACKRAZOR
from m3bsr.methods.base import Method
from m3bsr.methods.bitfit import BITFIT
from m3bsr.methods.bsr import BSR
from m3bsr.methods.checkpointing import CHECKPOINTING
from m3bsr.methods.full import FULL
from m3bsr.methods.head import HEAD
from m3bsr.methods.last import LAST
from m3bsr.methods.lora import LORA
from m3bsr.methods.norm import NORM
from m3bsr.methods.token_drop import TOKEN_DROP
from m3bsr.utils.lookup import lookup

METHODS: dict[str, Method] = {
    "bsr": BSR,
    "full": FULL,
    "head": HEAD,
    "last": LAST,
    "bitfit": BITFIT,
    "norm": NORM,
    "lora": LORA,
    "adapter": ADAPTER,
    "token_drop": TOKEN_DROP,
    "checkpointing": CHECKPOINTING,
    "backrazor": BACKRAZOR,
}

__all__ = ["METHODS", "Method", "find_method"]


def find_method(name: str) -> tuple[Method, str]:
    """The method and what stands behind the colon: ``"last:3"`` is ``(METHODS["last"], "3")``.

    Raises:
        ValueError: an unknown method (with the nearest known one), or a value that it does not take or lacks.
    """
    word, _, value = name.partition(":")
    method = lookup(METHODS, word, "model.method")
    method.check(word, value)
    return method, value
