"""Several data sets as one: whose turn it is, what an epoch holds, labels under the right name."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3bsr.data import DATASETS
from m3bsr.data.labelled import LabelledImages
from m3bsr.data.several import RULES, SeveralSets
from m3bsr.engine.loader import eval_loader, steps_in_epoch, train_loader


class Numbers(LabelledImages):
    """``num`` pictures; the class is the index modulo 3."""

    def __init__(self, num: int) -> None:
        self.num = num
        super().__init__(".")

    def open(self, root, split):
        self.names_of_classes = ("a", "b", "c")
        return range(self.num)

    def read(self, index):
        return torch.zeros(3, 2, 2, dtype=torch.uint8), index % 3, str(index)


def sets_of(*sizes: int, **kwargs) -> SeveralSets:
    return SeveralSets({f"t{i}": Numbers(size) for i, size in enumerate(sizes)}, **kwargs)


def owner(several: SeveralSets, batch: list[int]) -> str:
    owners = {task for task, indices in several.ranges.items() for i in batch if i in indices}
    assert len(owners) == 1, "a batch comes from one set"
    return owners.pop()


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(4, 30), min_size=1, max_size=4),
    batch_size=st.integers(1, 4),
    rule=st.sampled_from(list(RULES)),
    seed=st.integers(0, 5),
)
def test_an_epoch_has_whole_batches_of_one_set_each_and_repeats_with_the_seed(sizes, batch_size, rule, seed):
    several = sets_of(*sizes, interleave=rule)
    batches = several.epoch_batches(batch_size, torch.Generator().manual_seed(seed))
    assert len(batches) == several.num_batches(batch_size) and all(len(batch) == batch_size for batch in batches)
    turns = Counter(owner(several, batch) for batch in batches)
    whole = {f"t{i}": size // batch_size for i, size in enumerate(sizes)}
    if rule == "proportional":
        assert turns == whole and len({i for batch in batches for i in batch}) == sum(whole.values()) * batch_size
    if rule == "round_robin":
        assert set(turns.values()) == {max(whole.values())}
        order = [owner(several, batch) for batch in batches]
        assert order == list(whole) * max(whole.values())
    again = several.epoch_batches(batch_size, torch.Generator().manual_seed(seed))
    assert again == batches


def test_temperature_lies_between_the_sizes_and_fairness():
    shares = []
    for temperature in (1.0, 2.0, 1e6):
        several = sets_of(3000, 100, interleave="temperature", temperature=temperature)
        turns = Counter(owner(several, b) for b in several.epoch_batches(1, torch.Generator().manual_seed(0)))
        shares.append(turns["t1"] / turns.total())
    assert shares == pytest.approx([1 / 31, 1 / (1 + 30**0.5), 0.5], abs=0.03)


def test_samples_carry_their_label_under_the_name_of_their_task():
    several = sets_of(5, 4)
    assert set(several[4]) == {"image", "t0", "name", "index"} and several[4]["t0"] == 1
    assert several[5]["t1"] == 0 and several[5]["name"] == "t1/0" and len(several) == 9
    with pytest.raises(IndexError):
        several[9]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_give_one_set_a_batch_and_go_on_anywhere(num_workers):
    several = sets_of(9, 7, interleave="round_robin")
    assert steps_in_epoch(several, 2) == 8 and steps_in_epoch(several, 2, accumulate=2) == 4
    loading = {"batch_size": 2, "seed": 1, "num_workers": num_workers}
    whole = [batch["name"] for batch in train_loader(several, start_step=0, stop_step=10, **loading)]
    rest = [batch["name"] for batch in train_loader(several, start_step=6, stop_step=10, **loading)]
    assert whole[6:] == rest and len(whole) == 10
    seen = [batch for batch in eval_loader(several, batch_size=4)]
    assert [len(batch["name"]) for batch in seen] == [4, 4, 1, 4, 3]
    assert all(("t0" in batch) != ("t1" in batch) for batch in seen)


def test_what_cannot_be_mixed_is_named():
    with pytest.raises(ValueError, match="t1 has 2 training images, fewer than a batch of 3"):
        sets_of(9, 2).num_batches(3)
    with pytest.raises(ValueError, match="data.interleave.*proportional"):
        sets_of(3, interleave="proportionally")
    with pytest.raises(ValueError, match="at least one data set"):
        SeveralSets({})


def test_digits_have_three_disjoint_splits():
    pytest.importorskip("sklearn")
    splits = [DATASETS["digits"](".", split) for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [1200, 300, 297]
    assert len({i for split in splits for i in split.indices}) == 1797
    sample = splits[0][0]
    assert sample["image"].shape == (3, 8, 8) and int(sample["image"].max()) > 200
    with pytest.raises(ValueError, match="digits has the splits"):
        DATASETS["digits"](".", "all")
