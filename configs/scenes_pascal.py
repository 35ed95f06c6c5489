"""A small M3ViT from scratch on drawn people, animals and rooms in PASCAL_MT layout: all five tasks of PASCAL-Context.

Command:   datasets/scenes/make_scenes.py --out datasets/scenes/data/pascal --layout PASCAL_MT --train 160 --val 40
           --size 128x160, then tools/train.py configs/scenes_pascal.py
Hardware:  2 CPU cores, 2 GB of memory
Time:      about 4 minutes (2 s a step on one busy core), and 20 s to draw the pictures
Expected:  a check that everything runs, not a result: after 100 steps normals 32 degrees, saliency mIoU .30, and
           hardly a class (semseg mIoU .065, human parts .157)
"""

from pathlib import Path

from m3bsr.config import load_config, replace

config = replace(
    load_config(Path(__file__).with_name("scenes_source.py")),
    {
        "data.name": "pascal",
        "data.root": "datasets/scenes/data/pascal",
        "data.tasks": ("semseg", "human_parts", "saliency", "normals", "edge"),
        "data.augment": "astmt_rotate",
        "loss.weights": {"semseg": 1.0, "human_parts": 2.0, "saliency": 2.0, "normals": 2.0, "edge": 5.0},
        "optim.warmup_steps": 10,
        "run.dir": "runs/scenes_pascal",
    },
)
