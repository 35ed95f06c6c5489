"""``train.compile`` through the real command line."""

from __future__ import annotations

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.cli import train as train_module
from m3bsr.cli.evaluate import main as evaluate
from m3bsr.cli.train import main as train

SMALL = ["--model.backbone", "test_vit", "--bsr.train-blocks", "3", "5", "--bsr.drop-blocks", "2"]
SMALL += ["--moe.blocks", "4", "--train.compile"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--train.parallel", "fsdp"], "train.compile: not with train.parallel fsdp"),
        (["--loss.conflict", "pcgrad"], "train.compile: not with loss.conflict pcgrad"),
        (["--bsr.recompute", "both"], "train.compile: not with bsr.recompute both"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(job, capsys, options, expected):
    assert train([job.config, *SMALL, *options]) == 2
    assert re.search(rf"^error: .*{expected}[^\n]*\n\Z", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # one C++ compilation per shape, 5 minutes and more on a busy machine
def test_a_compiled_run_trains_as_another_and_resumes_to_the_same_bits(job, tmp_path, monkeypatch):
    """Both have the same keys; without random numbers in the blocks, which compiled code draws otherwise."""
    options = [*SMALL, "--model.drop-path", "0", "--moe.noise-std", "0"]
    assert train([job.config, *options]) == 0
    assert json.loads((job.run / "cost.json").read_text())["train_step_gmacs"] > 0
    assert evaluate([str(job.run)]) == 0
    torch.compiler.reset()
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert train([job.config, *options, "--train.no-compile", "--run.dir", str(plain)]) == 0
    runs = [load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (job.run, plain)]
    assert list(runs[0]) == list(runs[1])
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    build_model = train_module.build_model

    def stopping(config):
        model = build_model(config)
        model.set_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None
        return model

    monkeypatch.setattr(train_module, "build_model", stopping)
    assert train([job.config, *options, "--run.dir", str(other)]) == 143
    monkeypatch.undo()
    torch.compiler.reset()
    assert train([job.config, *options, "--run.dir", str(other), "--run.resume"]) == 0
    again = (other / "checkpoints" / "last" / "model.safetensors").read_bytes()
    assert again == (job.run / "checkpoints" / "last" / "model.safetensors").read_bytes()
