"""Names beside the points of a chart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3bsr.report.labels import Box, place_labels

CHART = Box(0, 0, 560, 300)


@given(st.lists(st.tuples(st.floats(20, 540), st.floats(20, 280)), min_size=1, max_size=12, unique=True))
def test_labels_stay_inside_and_near(points: list[tuple[float, float]]) -> None:
    boxes = place_labels(points, [60.0] * len(points), height=11, radius=4.5, inside=CHART)
    for (x, y), box in zip(points, boxes, strict=True):
        assert box.left >= 0 and box.right <= 560 and box.top >= 0 and box.bottom <= 300
        assert min(abs(box.left - x), abs(box.right - x)) == pytest.approx(9)
        assert abs((box.top + box.bottom) / 2 - y) <= 4.01 * 11


def test_a_crowd_is_told_apart() -> None:
    points = [(200.0 + 3 * i, 150.0 + 2 * (i % 3)) for i in range(8)]
    boxes = place_labels(points, [40.0] * 8, height=11, radius=4.5, inside=CHART)
    marks = [Box(x - 4.5, y - 4.5, x + 4.5, y + 4.5) for x, y in points]
    for i, box in enumerate(boxes):
        assert all(box.overlap(other) == 0 for other in boxes[:i] + boxes[i + 1 :])
    assert sum(box.overlap(mark) for box in boxes for mark in marks) < sum(40 * 11 for _ in boxes) / 4
