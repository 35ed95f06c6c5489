"""Block selective reprogramming: the method itself. Start at ``forward.run_blocks``."""

from m3bsr.bsr.reprogram import Report, ReprogrammedMixin, reprogram, token_counts, tokens_left
from m3bsr.bsr.restore import restore
from m3bsr.bsr.selectors import SELECTORS
from m3bsr.bsr.tokens import DropStage, TokenState, patches_kept, token_sources
from m3bsr.bsr.trainable import ParameterCount, count_parameters, set_trainable
from m3bsr.plan import Plan

__all__ = [
    "SELECTORS",
    "DropStage",
    "ParameterCount",
    "Plan",
    "Report",
    "ReprogrammedMixin",
    "TokenState",
    "count_parameters",
    "patches_kept",
    "reprogram",
    "restore",
    "set_trainable",
    "token_counts",
    "token_sources",
    "tokens_left",
]
