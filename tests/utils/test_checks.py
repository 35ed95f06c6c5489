from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import pytest

from m3bsr.utils.checks import check_fields, check_not_negative, check_positive, check_share, describe, fits, tuples


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, True),
        (True, int, False),
        (3.0, int, False),
        (3, float, True),
        (True, float, False),
        (math.inf, float, False),
        ("a", str, True),
        (1, bool, False),
        (None, int | None, True),
        ("3", int | None, False),
        ("a", Literal["a", "b"], True),
        (True, Literal[1], False),
        ((1, 2), tuple[int, int], True),
        ((1, 2, 3), tuple[int, int], False),
        ((), tuple[int, ...], True),
        ((1, "a"), tuple[int, ...], False),
        (((1,), ()), tuple[tuple[int, ...], ...], True),
        ([1], tuple[int, ...], False),
        ({"a": 1}, dict[str, float], True),
        ({1: 1}, dict[str, float], False),
    ],
)
def test_fits(value, hint, expected):
    assert fits(value, hint) is expected


def test_describe():
    assert describe(Literal["a", "b"] | tuple[int, ...]) == "one of 'a', 'b' or a tuple of integers"
    assert describe(tuple[float, float] | None) == "a tuple of 2 finite numbers or None"
    assert describe(dict[str, float]) == "a dict from strings to finite numbers"


def test_tuples_reach_inside():
    assert tuples([1, [2, (3, [4])]]) == (1, (2, (3, (4,))))


@dataclass(frozen=True)
class Sample:
    sizes: tuple[int, ...] = ()
    mode: Literal["fast", "slow"] = "fast"

    def __post_init__(self) -> None:
        check_fields(self, "sample")


def test_check_fields_of_a_frozen_dataclass():
    assert Sample(sizes=[1, 2]).sizes == (1, 2)
    with pytest.raises(ValueError) as caught:
        Sample(mode="fsat")
    assert str(caught.value) == "sample.mode must be one of 'fast', 'slow', got 'fsat'; did you mean 'fast'?"


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (check_positive, (1, 0), "must be positive, got (1, 0)"),
        (check_positive, 0, "must be a positive integer, got 0"),
        (check_positive, {"depth": 2, "edge": -1}, " of edge must be a positive integer, got -1"),
        (check_not_negative, -0.5, "must not be negative, got -0.5"),
        (check_not_negative, {"edge": -1.0}, " of edge must not be negative, got -1.0"),
        (check_share, (0.9, 1), "must lie in [0, 1), got (0.9, 1)"),
        (check_share, -0.1, "must lie in [0, 1), got -0.1"),
    ],
)
def test_numbers_out_of_range_are_named(check, value, message):
    with pytest.raises(ValueError) as caught:
        check(SimpleNamespace(good=0.5, rate=value), "train", "good", "rate")
    assert str(caught.value) == f"train.rate{'' if message[0] == ' ' else ' '}{message}"


def test_none_empty_and_the_ends_of_a_share_pass():
    owner = SimpleNamespace(none=None, empty={}, zero=0, one=(1.0,))
    check_positive(owner, "train", "none", "empty", "one")
    check_not_negative(owner, "train", "none", "empty", "zero")
    check_share(owner, "train", "none", "empty", "zero", "one", bounds="[0, 1]")
    with pytest.raises(ValueError, match="zero must lie in"):
        check_share(owner, "train", "one", "zero", bounds="(0, 1]")
