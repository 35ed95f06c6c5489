from __future__ import annotations

import math

import pytest
import torch

from m3bsr.engine.evaluate import evaluate, resize, score
from m3bsr.engine.loader import ShuffledBatches, collate, eval_loader, steps_in_run, train_loader


@pytest.fixture
def parts(tiny):
    return tiny.make_parts(dropout=0.5)


def test_metrics_do_not_depend_on_the_batches_and_the_mode_is_put_back(tiny, parts):
    model, tasks, _, val_set, *_ = parts
    found = [evaluate(model, tasks, eval_loader(val_set, batch_size=n), progress=False) for n in (1, 3, 4)]
    assert found[0].protocol == "network" and found[0].num_images == 4 and model.training
    for other in found[1:]:
        for task, values in found[0].items():
            assert other[task] == pytest.approx(values, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="no labels for edge"):
        evaluate(model, {**tasks, "edge": tasks["depth"]}, eval_loader(val_set, batch_size=4), progress=False)
    assert model.training  # also after an error


def test_metrics_are_those_of_the_task(tiny, parts):
    model, tasks, _, val_set, *_ = parts
    found = evaluate(model, tasks, eval_loader(val_set, batch_size=2), progress=False)
    batch = collate([val_set[i] for i in range(4)])
    model.eval()
    error = model(batch["image"], tasks=("depth",)).predictions["depth"] - batch["depth"]
    assert found["depth"]["rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)


def test_larger_labels_make_the_protocol_original(tiny, parts):
    model, tasks, *_ = parts
    large = tiny.TinySet(4, augment=False, label_size=(16, 24))
    found = evaluate(model, tasks, eval_loader(large, batch_size=2), progress=False)
    assert found.protocol == "original"
    x = torch.rand(1, 2, 4, 4)
    assert resize(x, (4, 4)) is x and resize(x, (8, 6)).shape == (1, 2, 8, 6)


def test_labels_of_different_sizes_in_a_batch(tiny, parts):
    model, tasks, *_ = parts

    class Mixed(tiny.TinySet):
        def __getitem__(self, index):
            return tiny.TinySet(4, augment=False, label_size=(8 + 4 * index, 16))[index]

    whole = evaluate(model, tasks, eval_loader(Mixed(4), batch_size=4), progress=False)
    single = evaluate(model, tasks, eval_loader(Mixed(4), batch_size=1), progress=False)
    assert whole["depth"] == pytest.approx(single["depth"], rel=1e-5) and whole.protocol == "original"


def test_flip_averages_with_the_mirrored_prediction(tiny, parts):
    model, tasks, _, val_set, *_ = parts
    found = evaluate(model, tasks, eval_loader(val_set, batch_size=2), progress=False, flip=True)
    batch = collate([val_set[i] for i in range(4)])
    model.eval()
    straight, mirrored = (
        model(x, tasks=("depth",)).predictions["depth"] for x in (batch["image"], batch["image"].flip(-1))
    )
    assert not torch.allclose(straight, mirrored.flip(-1), atol=1e-3)
    error = (straight + mirrored.flip(-1)) / 2 - batch["depth"]
    assert found["depth"]["rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)


def test_an_empty_set_is_a_user_error(parts):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(*parts[:2], [], progress=False)


def test_score_counts_relative_gains_alike_and_skips_undefined_ones(parts):
    tasks = parts[1]

    def of(rmse, miou):
        return score({"depth": {"rmse": rmse}, "semseg": {"miou": miou}}, tasks)

    assert of(1.0, 0.2) < of(0.9, 0.2) < of(0.9, 0.25)
    assert of(1 / 1.1, 0.2) == pytest.approx(of(1.0, 0.22))
    assert of(math.nan, 0.2) == pytest.approx(math.log(0.2)) and of(math.nan, math.nan) == -math.inf
    assert math.isfinite(of(0.0, 0.0))


def test_batches_start_anywhere_and_cover_each_epoch_once():
    def batches(start, stop):
        return list(ShuffledBatches(10, 3, batches_per_epoch=3, seed=1, start=start, stop=stop))

    whole = batches(0, 9)
    assert batches(4, 9) == whole[4:]
    epochs = [[i for batch in whole[e : e + 3] for i, _ in batch] for e in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    seeds = [seed for batch in whole for _, seed in batch]
    assert len(set(seeds)) == 27
    assert len(ShuffledBatches(10, 3, batches_per_epoch=3, seed=1, start=4, stop=9)) == 5


def test_loading_leaves_the_global_generator_alone_and_augments_anew_each_epoch(tiny):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = train_loader(tiny.TinySet(), batch_size=4, start_step=0, stop_step=6, seed=0)
    images = {}
    for number, batch in enumerate(loader):
        for index, image in zip(batch["index"], batch["image"], strict=True):
            images[number // 3, index] = image
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not torch.equal(images[0, i], images[1, i]) for i in range(12))


def test_steps_in_run():
    assert steps_in_run(13, epochs=2, batch_size=2, accumulate=3) == 4
    assert steps_in_run(13, epochs=2, batch_size=2, max_steps=5) == 5
    assert steps_in_run(13, epochs=2, batch_size=2, max_steps=50) == 12
