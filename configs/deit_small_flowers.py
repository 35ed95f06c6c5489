"""DeiT-S on Flowers-102 by BSR: AdamW, 50 epochs, layer decay .75, as the BSR paper fine-tunes DeiT.

Command:   tools/train.py configs/deit_small_flowers.py (after datasets/classification/prepare.py flowers102)
Hardware:  as configs/deit_small_cifar10.py
Time:      not measured here
Expected:  not run here; the study that was run is configs/image_folder.py
"""

from pathlib import Path

from m3bsr.config import load_config, replace

config = replace(
    load_config(Path(__file__).with_name("deit_small_cifar10.py")),
    {
        "data.name": "flowers102",
        "optim.warmup_steps": 35,  # 5 epochs
        "run.dir": "runs/deit_small_flowers",
    },
)
