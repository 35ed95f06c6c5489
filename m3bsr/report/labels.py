"""Names beside points, where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in the units of a chart, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


def place_labels(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    *,
    height: float,
    radius: float,
    inside: Box,
    avoid: Sequence[Box] = (),
    steps: int = 8,
) -> list[Box]:
    """A box for each label: near its point, inside the chart, over no point and no other label if possible.

    Args:
        points: ``(x, y)``, y downwards.
        widths: of the labels.
        height: of a label.
        radius: of the marks.
        avoid: what else lies there.
        steps: how many heights away from its point a label may go, up and down.
    """
    marks = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    boxes: list[Box] = []
    for (x, y), width in zip(points, widths, strict=True):
        taken = [*marks, *avoid, *boxes]
        candidates = [
            Box(left, top, left + width, top + height)
            for step in range(2 * steps + 1)
            for left in (x + 2 * radius, x - 2 * radius - width)
            for top in (y - height / 2 + (step + 1) // 2 * (-1) ** step * height / 2,)
        ]
        # of equally bad ones the first, which is the nearest; what leaves the chart is worse than any overlap
        best = min(candidates, key=lambda box: (_outside(box, inside) > 0, sum(box.overlap(other) for other in taken)))
        boxes.append(best)
    return boxes


def _outside(box: Box, inside: Box) -> float:
    return (box.right - box.left) * (box.bottom - box.top) - box.overlap(inside) - 1e-6
