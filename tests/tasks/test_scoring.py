"""Scoring in other processes gives the sums of scoring in this one."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from m3bsr.tasks import TASKS
from m3bsr.tasks.scoring import Scorer


def images(num: int):
    torch.manual_seed(0)
    return torch.randn(num, 1, 16, 20), (torch.rand(num, 1, 16, 20) > 0.8).float()


@pytest.mark.parametrize("num_workers", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_sums_do_not_depend_on_the_processes(num_workers):
    """Two start processes of their own; in waves, as only four images may wait."""
    task = TASKS["edge"](thresholds=9)
    prediction, target = images(7)
    expected, raw, saved = (task.metric() for _ in range(3))
    expected.update(prediction, target)
    with Scorer(num_workers) as scorer:
        for i in (0, 5):
            part = slice(i, i + 5)
            scorer.add(task, raw, prediction[part], target[part])
            scorer.add(task, saved, task.to_saved(prediction[part]), target[part], saved=True)
        scorer.finish()
    assert all(torch.equal(raw.state()[name], value) for name, value in expected.state().items())
    assert saved.compute()["ods_f"] == pytest.approx(raw.compute()["ods_f"], abs=0.02)
    assert (scorer.pool is not None) == (num_workers == 2)


@pytest.mark.slow
def test_an_error_in_another_process_is_this_ones():
    task = TASKS["edge"](thresholds=9)
    with pytest.raises(ValueError, match="expected logits"), Scorer(2) as scorer:
        scorer.add(task, task.metric(), torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
        scorer.finish()


def test_a_process_that_died_is_a_line():
    task, future = TASKS["edge"](), Future()
    future.set_exception(BrokenProcessPool("terminated abruptly"))
    scorer = Scorer(2)
    scorer.waiting.append((task.metric(), future))
    with pytest.raises(ValueError, match="a process that scores edges died"):
        scorer.finish()


def test_quick_metrics_stay_in_this_process():
    task = TASKS["depth"]()
    with Scorer(4) as scorer:
        scorer.add(task, task.metric(), torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
    assert scorer.pool is None
