from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest
import torch

from m3bsr.engine import NonFiniteError, read_log
from m3bsr.engine.checkpoint import load_state, verify_checkpoint
from m3bsr.moe.stats import RoutingCounts


def test_loss_falls_and_frozen_parameters_keep_their_bits(tiny, tmp_path):
    parts = tiny.make_parts(epochs=10)
    before = parts[0].stem.weight.clone()
    model, result = tiny.run(tmp_path, parts=parts, epochs=10)
    losses = [r["loss"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    assert torch.equal(model.stem.weight, before)
    assert model.stem.weight.grad is None and model.stem.weight not in parts[4].state
    assert model.training and model.steps == list(range(40)) and len(result.step_ms) == 40


def test_accumulated_micro_batches_equal_one_large_batch(tiny, tmp_path):
    """Without batch statistics and dropout; the loss of a micro-batch weighs the same whatever is valid in it."""

    def weights_after(batch_size, accumulate):
        shape = {"epochs": 1, "batch_size": batch_size, "accumulate": accumulate}
        parts = tiny.make_parts(**shape, dropout=0.0)
        parts[0].trunk[1] = torch.nn.Identity()
        parts = (*parts[:4], *tiny.make_parts(**shape)[4:])
        optimizer = torch.optim.SGD([p for p in parts[0].parameters() if p.requires_grad], lr=0.1)
        scheduler = tiny.make_schedule("poly", optimizer, total_steps=2)
        run_dir = tmp_path / f"{batch_size}x{accumulate}"
        tiny.run(run_dir, parts=(*parts[:4], optimizer, scheduler), clip_norm=None, **shape)
        return parts[0].state_dict(), read_log(run_dir / "log.jsonl")

    large, large_log = weights_after(6, 1)
    small, small_log = weights_after(2, 3)
    for name in large:
        torch.testing.assert_close(small[name], large[name], rtol=1e-5, atol=1e-6)
    for one, other in zip(large_log, small_log, strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-4)


def test_first_line_of_the_log_is_the_weighted_sum(tiny, tmp_path):
    tiny.run(tmp_path, epochs=1, loss_weights={"depth": 3.0}, balance_weight=0.5)
    first = read_log(tmp_path / "log.jsonl")[0]
    expected = 3 * first["losses"]["depth"] + first["losses"]["semseg"] + 0.5 * first["balance_loss"]
    assert first["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("accumulate", "log_every"), [(1, 2), (2, 1)])
def test_loss_of_a_task_is_the_mean_over_the_batches_that_have_its_labels(tiny, tmp_path, accumulate, log_every):
    """With one task a batch, in turn, the mean loss is half the sum of both tasks' own."""

    class OneTaskABatch(tiny.TinySet):
        def epoch_batches(self, batch_size, generator):
            return [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]

        def __getitem__(self, index):
            sample = super().__getitem__(index)
            del sample["depth" if index % 2 else "semseg"]
            return sample

    shape = {"epochs": 1, "batch_size": 3, "accumulate": accumulate}
    parts = tiny.make_parts(**shape, train_set=OneTaskABatch())
    tiny.run(tmp_path, parts=parts, **shape, log_every=log_every, balance_weight=0.0)
    records = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    assert len(records) == 2
    for record in records:
        assert sum(record["losses"].values()) == pytest.approx(2 * record["loss"], rel=1e-5)


def test_gradients_are_clipped_but_logged_as_they_were(tiny, tmp_path):
    norms = []
    parts = tiny.make_parts(epochs=1)
    trained = [p for p in parts[0].parameters() if p.requires_grad]
    parts[4].register_step_pre_hook(lambda *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained])))
    tiny.run(tmp_path, parts=parts, epochs=1, clip_norm=0.01)
    logged = [r["grad_norm"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    assert min(logged) > 0.1
    assert all(norm.item() == pytest.approx(0.01, rel=1e-3) for norm in norms)


def test_loss_stride_asks_for_smaller_predictions(tiny, tmp_path):
    parts = tiny.make_parts(epochs=1)
    sizes = []
    parts[0].register_forward_hook(lambda m, args, kwargs, out: sizes.append(kwargs.get("size")), with_kwargs=True)
    tiny.run(tmp_path, parts=parts, epochs=1, loss_stride=3)
    assert sizes == [(3, 3)] * 4 + [None]  # evaluation is at full size


def test_nan_loss_names_task_step_images_and_checkpoint(tiny, tmp_path):
    parts = tiny.make_parts()
    model = parts[0]

    def poison(step):
        if step == 2:
            model.heads["depth"].bias.data.fill_(math.nan)

    model.on_step = poison
    with pytest.raises(NonFiniteError) as error:
        tiny.run(tmp_path, parts=parts, save_every=1)
    message = str(error.value)
    assert message.startswith("step 3: the loss of task depth is nan; images: 0") and message.count(".jpg") == 3
    assert str(tmp_path / "checkpoints" / "last") in message and "\n" not in message
    assert verify_checkpoint(tmp_path / "checkpoints" / "last") == 2
    assert torch.isfinite(model.heads["semseg"].weight).all()  # the step was not taken


def test_nan_gradient_of_a_finite_loss_names_the_task(tiny, tmp_path):
    parts = tiny.make_parts()
    parts[0].heads["semseg"].weight.register_hook(lambda grad: grad * math.inf)
    before = parts[0].heads["depth"].weight.clone()
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient of task semseg \(at heads.semseg.weight\) is not"):
        tiny.run(tmp_path, parts=parts)
    assert torch.equal(parts[0].heads["depth"].weight, before)


def test_best_is_the_best_evaluation_and_last_the_last(tiny, tmp_path):
    parts = tiny.make_parts(epochs=4, lr=0.3)
    parts[0].on_step = lambda step: parts[0].heads["depth"].bias.data.add_(50.0) if step == 12 else None
    _, result = tiny.run(tmp_path, parts=parts, epochs=4)
    evaluations = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "val"]
    assert [r["step"] for r in evaluations] == [4, 8, 12, 16]
    best = result.progress.best_step
    assert best in (4, 8, 12)  # the last epoch was spoilt
    assert verify_checkpoint(tmp_path / "checkpoints" / "best") == best
    assert verify_checkpoint(tmp_path / "checkpoints" / "last") == 16
    saved = load_state(tmp_path / "checkpoints" / "best")["progress"]
    assert saved["metrics"] == evaluations[best // 4 - 1]["metrics"] == result.progress.best_metrics


def test_eval_every_zero_evaluates_once_and_max_steps_ends_early(tiny, tmp_path):
    _, result = tiny.run(tmp_path, epochs=3, max_steps=6, eval_every=0)
    lines = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in lines if r["kind"] == "val"] == [6]
    assert lines[-2]["step"] == 6 and result.progress.total_steps == 6


def test_log_lines_average_their_steps_and_are_json(tiny, tmp_path):
    tiny.run(tmp_path / "each", epochs=1)
    tiny.run(
        tmp_path / "pairs", epochs=1, log_every=2, tensorboard=True, reporter=lambda model, metrics: {"a": PICTURE}
    )
    each = [json.loads(line) for line in (tmp_path / "each" / "log.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in pairs] == [2, 4, 4]
    for name in ("loss", "grad_norm"):
        assert pairs[0][name] == pytest.approx((each[0][name] + each[1][name]) / 2)
    assert {"lr", "samples_per_s", "step_ms", "data_wait", "epoch", "z_loss"} <= pairs[0].keys()
    assert 0 <= pairs[0]["data_wait"] <= 1 and pairs[1]["epoch"] == 1.0
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "pairs")).Reload()
    losses = [(e.step, e.value) for e in board.Scalars("train/losses/depth")]
    assert losses == [(r["step"], pytest.approx(r["losses"]["depth"])) for r in pairs[:2]]
    assert board.Scalars("val/metrics/semseg/miou")[0].step == 4 and len(board.Images("a")) == 1


PICTURE = np.zeros((4, 6, 3), dtype=np.uint8)


def test_log_lines_say_where_tokens_went(tiny, tmp_path):
    def reporter(model, metrics):
        assert metrics.routing["5"]["load"].keys() == {"depth", "semseg"}
        return {"a": PICTURE}

    options = {"epochs": 1, "accumulate": 2, "log_every": 2, "tensorboard": True, "experts": True}
    tiny.run(tmp_path / "a", reporter=reporter, **options)
    records = read_log(tmp_path / "a" / "log.jsonl")
    assert [r["kind"] for r in records] == ["train", "val"]
    for record in records:
        found = record["routing"]["5"]
        assert all(sum(load) == pytest.approx(1, abs=1e-3) and len(load) == 4 for load in found["load"].values())
        assert max(max(load) for load in found["load"].values()) <= 0.5  # a token never takes an expert twice
        assert 0 < found["overlap"]["depth+semseg"] < 1 and 0 < found["entropy"]["depth"] <= 1
    assert records[0]["routing"] != records[1]["routing"]
    assert not any("routing" in name for name in records[0]["losses"])
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "a")).Reload()
    for kind, record in (("train", records[0]), ("val", records[1])):
        (event,) = board.Scalars(f"{kind}/routing/5/entropy/semseg")
        assert event.value == pytest.approx(record["routing"]["5"]["entropy"]["semseg"])
    tiny.run(tmp_path / "b", epochs=1)
    assert not any("routing" in record for record in read_log(tmp_path / "b" / "log.jsonl"))


def test_counting_routes_does_not_wait_for_the_device(tiny, tmp_path, monkeypatch):
    """Between two log lines nothing is read: a GPU would have to be waited for."""
    read = []
    per_task = RoutingCounts.per_task
    monkeypatch.setattr(RoutingCounts, "per_task", lambda self: read.append(1) or per_task(self))
    tiny.run(tmp_path, epochs=2, log_every=4, eval_every=0, experts=True)
    assert len(read) == 3  # two lines and one evaluation, for 8 steps


def test_fp16_without_cuda_and_too_few_images_are_user_errors(tiny, tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        tiny.run(tmp_path, precision="fp16")
    with pytest.raises(ValueError, match=r"2 images, fewer than the 3 of one step .*train.batch_size"):
        tiny.run(tmp_path, parts=(*tiny.make_parts()[:2], tiny.TinySet(2), *tiny.make_parts()[3:]))
    assert not (tmp_path / "log.jsonl").exists()


def test_second_sigint_stops_at_once(tiny, tmp_path):
    parts = tiny.make_parts()

    def twice(step):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    parts[0].on_step = twice
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, parts=parts)
    assert parts[0].steps == [0, 1] and not (tmp_path / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_during_evaluation_is_caught_up_after_resume(tiny, tmp_path):
    class Interrupting(tiny.TinySet):
        def __getitem__(self, index):
            if index == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().__getitem__(index)

    parts = list(tiny.make_parts())
    parts[3] = Interrupting(4, augment=False)
    _, stopped = tiny.run(tmp_path, parts=parts, eval_batch_size=1)
    assert stopped.stopped_by == signal.SIGTERM and stopped.progress.evaluated_step == 0
    assert [r["kind"] for r in read_log(tmp_path / "log.jsonl")] == ["train"] * 4
    model, _ = tiny.run(tmp_path, resume=True)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "val"] == [4, 8]
    assert model.steps == [4, 5, 6, 7]


def test_full_disk_leaves_the_run_going(tiny, tmp_path, monkeypatch, capsys):
    from m3bsr.engine import checkpoint

    real, calls = checkpoint.save_file, []

    def save_file(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    _, result = tiny.run(tmp_path, epochs=1, save_every=1)
    assert result.progress.step == 4
    assert capsys.readouterr().err.count("No space left on device") == 2
    assert verify_checkpoint(tmp_path / "checkpoints" / "last") == 4
