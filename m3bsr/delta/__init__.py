"""Deltas: files with what was trained and nothing else, to be put on the base that they were trained on."""

from m3bsr.delta.delta import load_delta, read_delta, save_delta
from m3bsr.delta.file import DeltaInfo

__all__ = ["DeltaInfo", "load_delta", "read_delta", "save_delta"]
