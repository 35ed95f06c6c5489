"""Config files and their errors: one line that names the field."""

from __future__ import annotations

import json
import math

import pytest

from m3bsr.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Plan,
    RunConfig,
    TrainConfig,
    load_config,
    replace,
)

FULL = Config(
    data=DataConfig(tasks=("depth",), image_size=(32, 48), max_train=4),
    moe=MoEConfig(blocks=()),
    bsr=Plan(train_blocks=(3,), train_experts=((1, 2), (0,)), drop_blocks=(3, 6), keep_rate=(0.5, 0.7)),
    loss=LossConfig(weights={"depth": 2.0}),
    optim=OptimConfig(betas=(0.8, 0.9)),
)

BAD = [
    (TrainConfig, {"batch_size": 0}, "train.batch_size must be a positive integer, got 0"),
    (TrainConfig, {"batch_size": 2.5}, "train.batch_size must be an integer, got 2.5"),
    (TrainConfig, {"epochs": True}, "train.epochs must be an integer, got True"),
    (TrainConfig, {"max_steps": -1}, "train.max_steps must be a positive integer, got -1"),
    (
        TrainConfig,
        {"precision": "bf61"},
        "train.precision must be one of 'fp32', 'bf16', 'fp16', got 'bf61'; did you mean",
    ),
    (OptimConfig, {"lr": math.nan}, "optim.lr must be a finite number, got nan"),
    (OptimConfig, {"lr": -1.0}, "optim.lr must be positive, got -1.0"),
    (OptimConfig, {"betas": (0.9, 1.0)}, "optim.betas must lie in [0, 1)"),
    (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay must not be negative"),
    (OptimConfig, {"name": "adam"}, "optim.name must be one of 'adamw', 'sgd', got 'adam'; did you mean 'adamw'?"),
    (DataConfig, {"tasks": "depth"}, "data.tasks must be a tuple of strings, got 'depth'"),
    (DataConfig, {"tasks": ()}, "data.tasks must name at least one task"),
    (DataConfig, {"tasks": ("depth", "depth")}, "each once"),
    (DataConfig, {"image_size": (480,)}, "data.image_size must be a tuple of 2 integers"),
    (DataConfig, {"image_size": (0, 32)}, "data.image_size must be positive, got (0, 32)"),
    (DataConfig, {"num_workers": -1}, "data.num_workers must not be negative"),
    (ModelConfig, {"drop_path": 1.0}, "model.drop_path must lie in [0, 1)"),
    (ModelConfig, {"backbone": None}, "model.backbone must be a string, got None"),
    (MoEConfig, {"top_k": 5, "num_experts": 4}, "moe.top_k 5 is more than moe.num_experts 4"),
    (MoEConfig, {"top_k": 5, "num_experts": (8, 4)}, "moe.top_k 5 is more than moe.num_experts (8, 4)"),
    (MoEConfig, {"num_experts": (8, 4, 0)}, "moe.num_experts must be positive"),
    (
        MoEConfig,
        {"num_experts": (8, 4), "expert_parallel": 8},
        "moe.expert_parallel 8 must divide moe.num_experts (8, 4)",
    ),
    (MoEConfig, {"expert_parallel": 0}, "moe.expert_parallel must be a positive integer, got 0"),
    (MoEConfig, {"num_experts": (8, 8), "blocks": (3,)}, "must hold one number for each of moe.blocks"),
    (
        MoEConfig,
        {"experts_per_task": 3},
        "moe.experts_per_task must lie between moe.top_k 4 and moe.num_experts 16, got 3",
    ),
    (MoEConfig, {"experts_per_task": 17}, "moe.experts_per_task must lie between"),
    (MoEConfig, {"experts_per_task": 0}, "moe.experts_per_task must be a positive integer"),
    (MoEConfig, {"task_dim": 0}, "moe.task_dim must be a positive integer"),
    (
        MoEConfig,
        {"gate_input": "befor"},
        "moe.gate_input must be one of 'after', 'before', got 'befor'; did you mean 'before'",
    ),
    (MoEConfig, {"blocks": (3, 3)}, "moe.blocks must hold integers from 0, each once"),
    (MoEConfig, {"blocks": (-1,)}, "moe.blocks must hold integers from 0, each once"),
    (LossConfig, {"weights": {"depth": -1}}, "loss.weights of depth must not be negative"),
    (LossConfig, {"weights": {"depth": "1"}}, "loss.weights must be a dict from strings to finite numbers"),
    (LossConfig, {"weights": [1]}, "loss.weights must be a dict from strings to finite numbers"),
    (RunConfig, {"resume": "no"}, "run.resume must be True or False, got 'no'"),
    (RunConfig, {"seed": -1}, "run.seed must not be negative"),
    (RunConfig, {"dir": ""}, "run.dir must not be empty"),
    (Config, {"bsr": {"keep_rate": 0.5}}, "section bsr must be a Plan"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), BAD, ids=[f"{k.__name__}-{f}" for k, f, _ in BAD])
def test_bad_values_name_the_field(kind, fields, message):
    with pytest.raises(ValueError) as caught:
        kind(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [Config(), FULL])
def test_json_round_trip_is_exact(config):
    back = Config.from_dict(json.loads(config.to_json()))
    assert back == config and Config.from_dict(config.to_dict()) == config
    assert isinstance(back.data.tasks, tuple) and isinstance(back.bsr.keep_rate, type(config.bsr.keep_rate))


def test_lists_in_a_config_file_become_tuples():
    assert DataConfig(tasks=["depth"], image_size=[32, 48]) == DataConfig(tasks=("depth",), image_size=(32, 48))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"bsr": {"keep_rte": 0.5}}, "unknown field bsr.keep_rte; did you mean 'keep_rate'?"),
        ({"bs": {}}, "unknown section bs; did you mean 'bsr'?"),
        ({"bsr": 3}, "section bsr must hold fields, got 3"),
        ([1], "a config must hold sections"),
        ({"train": {"batch_size": 0}}, "train.batch_size must be a positive integer"),
    ],
)
def test_a_wrong_dict_says_where(data, message):
    with pytest.raises(ValueError) as caught:
        Config.from_dict(data)
    assert message in str(caught.value)


def test_replace_changes_only_what_it_names():
    changed = replace(FULL, {"bsr.keep_rate": 1.0, "optim.lr": 1, "run": RunConfig(seed=3)})
    assert (changed.bsr.keep_rate, changed.optim.lr, changed.run.seed) == (1.0, 1, 3)
    assert replace(changed, {"bsr": FULL.bsr, "optim": FULL.optim, "run": FULL.run}) == FULL
    assert replace(FULL, {}) == FULL


@pytest.mark.parametrize("order", [1, -1])
def test_replace_of_a_section_and_of_its_field_does_not_depend_on_their_order(order):
    changes = [("bsr", Plan(drop_blocks=(3,), keep_rate=0.3)), ("bsr.fuse", "mean")]
    assert replace(Config(), dict(changes[::order])).bsr == Plan(drop_blocks=(3,), keep_rate=0.3, fuse="mean")


@pytest.mark.parametrize("name", ["bsr.keep_rte", "bsr.keep_rate.x", "bs.keep_rate", "keep_rate"])
def test_replace_refuses_unknown_names(name):
    with pytest.raises(ValueError, match="unknown (field|section)"):
        replace(Config(), {name: 1})


def test_a_config_file_is_run(config_file):
    assert load_config(config_file("config = Config(bsr=Plan(keep_rate=0.25))")).bsr.keep_rate == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must define `config = Config(...)`, found NoneType"),
        ("config = 3", "found int"),
        ("\nconfig = Config(bsr=Plan(keep_rate=-1))", "job.py, line 3: ValueError: bsr.keep_rate must lie in (0, 1]"),
        ("config = Config(bsr=Plan(keep_rte=1))", "job.py, line 2: TypeError"),
        ("import no_such_module", "job.py, line 2: ModuleNotFoundError"),
        ("config = (", "job.py, line 2: SyntaxError"),
    ],
)
def test_a_faulty_config_file_is_named_with_the_line(config_file, text, message):
    with pytest.raises(ValueError) as caught:
        load_config(config_file(text))
    assert message in str(caught.value)


def test_a_missing_config_file_names_a_near_one(config_file, tmp_path):
    config_file("config = Config()")
    with pytest.raises(FileNotFoundError, match="no such config file: .*jobb.py; did you mean '.*job.py'"):
        load_config(tmp_path / "jobb.py")
