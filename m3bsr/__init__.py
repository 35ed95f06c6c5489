"""m3bsr: fine-tune vision transformers cheaply by block selective reprogramming."""

from m3bsr.bsr import Plan, reprogram
from m3bsr.cost import Suggestion, suggest_plan
from m3bsr.delta import load_delta, save_delta

__version__ = "0.1.0"
__all__ = ["Plan", "Suggestion", "load_delta", "reprogram", "save_delta", "suggest_plan"]
