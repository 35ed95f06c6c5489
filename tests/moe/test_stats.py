"""Routing statistics against sums written out, and counts that add up over batches of changing tasks."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from m3bsr.moe.routing import Routing
from m3bsr.moe.stats import RoutingCounts, dead_experts, load_entropy, load_overlap, loads, routing_stats

TABLES = st.integers(1, 6).flatmap(
    lambda e: st.lists(st.lists(st.integers(0, 50), min_size=e, max_size=e), min_size=1, max_size=4)
)


@settings(max_examples=30)
@given(TABLES)
def test_against_sums_written_out(table: list[list[int]]) -> None:
    loads_GE = loads(torch.tensor(table))
    entropies, overlap, dead = load_entropy(loads_GE), load_overlap(loads_GE), dead_experts(loads_GE)
    num_experts = len(table[0])
    shares = [[count / sum(row) if sum(row) else 0.0 for count in row] for row in table]
    for i, row in enumerate(shares):
        assert loads_GE[i].tolist() == pytest.approx(row)
        bits = -sum(p * math.log(p) for p in row if p > 0)
        assert entropies[i].item() == pytest.approx(bits / math.log(num_experts) if num_experts > 1 else 1, abs=1e-12)
        for j, other in enumerate(shares):
            assert overlap[i, j].item() == pytest.approx(sum(min(a, b) for a, b in zip(row, other, strict=True)))
    unused = [e for e in range(num_experts) if sum(row[e] for row in shares) / len(shares) < 0.01 / num_experts]
    assert list(dead) == unused


def test_extremes() -> None:
    loads_GE = loads(torch.tensor([[5, 5, 0, 0], [0, 0, 7, 7], [3, 3, 3, 3]]))
    assert load_entropy(loads_GE).tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert load_overlap(loads_GE).tolist() == [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]]
    assert dead_experts(loads_GE) == ()
    assert dead_experts(loads_GE[:1]) == (2, 3)
    assert dead_experts(loads(torch.tensor([[100000, 1, 100000, 0]]))) == (1, 3)  # one token in 200000 is dead too


def output(experts_TK: torch.Tensor, asked: tuple[str, ...], streams: tuple[str, ...]) -> SimpleNamespace:
    zero = torch.zeros(())
    routing = Routing(torch.ones(experts_TK.shape), experts_TK, zero, zero, 5, streams)
    return SimpleNamespace(predictions=dict.fromkeys(asked), routing={7: routing})


def test_counts_add_up_over_batches_of_changing_tasks() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = {"a": torch.zeros(5), "b": torch.zeros(5)}
    counts = RoutingCounts()
    for asked in (("a", "b"), ("b",), ("a", "b"), ("a",)):
        experts_TK = torch.randint(0, 5, (6 * len(asked), 2), generator=generator)
        for task, part in zip(asked, experts_TK.chunk(len(asked)), strict=True):
            for expert in part.flatten().tolist():
                expected[task][expert] += 1
        counts.add(output(experts_TK, asked, asked))
    assert {task: row.tolist() for task, row in counts.per_task()[7].items()} == {
        task: row.tolist() for task, row in expected.items()
    }


def test_tasks_that_share_one_stream_each_get_it() -> None:
    counts = RoutingCounts()
    counts.add(output(torch.tensor([[0, 1], [0, 4]]), ("a", "b"), ("a",)))
    assert counts.per_task()[7]["a"].tolist() == counts.per_task()[7]["b"].tolist() == [2, 1, 0, 0, 1]
    assert routing_stats(counts.per_task())["7"]["overlap"] == {"a+b": 1.0}


def test_counts_go_on_from_a_copy_of_their_state() -> None:
    choices = [torch.randint(0, 5, (4, 2), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    whole, first = RoutingCounts(), RoutingCounts()
    for i, experts_TK in enumerate(choices):
        whole.add(output(experts_TK, ("a", "b"), ("a", "b")))
        if i < 2:
            first.add(output(experts_TK, ("a", "b"), ("a", "b")))
    second = RoutingCounts(copy.deepcopy(first.counts))
    for experts_TK in choices[2:]:
        second.add(output(experts_TK, ("a", "b"), ("a", "b")))
    assert routing_stats(second.per_task()) == routing_stats(whole.per_task())
    assert first.per_task()[7]["a"].sum() == 8  # the copy has left it alone


class NothingIsRead(TorchDispatchMode):
    """Fails at what makes a GPU be waited for: a number read, a copy elsewhere, a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in {
            "aten::_local_scalar_dense",
            "aten::_to_copy",
            "aten::nonzero",
            "aten::bincount",
        }
        return func(*args, **(kwargs or {}))


def test_adding_reads_no_number() -> None:
    counts = RoutingCounts()
    batch = output(torch.randint(0, 5, (4, 2)), ("a", "b"), ("a", "b"))
    with NothingIsRead():
        for _ in range(3):
            counts.add(batch)
    with pytest.raises(AssertionError), NothingIsRead():
        counts.per_task()[7]["a"].tolist(), counts.counts[7]["a", "b"].sum().item()
    assert counts.per_task()[7]["a"].sum() == 12


def test_a_model_without_experts_counts_nothing() -> None:
    counts = RoutingCounts()
    counts.add(SimpleNamespace(predictions={"a": None}))
    assert counts.counts == {} and routing_stats(counts.per_task()) == {}


def test_what_a_log_holds_is_plain_json() -> None:
    stats = routing_stats({9: {"a": torch.tensor([1, 2, 0]), "b": [3, 0, 0], "c": [0, 0, 0]}})
    assert json.loads(json.dumps(stats)) == stats
    assert stats["9"]["load"] == {"a": [0.3333, 0.6667, 0.0], "b": [1.0, 0.0, 0.0], "c": [0.0, 0.0, 0.0]}
    assert stats["9"]["overlap"] == {"a+b": 0.3333, "a+c": 0.0, "b+c": 0.0}
    assert stats["9"]["dead"] == [2] and stats["9"]["num_dead"] == 1
