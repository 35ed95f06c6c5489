"""The published counts of operations, through the command that prints them."""

from __future__ import annotations

import functools

import pytest

from m3bsr.cli import reference
from m3bsr.cli.reference import PUBLISHED, ROWS, count_step, main
from m3bsr.cost import MacCount

VIT, DEIT = "vit_base_patch16_224", "deit_small_patch16_224"
# A second each: all of them are a slow test.
QUICK = {(VIT, "full"), (VIT, "bitfit"), (VIT, "bsr .5"), (DEIT, "full"), (DEIT, "head"), (DEIT, "bsr .7")}
POINTS = [
    pytest.param(model, row, marks=() if (model, row) in QUICK else pytest.mark.slow, id=f"{model} {row}")
    for model, rows in PUBLISHED.items()
    for row in rows
]


@functools.cache
def counted(model: str, row: str) -> MacCount:
    return count_step(model, *ROWS[row])


@pytest.mark.parametrize(("model", "row"), POINTS)
def test_published_counts_are_met(model: str, row: str) -> None:
    count = counted(model, row)
    forward, step = PUBLISHED[model][row]
    if forward:
        assert count.forward / 1e9 == pytest.approx(forward, rel=1e-3)
    assert (count.total - count.fused_again) / 1e9 == pytest.approx(step, rel=2e-3)
    # What really runs: one product of attention more in every block that the backward pass goes through.
    assert (count.fused_again == 0) == (row == "head")
    assert count.fused_again < 0.02 * count.total


def test_fused_attention_is_the_difference_between_52_93_and_52_57() -> None:
    count = counted(VIT, "full")
    assert count.fused_again == 12 * 197 * 197 * 768
    assert count.total / 1e9 == pytest.approx(52.93, rel=1e-4)


def test_command_fails_where_a_count_is_off(capsys, monkeypatch) -> None:
    names = {plan: row for row, plan in ROWS.items()}
    monkeypatch.setattr(reference, "count_step", lambda model, *plan: counted(model, names[plan]))
    monkeypatch.setattr(reference, "PUBLISHED", {DEIT: {"head": (4.60, 4.60), "full": (4.60, 13.74)}})
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "13.740   13.738" in text and "13.917" in text and "largest deviation 0.03%" in text
    monkeypatch.setattr(reference, "PUBLISHED", {DEIT: {"head": (4.60, 4.70)}})
    assert main([]) == 1
