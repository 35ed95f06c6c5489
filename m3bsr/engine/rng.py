"""Random number generators: their state as plain data, and seeds that depend on names instead of on history."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and PyTorch's global generators, as tensors, numbers and tuples only.

    So that a file with it loads under ``weights_only=True``.
    """
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert name == "MT19937"
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`get_rng_state` gave; CUDA generators only where the number of devices is the same."""
    random.setstate(state["python"])
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from non-negative numbers (run seed, epoch, position ...), well mixed by NumPy's SeedSequence."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Inside, the CPU generators start from ``seed``; afterwards they are as they were."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also re-seed every CUDA device, which the model's own randomness uses.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, CUDA's as well."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
