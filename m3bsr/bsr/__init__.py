"""Block selective reprogramming: the method itself. Start at ``forward.run_blocks``."""

from m3bsr.bsr.prefix import Prefix, frozen_prefix, prefix_weights, state_tensors, with_tensors
from m3bsr.bsr.reprogram import Report, ReprogrammedMixin, keep_rates_of_training, reprogram, token_counts, tokens_left
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
    "Prefix",
    "Report",
    "ReprogrammedMixin",
    "TokenState",
    "count_parameters",
    "frozen_prefix",
    "keep_rates_of_training",
    "patches_kept",
    "prefix_weights",
    "reprogram",
    "restore",
    "set_trainable",
    "state_tensors",
    "token_counts",
    "token_sources",
    "tokens_left",
    "with_tensors",
]
