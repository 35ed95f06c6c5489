"""The plan: what it refuses, and that it survives JSON."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3bsr.plan import ActivationDtype, DropFrom, Fuse, Plan, Recompute, Restore, ScoreSource

BAD = [
    ({"keep_rate": -0.5}, "bsr.keep_rate must lie in (0, 1], got -0.5"),
    ({"keep_rate": 0}, "bsr.keep_rate must lie in (0, 1], got 0"),
    ({"keep_rate": 1.01}, "bsr.keep_rate must lie in (0, 1], got 1.01"),
    ({"keep_rate": math.nan}, "bsr.keep_rate must be a finite number"),
    ({"keep_rate": True}, "bsr.keep_rate must be a finite number"),
    ({"drop_blocks": (3, 6), "keep_rate": (0.5, 2.0)}, "bsr.keep_rate must lie in (0, 1], got (0.5, 2.0)"),
    ({"drop_blocks": (3, 6), "keep_rate": (0.5,)}, "bsr.keep_rate has 1 values for 2 drop blocks"),
    ({"train_blocks": "al"}, "bsr.train_blocks must be 'all' or a tuple of integers, got 'al'; did you mean 'all'?"),
    ({"train_blocks": (3, -1)}, "bsr.train_blocks must hold integers from 0, got -1"),
    ({"train_blocks": (3, 3)}, "bsr.train_blocks names a number twice"),
    ({"train_blocks": (1.0,)}, "bsr.train_blocks must be 'all' or a tuple of integers"),
    ({"drop_blocks": 3}, "bsr.drop_blocks must be a tuple of integers, got 3"),
    ({"drop_blocks": (4, 4)}, "bsr.drop_blocks names a number twice"),
    ({"train_experts": "top:0"}, "bsr.train_experts must be"),
    ({"train_experts": "top"}, "bsr.train_experts must be"),
    ({"train_experts": (1, 2)}, "bsr.train_experts must be a string or a tuple of tuples of integers"),
    ({"train_experts": ((1, 1),)}, "bsr.train_experts names a number twice"),
    ({"fuse": "man"}, "bsr.fuse must be one of 'sum', 'mean', 'none', 'merge', got 'man'; did you mean 'mean'?"),
    ({"score_source": "owm"}, "did you mean 'own'?"),
    ({"schedule": "cosin"}, "did you mean 'cosine'?"),
    ({"restore": "transfr"}, "did you mean 'transfer'?"),
    ({"recompute": "frosen"}, "did you mean 'frozen'?"),
    ({"activation_dtype": "int4"}, "bsr.activation_dtype must be one of 'same', 'bf16', 'int8', got 'int4'"),
    ({"prune_rate": 1.0}, "bsr.prune_rate must lie in [0, 1), got 1.0"),
    ({"schedule": "cosine"}, "bsr.schedule_steps must be positive with a cosine schedule, got 0"),
    ({"eval_keep_rate": 0.0}, "bsr.eval_keep_rate must lie in (0, 1], got 0.0"),
    ({"eval_keep_rate": "all"}, "bsr.eval_keep_rate must be"),
    ({"schedule_steps": -1}, "bsr.schedule_steps must not be negative, got -1"),
    ({"schedule_steps": 2.5}, "bsr.schedule_steps must be an integer, got 2.5"),
    ({"restore_before": -1}, "bsr.restore_before must not be negative, got -1"),
    ({"drop_blocks": (3, 8), "restore_before": 8}, "bsr.restore_before 8 must come after the last drop block (8)"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_values_name_the_field(fields, message):
    with pytest.raises(ValueError) as caught:
        Plan(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_each_rate_stays_with_its_block_when_blocks_are_sorted():
    plan = Plan(drop_blocks=(9, 3, 6), keep_rate=(0.9, 0.3, 0.6))
    assert plan.drop_blocks == (3, 6, 9) and plan.keep_rate == (0.3, 0.6, 0.9)
    assert plan.keep_rates == {3: 0.3, 6: 0.6, 9: 0.9}
    assert plan == Plan(drop_blocks=(3, 6, 9), keep_rate=(0.3, 0.6, 0.9))


def test_one_rate_serves_all_drop_blocks():
    assert Plan(drop_blocks=[6, 3], keep_rate=0.5).keep_rates == {3: 0.5, 6: 0.5}
    assert Plan().keep_rates == {}


def test_evaluation_may_keep_more_than_training():
    plan = Plan(drop_blocks=(3, 6), keep_rate=(0.5, 0.4), schedule="cosine", schedule_steps=10, eval_keep_rate=0.9)
    assert plan.keep_rate_at(6, 0) == 1 and plan.keep_rate_at(6, 10) == 0.4
    assert plan.keep_rate_at(6, 0, training=False) == plan.keep_rate_at(3, training=False) == 0.9
    assert Plan(drop_blocks=(3,), keep_rate=0.5).keep_rate_at(3, training=False) == 0.5


def test_cosine_schedule_goes_from_one_to_the_keep_rate():
    plan = Plan(drop_blocks=(3,), keep_rate=0.5, schedule="cosine", schedule_steps=100)
    rates = [plan.keep_rate_at(3, step) for step in range(0, 101)]
    assert rates[0] == 1 and rates[50] == pytest.approx(0.75) and rates[100] == plan.keep_rate_at(3) == 0.5
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_blocks": (3, 12)}, "bsr.train_blocks [12] out of range: the model has blocks 0 to 11"),
        ({"drop_blocks": (3, 20)}, "bsr.drop_blocks [20] out of range"),
        ({"drop_blocks": (11,)}, "bsr.drop_blocks must not name the last block (11)"),
        ({"restore_before": 12}, "bsr.restore_before [12] out of range"),
    ],
)
def test_depth_is_checked_against_the_model(fields, message):
    with pytest.raises(ValueError) as caught:
        Plan(**fields).validate_depth(12)
    assert message in str(caught.value)


def test_a_plan_fits_a_model_just_deep_enough_and_none_that_lacks_a_block():
    plan = Plan(train_blocks=(0, 11), drop_blocks=(0, 10), restore_before=11)
    plan.validate_depth(12)
    with pytest.raises(ValueError, match=r"bsr.train_blocks \[11\] out of range"):
        plan.validate_depth(11)


def test_unknown_field_of_a_dict_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown field bsr\.keep_rte; did you mean 'keep_rate'\?"):
        Plan.from_dict({"keep_rte": 0.5})
    with pytest.raises(ValueError, match="must hold the fields of a plan"):
        Plan.from_dict([1])


blocks = st.lists(st.integers(0, 30), unique=True, max_size=5)
rate = st.floats(0, 1, exclude_min=True)


@st.composite
def plans(draw):
    drop = draw(blocks)
    keep = draw(st.one_of(rate, st.lists(rate, min_size=len(drop), max_size=len(drop)).map(tuple)))
    return Plan(
        train_blocks=draw(st.one_of(st.just("all"), blocks.map(tuple))),
        train_experts=draw(st.one_of(st.sampled_from(["all", "top:3"]), st.lists(blocks.map(tuple)).map(tuple))),
        drop_blocks=tuple(drop),
        keep_rate=keep,
        drop_from=draw(st.sampled_from(get_args(DropFrom))),
        fuse=draw(st.sampled_from(get_args(Fuse))),
        score_source=draw(st.sampled_from(get_args(ScoreSource))),
        restore=draw(st.sampled_from(get_args(Restore))),
        restore_before=draw(st.sampled_from([None, 31])),
        recompute=draw(st.sampled_from(get_args(Recompute))),
        activation_dtype=draw(st.sampled_from(get_args(ActivationDtype))),
        prune_rate=draw(st.floats(0, 1, exclude_max=True)),
        schedule_steps=draw(st.integers(0, 9)),
        eval_keep_rate=draw(st.none() | rate),
    )


@given(plans())
def test_json_round_trip_is_exact(plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert list(plan.drop_blocks) == sorted(plan.drop_blocks) and set(plan.keep_rates) == set(plan.drop_blocks)
