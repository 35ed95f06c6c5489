from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from m3bsr.engine import CheckpointError, checkpoint, load_weights, newest_checkpoint, save_checkpoint
from m3bsr.engine.checkpoint import load_state, tidy, verify_checkpoint
from m3bsr.engine.rng import get_rng_state, isolated_rng, set_rng_state


def save(folder, step=1, model=None, **kwargs):
    save_checkpoint(folder, model=model or nn.Linear(3, 2), config={"a": 1}, progress={"step": step}, **kwargs)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_frozen_parameters_and_buffers_come_back(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 1).requires_grad_(False), nn.BatchNorm2d(2))
    model(torch.rand(3, 1, 2, 2))
    save(tmp_path / "last", model=model)
    other = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    load_weights(other, tmp_path / "last")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert json.loads((tmp_path / "last" / "config.json").read_text()) == {"a": 1}


def test_tied_weights_can_be_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save(tmp_path / "last", model=model)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    load_weights(other, tmp_path / "last")
    assert other[1].weight is other[0].weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_any_damaged_file_is_noticed_and_the_newest_good_one_taken(tmp_path, name, damage):
    save(tmp_path / "last", 1, keep_previous=True)
    save(tmp_path / "last", 2, keep_previous=True)
    save(tmp_path / "best", 1)
    path = tmp_path / "last" / name
    if damage == "flipped":
        flip_a_byte(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="damaged|incomplete|format"):
        verify_checkpoint(tmp_path / "last")
    newest, complaints = newest_checkpoint(tmp_path)
    assert newest.name in ("previous", "best") and verify_checkpoint(newest) == 1
    assert len(complaints) == 1 and str(tmp_path / "last") in complaints[0] and "\n" not in complaints[0]


def test_nothing_there(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        verify_checkpoint(tmp_path / "none")


def test_last_wins_among_equals_and_newer_wins_over_last(tmp_path):
    save(tmp_path / "last", 5)
    save(tmp_path / "best", 5)
    assert newest_checkpoint(tmp_path)[0].name == "last"
    save(tmp_path / "best", 6)
    assert newest_checkpoint(tmp_path)[0].name == "best"


def test_failed_write_leaves_the_old_one_whole(tmp_path, monkeypatch):
    save(tmp_path / "last", 1)
    monkeypatch.setattr(checkpoint.torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "last", 2)
    assert verify_checkpoint(tmp_path / "last") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_tidy_finishes_a_rename_and_drops_leftovers(tmp_path):
    save(tmp_path / ".last.writing", 3)
    save(tmp_path / ".best.old", 2)
    save(tmp_path / "best", 3)
    (tmp_path / ".other.writing").mkdir()
    assert newest_checkpoint(tmp_path)[1] == []  # half-written folders are no news
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]
    assert verify_checkpoint(tmp_path / "last") == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 4), r"weight is \[2, 3\] there and \[4, 3\] in the model \(and 1 more"),
        (nn.Linear(3, 2, bias=False), "bias is not in the model"),
        (nn.Sequential(nn.Linear(3, 2)), r"0\.weight is missing there|0\.bias is missing there"),
    ],
    ids=["shape", "unexpected", "missing"],
)
def test_checkpoint_of_another_model_says_what_differs(tmp_path, model, message):
    save(tmp_path / "last")
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(model, tmp_path / "last")
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_state_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    save(tmp_path / "last")
    torch.save({"optimizer": Evil()}, tmp_path / "last" / "state.pt")
    with pytest.raises(CheckpointError, match="state.pt cannot be read"):
        load_state(tmp_path / "last")


def test_a_model_without_its_training_cannot_be_resumed(tmp_path):
    model = nn.Linear(3, 2)
    save(tmp_path / "last", model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="no training to go on with.*model.weights .*model.safetensors"):
        checkpoint.resume(tmp_path / "last", model, optimizer, None, None, total_steps=3)


def test_random_generators_come_back(tmp_path):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    np.random.randn()  # leaves a cached second number
    save(tmp_path / "last")
    drawn = (torch.rand(2).tolist(), np.random.randn(2).tolist(), random.random())
    set_rng_state(load_state(tmp_path / "last")["rng"])
    assert (torch.rand(2).tolist(), np.random.randn(2).tolist(), random.random()) == drawn


def test_isolated_rng_repeats_inside_and_leaves_no_trace():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    before = get_rng_state()
    with isolated_rng(5):
        first = draw()
    after = get_rng_state()
    assert torch.equal(before["torch"], after["torch"]) and before["python"] == after["python"]
    with isolated_rng(5):
        assert draw() == first
    with isolated_rng(6):
        assert draw() != first
