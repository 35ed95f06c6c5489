"""m3bsr: fine-tune vision transformers cheaply by block selective reprogramming."""

from m3bsr.bsr import Plan, reprogram
from m3bsr.cost import Suggestion, suggest_plan

__version__ = "0.1.0"
__all__ = ["Plan", "Suggestion", "reprogram", "suggest_plan"]
