"""m3bsr: fine-tune vision transformers cheaply by block selective reprogramming."""

from m3bsr.bsr import Plan, reprogram

__version__ = "0.1.0"
__all__ = ["Plan", "reprogram"]
