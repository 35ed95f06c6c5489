"""Config fields on the command line, and their errors: one line that names the field."""

from __future__ import annotations

import dataclasses

import pytest

from m3bsr.cli.options import parse_cli
from m3bsr.config import Config, load_config, replace

# The names that users' commands rely on.
OPTIONS = """
--data.name --data.root --data.tasks --data.image-size --model.backbone --model.weights --model.head --moe.blocks
--moe.num-experts --moe.top-k --bsr.train-blocks --bsr.train-experts --bsr.drop-blocks --bsr.keep-rate --bsr.fuse
--bsr.score-source --bsr.restore --train.epochs --train.max-steps --train.batch-size --train.precision --optim.name
--optim.lr --run.dir --run.seed
"""


def cli(path: str, line: str) -> Config:
    return parse_cli([path, *line.split()], "Test.")[0]


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("", {}),
        ("--bsr.keep-rate 0.7", {"bsr.keep_rate": 0.7}),
        ("--bsr.keep_rate=0.7", {"bsr.keep_rate": 0.7}),
        ("--bsr.drop-blocks 3 6 --bsr.keep-rate 0.5 0.7", {"bsr.drop_blocks": (3, 6), "bsr.keep_rate": (0.5, 0.7)}),
        ("--bsr.train-blocks 3 7 11", {"bsr.train_blocks": (3, 7, 11)}),
        ("--bsr.train-blocks all", {"bsr.train_blocks": "all"}),
        ("--bsr.train-blocks", {"bsr.train_blocks": ()}),
        ("--bsr.train-experts top:2", {"bsr.train_experts": "top:2"}),
        ("--moe.blocks", {"moe.blocks": ()}),
        ("--moe.blocks None", {"moe.blocks": None}),
        ("--moe.num-experts 12", {"moe.num_experts": 12}),
        ("--moe.blocks 1 3 --moe.num-experts 8 5", {"moe.blocks": (1, 3), "moe.num_experts": (8, 5)}),
        (
            "--moe.experts-per-task 6 --moe.gate-input before --moe.task-dim 8",
            {"moe.experts_per_task": 6, "moe.gate_input": "before", "moe.task_dim": 8},
        ),
        ("--data.image-size 240 320 --data.tasks depth", {"data.image_size": (240, 320), "data.tasks": ("depth",)}),
        ("--loss.weights semseg 1 depth 2", {"loss.weights": {"semseg": 1.0, "depth": 2.0}}),
        ("--run.resume --train.max-steps 5", {"run.resume": True, "train.max_steps": 5}),
    ],
)
def test_the_command_line_overrides_fields(config_file, line, changes):
    path = config_file("config = Config(bsr=Plan(fuse='mean'))")
    assert cli(path, line) == replace(load_config(path), changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bsr.keep-rte 0.5", "--bsr.keep-rte, 0.5; did you mean --bsr.keep-rate"),
        ("--bsr.keep-rate -0.5", "bsr.keep_rate must lie in (0, 1], got -0.5"),
        ("--train.batch-size 0", "train.batch_size must be a positive integer, got 0"),
        ("--train.batch-size x", "--train.batch-size must be an integer; got 'x'"),
        (
            "--train.precision bf61",
            "--train.precision must be one of 'fp32', 'bf16', 'fp16', got 'bf61'; did you mean 'bf16'",
        ),
        ("--bsr.train-blocks a", "--bsr.train-blocks must be 'all' or a tuple of integers; got ['a']"),
        ("--loss.weights semseg", "--loss.weights must be pairs of a task and a number"),
        ("--data.image-size 240", "--data.image-size"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_field(config_file, line, message):
    with pytest.raises(ValueError) as caught:
        cli(config_file("config = Config()"), line)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_config_file():
    with pytest.raises(ValueError, match="the first argument must be a config file"):
        parse_cli(["--bsr.keep-rate", "0.5"], "Test.")


def test_help_shows_every_field_without_a_config_file_and_the_values_of_one(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(["--help"], "Train a thing.")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Train a thing." in text
    every = {
        f"--{section.name}.{field.name}".replace("_", "-")
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.default_factory)
    }
    assert set(OPTIONS.split()) <= every
    assert {option for option in every if option not in text} == set()
    with pytest.raises(SystemExit):
        parse_cli([config_file("config = Config(bsr=Plan(keep_rate=0.375))"), "--help"], "Train a thing.")
    assert "0.375" in capsys.readouterr().out
