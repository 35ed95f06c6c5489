"""A mean that knows how far its values lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


class Spread(float):
    """The mean of some values, as a number, with their standard deviation (n - 1); of one value it is 0."""

    spread: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        assert values, "a mean of nothing"
        mean = cls(statistics.fmean(values))
        mean.values = tuple(map(float, values))
        mean.spread = statistics.stdev(mean.values) if len(values) > 1 else 0.0
        return mean
