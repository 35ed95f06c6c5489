"""Damaged samples: an error by default; replaced, logged and counted if asked for, up to a share."""

from __future__ import annotations

import os
import pickle
import signal

import pytest
import torch

from m3bsr.data.several import SeveralSets
from m3bsr.engine import read_log
from m3bsr.engine.checkpoint import load_state
from m3bsr.engine.damaged import KEY, MAX_TRIES, DamagedSamples, ReplaceDamaged, without_replaced
from m3bsr.engine.loader import collate


def broken_set(tiny, broken, num_samples=12, **kwargs):
    class Broken(tiny.TinySet):
        def __getitem__(self, index):
            if index in broken:
                raise ValueError(f"cannot read image {index:03d}.jpg:\n truncated")
            return super().__getitem__(index)

    return Broken(num_samples, **kwargs)


def parts_with(tiny, broken=(), broken_val=(), **kwargs):
    parts = list(tiny.make_parts(**kwargs))
    parts[2] = ReplaceDamaged(broken_set(tiny, broken))
    parts[3] = ReplaceDamaged(broken_set(tiny, broken_val, 4, augment=False))
    return parts


def damaged_lines(run_dir):
    return [r for r in read_log(run_dir / "log.jsonl") if r["kind"] == "damaged"]


def test_a_damaged_sample_is_an_error_by_default(tiny, tmp_path):
    parts = list(tiny.make_parts())
    parts[2] = broken_set(tiny, {5})
    with pytest.raises(ValueError, match=r"cannot read image 005\.jpg"):
        tiny.run(tmp_path, parts=parts)


def test_replaced_logged_once_and_counted(tiny, tmp_path, capsys):
    _, result = tiny.run(tmp_path, parts=parts_with(tiny, {5, 7}, {2}), max_skipped=0.25)
    lines = damaged_lines(tmp_path)
    assert sorted((r["split"], r["error"]) for r in lines) == [
        ("train", "cannot read image 005.jpg: truncated"),
        ("train", "cannot read image 007.jpg: truncated"),
        ("val", "cannot read image 002.jpg: truncated"),
    ]
    assert all(1 <= r["step"] <= 4 for r in lines)  # each is met in the first epoch, and not told again in the second
    assert {split: len(found) for split, found in result.progress.damaged.items()} == {"train": 2, "val": 1}
    assert capsys.readouterr().err.count("damaged train sample: cannot read image") == 2
    assert load_state(tmp_path / "checkpoints" / "last")["progress"]["damaged"] == result.progress.damaged


def test_more_than_the_share_is_an_error_that_names_the_files(tiny, tmp_path):
    message = r"2 of 12 train samples are damaged, more than the share 0\.1 .*00[57]\.jpg: truncated; .*00[57]\.jpg"
    with pytest.raises(ValueError, match=message) as error:
        tiny.run(tmp_path, parts=parts_with(tiny, {5, 7}), max_skipped=0.1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_is_exact_with_replaced_samples(tiny, tmp_path, num_workers):
    whole, _ = tiny.run(tmp_path / "whole", parts=parts_with(tiny, {5, 7}, {2}), max_skipped=0.25)
    parts = parts_with(tiny, {5, 7}, {2})
    parts[0].on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None
    tiny.run(tmp_path / "parted", parts=parts, max_skipped=0.25)
    again = {"max_skipped": 0.25, "resume": True, "num_workers": num_workers}
    parted, _ = tiny.run(tmp_path / "parted", parts=parts_with(tiny, {5, 7}, {2}), **again)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parted.state_dict()[name]), name
    assert damaged_lines(tmp_path / "whole") == damaged_lines(tmp_path / "parted")


def test_another_sample_takes_the_place_always_the_same(tiny):
    images = ReplaceDamaged(broken_set(tiny, {3, 4, 5}, augment=False))
    found = [images[4] for _ in range(2)]
    assert found[0]["index"] == found[1]["index"] not in (3, 4, 5)
    assert found[0][KEY].startswith("cannot read image 004.jpg: truncated") and images[0][KEY] == ""
    assert torch.equal(found[0]["image"], images[found[0]["index"]]["image"])
    assert len(images) == 12 and images.num_samples == 12 and not hasattr(images, "epoch_batches")


def test_a_set_that_is_damaged_throughout_is_an_error(tiny):
    with pytest.raises(ValueError, match=f"{MAX_TRIES} samples in a row are damaged, the first: .*006.jpg"):
        ReplaceDamaged(broken_set(tiny, range(12)))[6]


def test_mistakes_in_code_are_no_damage(tiny):
    class Wrong(tiny.TinySet):
        def __getitem__(self, index):
            raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        ReplaceDamaged(Wrong())[0]


def test_it_travels_to_a_worker_that_is_spawned(tiny):
    copy = pickle.loads(pickle.dumps(ReplaceDamaged(tiny.TinySet(5))))
    assert len(copy) == 5 and copy.size == (8, 8)


def test_scores_leave_replaced_samples_out():
    batch = {"image": torch.arange(3.0), "depth": [torch.zeros(1), torch.ones(2), torch.ones(3)], KEY: ["", "bad", ""]}
    left = without_replaced(batch)
    assert left["image"].tolist() == [0, 2] and [len(t) for t in left["depth"]] == [1, 3]
    assert without_replaced({**batch, KEY: ["bad"] * 3}) is None
    whole = {"image": torch.arange(3.0)}
    assert without_replaced(whole) == whole


def test_a_share_of_nothing_allows_nothing():
    with pytest.raises(ValueError, match=r"1 of 10 val samples"):
        DamagedSamples({"val": 10}, 0.0).note("val", {KEY: ["a.jpg is bad"]})
    assert DamagedSamples({"val": 10}, 0.1).note("val", {KEY: ["", "a.jpg is bad", ""]}) == ["a.jpg is bad"]


def test_of_several_sets_the_replacement_comes_from_the_same_one():
    class Labelled(torch.utils.data.Dataset):
        class_names, transform = {"classification": ("x",)}, None

        def __init__(self, name, broken=()):
            self.name, self.broken = name, broken

        def __len__(self):
            return 6

        def __getitem__(self, index):
            if index in self.broken:
                raise OSError(f"{self.name}/{index} is gone")
            label = torch.tensor(index)
            return {"image": torch.zeros(3, 2, 2), "classification": label, "name": f"{index}.jpg", "index": index}

    several = SeveralSets({"a": ReplaceDamaged(Labelled("a")), "b": ReplaceDamaged(Labelled("b", {2}))})
    batch = collate([several[i] for i in range(6, 12)])
    assert batch[KEY] == ["", "", "b/2 is gone", "", "", ""] and batch["b"].shape == (6,)
    assert all(name.startswith("b/") for name in batch["name"]) and batch["name"][2] != "b/2.jpg"
    assert several.epoch_batches(2, torch.Generator().manual_seed(0)) and several.class_names["b"] == ("x",)
