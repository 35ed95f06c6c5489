"""The commands from end to end: a small M3ViT with BSR on a few pictures."""

from __future__ import annotations

import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3bsr.cli import evaluate, extract_task, train
from m3bsr.cli.common import one_line_errors
from m3bsr.engine import read_log

TOOLS = Path(__file__).parents[2] / "tools"


def error_of(capsys, main, argv):
    """The message of a command that fails for the user's fault: one line (besides what was found out), exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and ": packaging " not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_train_then_evaluate_from_the_checkpoint_alone(job, capsys, tmp_path):
    assert train.main([job.config]) == 0
    result = json.loads((job.run / "result.json").read_text())
    assert result["step"] == 4 and result["step_ms"]["num"] == 4
    assert 0 < result["parameters"]["trained"] < result["parameters"]["total"]
    cost = json.loads((job.run / "cost.json").read_text())
    assert result["peak_memory"]["process_bytes"] > cost["measured_peak_bytes"] > 1e7
    assert cost["trainable_params"] == result["parameters"]["trained"]
    assert "<h2" in (job.run / "report.html").read_text()
    assert "miou" in capsys.readouterr().out
    assert json.loads((job.run / "config.json").read_text())["bsr"]["keep_rate"] == 0.5

    Path(job.config).unlink()
    assert evaluate.main([str(job.run)]) == 0
    again = json.loads((job.run / "metrics-last-network.json").read_text())
    assert again["num_images"] == 3 and again["protocol"] == "network"
    for task, values in result["metrics"].items():
        assert again["metrics"][task] == pytest.approx(values, rel=1e-5)

    assert evaluate.main([str(job.run), "--protocol", "original", "--tasks", "depth", "--max-val", "2"]) == 0
    original = json.loads((job.run / "metrics-last-original-depth-first2.json").read_text())
    assert not (job.run / "metrics-last-original.json").exists()  # a part is not the whole
    assert list(original["metrics"]) == ["depth"] and original["num_images"] == 2
    assert original["metrics"]["depth"]["rmse"] != again["metrics"]["depth"]["rmse"]

    message = error_of(capsys, evaluate.main, [str(job.run), "--tasks", "dept"])
    assert "depth" in message
    message = error_of(capsys, evaluate.main, [str(job.run), "--root", str(tmp_path / "gone")])
    assert "gone" in message


def stop_in_step(monkeypatch, at):
    """The next run gets a SIGTERM in its step ``at`` (0-based)."""
    build_model = train.build_model

    def stopping(config):
        model = build_model(config)
        model.set_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == at else None
        return model

    monkeypatch.setattr(train, "build_model", stopping)


def test_a_stopped_run_resumes_to_the_same_bits(job, capsys, monkeypatch, tmp_path):
    """With everything random in it: augmentation, gate noise, stochastic depth."""
    assert train.main([job.config, "--run.dir", str(tmp_path / "whole")]) == 0
    stop_in_step(monkeypatch, 2)
    assert train.main([job.config]) == 143
    out = capsys.readouterr().out
    assert "stopped by SIGTERM after step 3 of 4" in out and str(job.run / "checkpoints" / "last") in out
    assert not (job.run / "result.json").exists()
    monkeypatch.undo()

    message = error_of(capsys, train.main, [job.config])
    assert "already holds a run" in message and "--run.resume" in message
    message = error_of(capsys, train.main, [job.config, "--run.resume", "--optim.lr", "0.5"])
    assert "optim.lr = 0.001, now it is 0.5" in message

    assert train.main([job.config, "--run.resume", "--data.num-workers", "1"]) == 0
    whole, parted = (load_file(run / "checkpoints/last/model.safetensors") for run in (tmp_path / "whole", job.run))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    kinds = [(record["kind"], record["step"]) for record in read_log(job.run / "log.jsonl")]
    assert kinds == [("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4)]

    assert train.main([job.config, "--run.overwrite", "--train.max-steps", "1"]) == 0
    assert json.loads((job.run / "result.json").read_text())["step"] == 1
    assert [record["step"] for record in read_log(job.run / "log.jsonl")] == [1, 1]


def test_refinement_resumes_to_the_same_bits_and_leaves_what_is_extracted(job, monkeypatch, tmp_path):
    """Weights that only training uses are in the checkpoint, and in no model of one task."""
    argv = [job.config, "--model.refine-dim", "8", "--model.head", "multilevel", "--train.max-steps", "3"]
    assert train.main([*argv, "--run.dir", str(tmp_path / "whole")]) == 0
    stop_in_step(monkeypatch, 1)
    assert train.main(argv) == 143
    monkeypatch.undo()
    assert train.main([*argv, "--run.resume"]) == 0
    whole, parted = (load_file(run / "checkpoints/last/model.safetensors") for run in (tmp_path / "whole", job.run))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    assert any(name.startswith("refinement.") for name in whole)
    lines = [record for record in read_log(job.run / "log.jsonl") if record["kind"] == "train"]
    assert all(record["auxiliary_loss"] > 0 for record in lines)
    assert evaluate.main([str(job.run), "--max-val", "2"]) == 0
    assert extract_task.main([str(job.run), "--task", "depth", "--max-val", "2"]) == 0
    alone = load_file(job.run.with_name("run-depth") / "checkpoints/last/model.safetensors")
    assert not any(name.startswith("refinement.") for name in alone)


def test_a_damaged_checkpoint_is_named_and_a_whole_one_used(job, capsys):
    assert train.main([job.config, "--train.max-steps", "3"]) == 0
    weights = job.run / "checkpoints" / "last" / "model.safetensors"
    tensors = load_file(weights)
    tensors["heads.depth.extra"] = torch.zeros(1)
    save_file(tensors, weights)
    capsys.readouterr()
    assert evaluate.main([str(job.run)]) == 0
    done = capsys.readouterr()
    assert "model.safetensors does not have its checksum" in done.err
    assert str(job.run / "checkpoints" / "last") not in done.out
    message = error_of(capsys, evaluate.main, [str(weights.parent)])
    assert "checksum" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--bsr.keep-rate", "-0.5"], "keep_rate"),
        (["--data.tasks", "semsge"], "semseg"),
        (["--data.tasks", "normals"], "normals"),
        (["--data.root", "no/such/folder"], "no/such/folder"),
        (["--model.weights", "no/such.safetensors"], "no/such.safetensors"),
        (["--train.batch-size", "50"], "train.batch_size"),
        (["--train.precision", "fp16"], "fp16 needs a CUDA device"),
        (["--optim.warmup-steps", "9"], "optim.warmup_steps"),
        (["--loss.conflict", "pcgrd"], "unknown loss.conflict 'pcgrd' (did you mean 'pcgrad'?)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_user_errors_are_one_line_and_leave_no_run_behind(job, capsys, options, expected):
    assert expected in error_of(capsys, train.main, [job.config, *options])
    assert not (job.run / "checkpoints").exists() and not (job.run / "result.json").exists()
    assert not (job.run / "log.jsonl").exists()


def test_evaluate_says_what_is_missing(tmp_path, capsys):
    assert "no such run folder" in error_of(capsys, evaluate.main, [str(tmp_path / "none")])
    assert "holds no checkpoint" in error_of(capsys, evaluate.main, [str(tmp_path)])


def test_an_error_in_a_loader_worker_is_one_line_too(capsys):
    @one_line_errors
    def main(argv):
        raise ValueError(
            "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback:\n  f\nValueError: a.jpg: bad"
        )

    assert error_of(capsys, main, []) == "error: a.jpg: bad"


@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_tools_call_the_command(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: no such")


def test_top_n_experts_are_counted_trained_and_kept_on_resume(job):
    argv = [job.config, "--bsr.train-experts", "top:1", "--train.max-steps", "2"]
    assert train.main(argv) == 0
    chosen = json.loads((job.run / "config.json").read_text())["bsr"]["train_experts"]
    assert chosen and all(len(experts) == 1 for experts in chosen)
    assert train.main([*argv[:-1], "3", "--run.resume"]) == 0
    assert json.loads((job.run / "config.json").read_text())["bsr"]["train_experts"] == chosen


def test_conflict_methods_train_experts_and_frozen_blocks(job):
    """Accumulated, with experts, task gates, frozen blocks and a frozen prefix; the same twice."""
    pytest.importorskip("torchjd", reason="TorchJD is not installed: pip install 'm3bsr[mtl]'")
    argv = [job.config, "--loss.conflict", "pcgrad", "--train.batch-size", "1", "--train.accumulate", "2"]
    assert train.main([*argv, "--train.max-steps", "2"]) == 0
    assert train.main([*argv, "--train.max-steps", "2", "--run.dir", str(job.run.with_name("again"))]) == 0
    first, again = (load_file(d / "checkpoints/last/model.safetensors") for d in (job.run, job.run.with_name("again")))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert json.loads((job.run / "config.json").read_text())["loss"]["conflict"] == "pcgrad"
