"""The same command with one process or several."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.cli import evaluate, train
from m3bsr.engine import read_log

TOOLS = Path(__file__).parents[2] / "tools"
QUIET = ["--model.drop-path", "0", "--moe.noise-std", "0", "--optim.name", "sgd", "--train.log-every", "1"]


def test_two_processes_train_what_one_does_and_the_first_alone_writes(job, many, capsys, tmp_path):
    argv = [job.config, *QUIET, "--train.batch-size", "1"]
    assert train.main([*argv, "--run.dir", str(tmp_path / "one"), "--train.accumulate", "2"]) == 0
    assert many.run(2, lambda rank: train.main(argv), tmp_path / "two") == [0, 0]
    one, two = (load_file(run / "checkpoints/last/model.safetensors") for run in (tmp_path / "one", job.run))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    assert [r["step"] for r in read_log(job.run / "log.jsonl")] == [
        r["step"] for r in read_log(tmp_path / "one/log.jsonl")
    ]
    results = [json.loads((run / "result.json").read_text()) for run in (tmp_path / "one", job.run)]
    assert [r["num_processes"] for r in results] == [1, 2] and (job.run / "report.html").exists()
    for task, values in results[0]["metrics"].items():
        assert results[1]["metrics"][task] == pytest.approx(values, rel=1e-3), task
    assert "miou" in (tmp_path / "two/output-0.txt").read_text()
    assert (tmp_path / "two/output-1.txt").read_text() == ""


def test_two_processes_that_share_the_experts_out(job, many, tmp_path):
    """The run is that of one process, and its folder can be used like any other, by one process too."""
    argv = [job.config, *QUIET, "--train.batch-size", "1", "--train.max-steps", "2"]
    assert train.main([*argv, "--run.dir", str(tmp_path / "one"), "--train.accumulate", "2"]) == 0
    assert many.run(2, lambda rank: train.main([*argv, "--moe.expert-parallel", "2"]), tmp_path / "two") == [0, 0]
    one, two = (load_file(run / "checkpoints/last/model.safetensors") for run in (tmp_path / "one", job.run))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    assert (job.run / "report.html").exists() and (job.run / "delta.safetensors").exists()
    wanted = json.loads((tmp_path / "one/result.json").read_text())["metrics"]
    assert evaluate.main([str(job.run), "--batch-size", "2"]) == 0
    found = json.loads((job.run / "metrics-last-network.json").read_text())["metrics"]
    for task, values in wanted.items():
        assert found[task] == pytest.approx(values, rel=1e-3), task


def test_too_few_processes_to_share_the_experts_out(job, capsys):
    assert train.main([job.config, "--moe.expert-parallel", "2"]) == 2
    assert "--nproc-per-node 2" in capsys.readouterr().err


def test_a_user_error_is_said_once(job, many, tmp_path):
    pids = many.start(2, lambda rank: train.main([job.config, "--data.root", "no/such/folder"]), tmp_path)
    assert many.wait(pids) == [2, 2]
    said = "".join((tmp_path / f"output-{rank}.txt").read_text() for rank in range(2))
    assert said.count("error: ") == 1 and "no/such/folder" in said
    assert not job.run.exists()


@pytest.mark.slow
def test_torchrun(job, tmp_path):
    """The real launcher: train, and evaluate in three processes what two have trained."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    subprocess.run(
        [*launch, "2", str(TOOLS / "train.py"), job.config, "--train.batch-size", "1"], check=True, timeout=500
    )
    result = json.loads((job.run / "result.json").read_text())
    subprocess.run(
        [*launch, "3", str(TOOLS / "evaluate.py"), str(job.run), "--batch-size", "1"], check=True, timeout=500
    )
    again = json.loads((job.run / "metrics-last-network.json").read_text())
    assert again["num_images"] == 3 and result["num_processes"] == 2
    for task, values in result["metrics"].items():
        assert again["metrics"][task] == pytest.approx(values, rel=1e-5)


@pytest.mark.slow
def test_spread_out_over_two_processes(job, many, tmp_path):
    """What no single process holds whole is evaluated by one that has the room."""
    argv = [job.config, *QUIET, "--train.batch-size", "1", "--train.parallel", "fsdp"]
    assert many.run(2, lambda rank: train.main(argv), tmp_path / "two", timeout_s=400) == [0, 0]
    metrics = json.loads((job.run / "result.json").read_text())["metrics"]
    assert "tools/report.py" in (tmp_path / "two/output-0.txt").read_text()
    assert evaluate.main([str(job.run)]) == 0
    for task, values in json.loads((job.run / "metrics-last-network.json").read_text())["metrics"].items():
        assert metrics[task] == pytest.approx(values, rel=1e-4), task


KILLED_ONCE = """
import os, signal, sys
from m3bsr.cli import train

build_model = train.build_model

def deadly(config):
    model = build_model(config)
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
    model.set_step = lambda step: os.kill(os.getpid(), signal.SIGKILL) if first_time and step == 2 else None
    return model

train.build_model = deadly
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed(job, tmp_path):
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    options = ["--train.batch-size", "1", "--train.save-every", "1", "--run.resume"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "--max-restarts", "1", str(script), job.config, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error: process 1 of 2 ended or does not answer" in done.stderr
    assert "going on from" in done.stderr and "after step 2" in done.stderr
    assert [r["step"] for r in read_log(job.run / "log.jsonl") if r["kind"] == "train"] == [1, 2, 3, 4]


@pytest.mark.slow
def test_torchrun_with_shared_out_experts_goes_on_without(job, tmp_path):
    """Half of a run with shares of the experts, half without, is the whole run of one process."""
    constant = ["--optim.schedule", "poly", "--optim.poly-power", "1e-9"]  # however long a half is
    argv = [job.config, *QUIET, *constant, "--train.batch-size", "1"]
    assert train.main([*argv, "--run.dir", str(tmp_path / "one"), "--train.accumulate", "2"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(TOOLS / "train.py"), *argv]
    halves = (["--moe.expert-parallel", "2", "--train.max-steps", "2"], ["--run.resume"])
    for half in halves:
        subprocess.run([*command, *half], check=True, timeout=500)
    one, two = (load_file(run / "checkpoints/last/model.safetensors") for run in (tmp_path / "one", job.run))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
