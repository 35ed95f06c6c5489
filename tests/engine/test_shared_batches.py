"""What each of several processes reads: together what one process would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3bsr.data.several import SeveralSets
from m3bsr.engine.loader import EvalBatches, ShuffledBatches, steps_in_epoch

SIZES = st.integers(1, 4)


class Numbers:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


def batches(dataset, batch_size, accumulate, start, stop, rank=0, num_processes=1):
    steps = steps_in_epoch(dataset, batch_size, accumulate, num_processes)
    return list(
        ShuffledBatches(
            len(dataset),
            batch_size,
            batches_per_epoch=steps * accumulate,
            epoch_batches=getattr(dataset, "epoch_batches", None),
            seed=3,
            start=start,
            stop=stop,
            rank=rank,
            num_processes=num_processes,
        )
    )


@pytest.mark.parametrize("several", [False, True])
@given(num_processes=SIZES, batch_size=SIZES, accumulate=SIZES, start=st.integers(0, 9))
def test_parts_make_up_the_batches_of_one_process(several, num_processes, batch_size, accumulate, start):
    """From any point on, with the random numbers of every sample, over the ends of epochs."""
    dataset = SeveralSets({"a": Numbers(67), "b": Numbers(40)}) if several else Numbers(67)
    whole = batches(dataset, batch_size * num_processes, accumulate, start, 12)
    parts = [batches(dataset, batch_size, accumulate, start, 12, r, num_processes) for r in range(num_processes)]
    assert whole == [[pair for part in shared for pair in part] for shared in zip(*parts, strict=True)]
    if several:
        tasks = [{index < 67 for index, _ in batch} for batch in whole]
        assert all(len(of) == 1 for of in tasks), "all processes are at the same task"


@given(num_processes=st.integers(1, 5), num_batches=st.integers(0, 12))
def test_evaluation_scores_every_batch_once_and_all_are_equally_long(num_processes, num_batches):
    whole = [[number, -number] for number in range(num_batches)]
    shares = [EvalBatches(whole, rank, num_processes) for rank in range(num_processes)]
    assert len({len(list(share)) for share in shares}) == 1 and all(len(s) == len(list(s)) for s in shares)
    assert sorted(batch for share in shares for batch in list(share)[: share.num_own]) == sorted(whole)


def test_an_epoch_of_several_processes_has_fewer_steps():
    assert steps_in_epoch(67, 4, 2, num_processes=3) == 2
    with pytest.raises(ValueError, match=r"67 images, fewer than the 96 .* x 3 processes"):
        steps_in_epoch(67, 16, 2, num_processes=3)
    assert steps_in_epoch(Numbers(67), 4) == 16
