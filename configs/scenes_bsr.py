"""The demo's model adapted to the target domain by block selective reprogramming.

Command:   tools/train.py configs/scenes_bsr.py (after `make demo` has drawn the rooms and trained the source model)
Hardware:  2 CPU cores, 2 GB of memory
Time:      about 1 minute (two thirds of full fine-tuning)
Expected:  see the table of `make demo` in README.md
Full fine-tuning beside it: add --bsr.train-blocks all --bsr.drop-blocks --run.dir runs/demo/full
"""

from pathlib import Path

from m3bsr.config import Plan, load_config, replace

source = load_config(Path(__file__).with_name("scenes_source.py"))

config = replace(
    source,
    {
        "data.root": "datasets/scenes/data/target",
        "model.weights": "runs/demo/source/checkpoints/last/model.safetensors",
        "bsr": Plan(train_blocks=(7, 9, 11), drop_blocks=(8,), keep_rate=0.7, restore="transfer", restore_before=11),
        "train.epochs": 2,
        "optim.lr": 3e-4,
        "optim.warmup_steps": 10,
        "run.dir": "runs/demo/bsr",
    },
)
