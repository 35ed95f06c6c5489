"""Cross-task refinement: attention over tasks against loops, any number of tasks, gradients from task to task."""

from __future__ import annotations

import pytest
import torch

from m3bsr.heads import HEADS, CrossTaskRefinement
from m3bsr.heads.refine import attend_tasks


def test_attention_over_tasks_against_loops() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 5, 3, 2)
    expected = torch.zeros_like(v)
    for b, y, x in ((b, y, x) for b in range(2) for y in range(3) for x in range(2)):
        for t in range(4):
            scores = torch.stack([q[t, b, :, y, x] @ k[u, b, :, y, x] for u in range(4)]) / 5**0.5
            for u, weight in enumerate(scores.softmax(0)):
                expected[t, b, :, y, x] += weight * v[u, b, :, y, x]
    torch.testing.assert_close(attend_tasks(q, k, v), expected)


@pytest.mark.parametrize("num_tasks", [2, 3, 7])
def test_any_number_of_tasks_each_hears_all_and_order_does_not_matter(num_tasks: int) -> None:
    torch.manual_seed(0)
    heads = {f"task{t}": HEADS["light"](12, 1 + t, head_dim=8) for t in range(num_tasks)}
    module = CrossTaskRefinement(heads, dim=4)
    features = {task: torch.randn(2, 8, 4, 6, requires_grad=True) for task in heads}
    logits = module(features, (8, 12))
    assert {task: x.shape for task, x in logits.items()} == {f"task{t}": (2, 1 + t, 8, 12) for t in range(num_tasks)}
    again = module(dict(reversed(features.items())), (8, 12))
    assert all(torch.allclose(logits[task], again[task], atol=1e-5) for task in heads)
    logits["task0"].square().mean().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 1e-8 for x in features.values())
    some = module({task: features[task] for task in ("task0", "task1")}, (8, 12))  # a batch with labels of two tasks
    assert list(some) == ["task0", "task1"]


def test_maps_of_different_sizes_meet_at_the_smallest() -> None:
    heads = {"a": HEADS["light"](12, 3, head_dim=8), "b": HEADS["upsample"](12, 1)}
    module = CrossTaskRefinement(heads, dim=4)
    logits = module({"a": torch.randn(1, 8, 4, 6), "b": torch.randn(1, 256, 16, 24)}, (5, 7))
    assert logits["a"].shape == (1, 3, 5, 7) and logits["b"].shape == (1, 1, 5, 7)


def test_one_task_has_nobody_to_ask() -> None:
    with pytest.raises(ValueError, match="model.refine_dim needs two dense tasks or more, got a"):
        CrossTaskRefinement({"a": HEADS["light"](12, 3)}, dim=4)
