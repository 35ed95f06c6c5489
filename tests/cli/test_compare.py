"""Two methods, two seeds: interrupted, gone on with, put side by side; then the run folders once more by themselves."""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from m3bsr.cli import compare, compare_runs
from m3bsr.cli import train as train_module
from m3bsr.report.spread import Spread

CONFIG = """
from m3bsr.config import Config, DataConfig, ModelConfig, OptimConfig, Plan, TrainConfig

config = Config(
    data=DataConfig(name="image_folder", root={root!r}, tasks=("classification",), image_size=(32, 32),
                    augment="flip", num_workers=0),
    model=ModelConfig(backbone="test_vit"),
    bsr=Plan(train_blocks=(3, 5), drop_blocks=(2,), keep_rate=0.5),
    train=TrainConfig(epochs=2, batch_size=4, eval_batch_size=5, log_every=1),
    optim=OptimConfig(lr=1e-3, head_lr_scale=5.0),
)
"""


@pytest.fixture(scope="module")
def config(draw_colours, tmp_path_factory) -> str:
    """A config file of runs of 4 steps on two colours."""
    root = draw_colours(tmp_path_factory.mktemp("colours"), train=4, val=2)
    path = root / "tiny.py"
    path.write_text(CONFIG.format(root=str(root)))
    return str(path)


@pytest.fixture(scope="module")
def compared(config, tmp_path_factory) -> Path:
    """The folder of a comparison that was stopped in its second run and started again."""
    out, built = tmp_path_factory.mktemp("out") / "compare", []
    argv = [config, "--methods", "full,head", "--variant", "bsr.7=--bsr.keep-rate .7 --train.clip-norm 1.0"]
    argv += ["--seeds", "2", "--out", str(out), "--rounds", "1", "--pictures", "1", "--train.log-every", "2"]
    with pytest.MonkeyPatch.context() as patch:
        build_model = train_module.build_model

        def stopping(config):
            built.append(build_model(config))
            if len(built) == 2:
                built[-1].set_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None
            return built[-1]

        patch.setattr(train_module, "build_model", stopping)
        assert compare.main(argv) == 143
    assert (out / "full-s0" / "result.json").exists() and not (out / "head-s0" / "result.json").exists()
    first = (out / "full-s0" / "result.json").stat().st_mtime_ns
    assert compare.main(argv) == 0
    assert (out / "full-s0" / "result.json").stat().st_mtime_ns == first, "a finished run was trained again"
    return out


def test_every_run_is_an_ordinary_run_and_the_stopped_one_was_resumed(compared) -> None:
    runs = sorted(path.name for path in compared.iterdir() if path.is_dir())
    assert runs == ["bsr.7-s0", "bsr.7-s1", "full-s0", "full-s1", "head-s0", "head-s1"]
    results = {run: json.loads((compared / run / "result.json").read_text()) for run in runs}
    assert {r["step"] for r in results.values()} == {4}
    assert results["head-s0"]["step_ms"]["num"] == 1 and results["head-s1"]["step_ms"]["num"] == 4
    configs = {run: json.loads((compared / run / "config.json").read_text()) for run in runs}
    assert configs["bsr.7-s1"]["bsr"]["keep_rate"] == 0.7 and configs["bsr.7-s1"]["model"]["method"] == "bsr"
    assert configs["head-s1"]["model"]["method"] == "head" and configs["head-s1"]["run"]["seed"] == 1
    assert all(config["train"]["log_every"] == 2 for config in configs.values())


def test_tables_have_means_spreads_and_shares(compared) -> None:
    with (compared / "table.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["full", "head", "bsr.7"]
    assert all(row["seeds"] == "2" for row in rows.values())
    assert float(rows["full"]["step_ratio"]) == 1.0 and float(rows["full"]["delta_m"]) == pytest.approx(0, abs=1e-9)
    data = json.loads((compared / "table.json").read_text())
    assert data["reference"] == "full" and len(data["runs"]["head"]) == 2
    for name, row in data["rows"].items():
        top1 = row["classification top1"]
        truth = [json.loads((Path(run) / "result.json").read_text()) for run in data["runs"][name]]
        assert top1["values"] == [r["metrics"]["classification"]["top1"] for r in truth]
        assert top1["mean"] == pytest.approx(np.mean(top1["values"])) and top1["mean"] == float(
            rows[name]["classification top1"]
        )
        assert top1["std"] == pytest.approx(np.std(top1["values"], ddof=1))
    for cost in ("measured_peak_mb", "saved_mb", "trainable_m", "train_step_gmacs"):
        head, bsr, full = (data["rows"][name][cost]["mean"] for name in ("head", "bsr.7", "full"))
        assert head < bsr < full, cost


def test_page_and_charts(compared) -> None:
    text = (compared / "report.html").read_text()
    assert "Methods on tiny" in text and "<th>front (M T G)" in text and "test_vit on image_folder at 32 x 32" in text
    assert text.count('aria-label="classification top1 against') == 3
    assert re.search(r"<th[^>]*>bsr\.7</th>", text), "answers of every run for the same photographs"
    assert "Tokens kept" in text and "Experts chosen" not in text
    svg = (compared / "pareto-memory.svg").read_text()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and ">bsr.7</text>" in svg


def test_run_folders_alone_give_the_same_table(compared, tmp_path, capsys) -> None:
    runs = [str(path) for path in sorted(compared.glob("*-s*"))]
    out = tmp_path / "again"
    assert compare_runs.main([*runs, "--out", str(out), "--rounds", "0", "--pictures", "0"]) == 0
    assert "bsr.7" in capsys.readouterr().out
    first, again = (json.loads((folder / "table.json").read_text())["rows"] for folder in (compared, out))
    assert again.keys() == first.keys()
    for name in first:
        assert again[name]["classification top1"] == first[name]["classification top1"]
        assert again[name]["delta_m"] == first[name]["delta_m"]
    assert compare_runs.main([*runs, "--out", str(out), "--rounds", "0", "--pictures", "0", "--each"]) == 0
    assert len(json.loads((out / "table.json").read_text())["rows"]) == 6


def test_other_options_do_not_mix_with_what_is_there(compared, config, capsys) -> None:
    argv = [config, "--methods", "full", "--out", str(compared), "--train.log-every", "2"]
    assert compare.main([*argv, "--train.epochs", "3"]) == 2
    err = capsys.readouterr().err
    assert "full-s0 was trained with train.epochs = 2, full now has 3" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "full,hed"], "unknown model.method 'hed' (did you mean 'head'?)"),
        (["--methods", "full,full"], "names one twice"),
        ([], "nothing to compare"),
        (["--variant", "a b=--bsr.keep-rate .7"], "--variant takes NAME='OPTIONS'"),
        (["--variant", "a=--bsr.keep-rat .7"], "did you mean --bsr.eval-keep-rate or --bsr.keep-rate?"),
        (["--methods", "full", "--lr", "lora=1e-3"], "--lr takes NAME=VALUE of full"),
        (["--methods", "full", "--seeds", "0"], "--seeds must be"),
        (["--methods", "last:9"], "last:9: the model has 6 blocks"),
        (["--methods", "full", "--data.root", "no/where"], "no/where"),
    ],
)
def test_errors_come_before_any_training(config, tmp_path, capsys, options, message) -> None:
    assert compare.main([config, "--out", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and err.count("\n") == 0 and not (tmp_path / "out").exists()


def test_learning_rates(config, tmp_path) -> None:
    def made(*options):
        args, rest = compare._parser().parse_known_args([config, *options])
        return {v.name: v.config.optim for v in compare.make_variants(args, rest)}

    optims = made("--methods", "full,bitfit,adapter", "--lr", "adapter=4e-3", "--variant", "own=--optim.lr 7e-3")
    assert optims["full"].lr == 1e-3 and optims["bitfit"].lr == pytest.approx(1e-2)
    assert optims["adapter"].lr == 4e-3 and optims["own"].lr == 7e-3
    heads = {name: o.lr * o.head_lr_scale for name, o in optims.items()}
    assert heads["full"] == heads["bitfit"] == pytest.approx(heads["adapter"]) == pytest.approx(5e-3)


def test_a_spread_is_a_number() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert spread == 2.0 and spread.spread == 1.0 and Spread.of([4.0]).spread == 0.0
