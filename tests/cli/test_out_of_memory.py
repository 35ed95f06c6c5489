"""Out of memory ends with one line that names a plan that fits, and the command."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import torch

from m3bsr.cli import train
from m3bsr.cli.common import one_line_errors
from m3bsr.cli.options import parse_cli
from m3bsr.cli.out_of_memory import USABLE, advice, without_options
from m3bsr.cli.plan import PredictedCosts, empty_job
from m3bsr.config import load_config, replace
from m3bsr.utils import memory

GB = 2**30
CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(CPU_ERROR), MemoryError()],
    ids=["cuda", "cpu", "python"],
)
def test_allocators_are_known(error):
    assert memory.is_out_of_memory(error) and not memory.is_out_of_memory(RuntimeError("shape mismatch"))


def test_one_line_and_a_code_of_its_own(job, capsys, monkeypatch):
    def run(config):
        raise RuntimeError(f"{CPU_ERROR} allocate\nstack of C++")

    monkeypatch.setattr(train, "run", run)
    assert train.main([job.config]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: out of memory: ") and "stack" not in lines[0]
    assert "the same plan in batches of 1 is predicted to need 0.0" in lines[0]
    assert f"tools/train.py {job.config} --train.batch-size 1 --train.accumulate 2" in lines[0]


def test_other_commands_say_it_in_a_line_too(capsys):
    @one_line_errors
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    assert main([]) == 4
    error = capsys.readouterr().err
    assert (
        error.startswith("error: out of memory: CUDA out of memory. Tried to allocate 2 GiB; ")
        and error.count("\n") == 1
    )


def test_other_errors_are_not_taken_for_it(job, monkeypatch):
    def run(config):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train.main([job.config])


@pytest.mark.slow
def test_what_is_named_fits_as_predicted_and_is_a_command(job):
    every_block = ["--bsr.train-blocks", "all", "--bsr.drop-blocks", "--train.batch-size"]
    for argv in ([job.config, "--train.batch-size", "8"], [job.config, *every_block, "1"]):
        argv += ["--optim.lr", "0.5", "--run.overwrite"]
        config, _ = parse_cli(argv, "")
        own, size = PredictedCosts(empty_job(config)), config.train.batch_size
        memory_bytes = int((own.at(2)(config.bsr)[1] + 1) / USABLE) if size > 1 else own(config.bsr)[1]
        line = advice(config, argv, memory_bytes)
        again, _ = parse_cli(shlex.split(line.partition("tools/train.py ")[2]), "")
        assert PredictedCosts(empty_job(again))(again.bsr)[1] <= memory_bytes
        assert again.train.batch_size * again.train.accumulate == size and again.train.batch_size == min(size, 2)
        assert again.optim.lr == 0.5 and not again.run.overwrite
        assert (again.bsr == config.bsr) == (size > 1)


@pytest.mark.slow
def test_nothing_fits_is_said(job):
    line = advice(load_config(job.config), [job.config], 2**20)
    assert line.startswith("no plan is known to fit 0.00 GB") and "data.image_size" in line


@pytest.mark.slow
def test_other_methods_are_answered_with_a_plan(job):
    config = replace(load_config(job.config), {"model.method": "full"})
    line = advice(config, [job.config, "--model.method", "full"], GB)
    assert "--bsr.train-blocks" in line and line.count("--model.method") == 1 and "--model.method bsr" in line


def test_a_run_with_a_checkpoint_goes_on_from_its_weights_in_another_folder(job):
    (job.run / "checkpoints" / "last").mkdir(parents=True)
    line = advice(load_config(job.config), [job.config, "--run.resume"], GB)
    assert f"--run.dir {job.run}-smaller --model.weights {job.run}/checkpoints/last/model.safetensors" in line
    assert "--run.resume" not in line


def test_options_are_taken_out_with_their_values():
    argv = ["c.py", "--bsr.train-blocks", "1", "2", "--train.batch-size=3", "--run.resume", "--optim.lr", "1"]
    assert without_options(argv, {"bsr.train_blocks", "train.batch_size", "run.resume"}) == ["c.py", "--optim.lr", "1"]


def test_free_memory_is_the_least_of_the_limits(monkeypatch):
    assert 2**20 < memory.free_bytes(torch.device("cpu")) < 2**50
    monkeypatch.setattr(memory, "_cgroup_left", lambda: 5)
    assert memory.free_bytes(torch.device("cpu")) == 5
    for name in ("_available", "_cgroup_left", "_address_space_left"):
        monkeypatch.setattr(memory, name, lambda: None)
    assert memory.free_bytes(torch.device("cpu")) is None


def test_control_groups_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory._cgroup_left() is None
    (tmp_path / "memory.max").write_text("1000\n"), (tmp_path / "memory.current").write_text("300\n")
    assert memory._cgroup_left() == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_left() is None


LIMITED = """
import resource, sys
from m3bsr.cli import train
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]),) * 2)
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_real_lack_of_memory_and_the_command_that_was_named(job):
    """Under ``ulimit -v`` a large batch fails for real, and the command of the message trains under the same limit."""

    def limited(megabytes, *argv):
        command = [sys.executable, "-c", LIMITED, str(megabytes << 20), *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=400)

    shape = ["--data.image-size", "224", "224", "--train.max-steps", "1", "--train.batch-size", "4"]
    for megabytes in (400, 300, 225):  # how much a step takes depends on PyTorch's version
        failed = limited(megabytes, job.config, *shape, "--run.overwrite")
        if failed.returncode:
            break
    assert failed.returncode == 4, failed.stderr[-2000:]
    line = failed.stderr.strip().splitlines()[-1]
    assert re.search("out of memory: .*(can't allocate|not enough) memory.*is predicted to need", line), line
    done = limited(megabytes, *shlex.split(line.partition("tools/train.py ")[2]))
    assert done.returncode == 0, done.stderr[-2000:]
