"""ViT-B/16 (ImageNet-21k) on Flowers-102 by BSR, with the hyperparameters of the BSR paper's scripts.

Command:   tools/train.py configs/vit_base_flowers.py (after datasets/classification/prepare.py flowers102)
Hardware:  as configs/vit_base_cifar10.py
Time:      not measured here
Expected:  not run here; the study that was run is configs/image_folder.py
"""

from pathlib import Path

from m3bsr.config import load_config, replace

config = replace(
    load_config(Path(__file__).with_name("vit_base_cifar10.py")),
    {
        "data.name": "flowers102",
        "optim.lr": 3e-2,
        "train.eval_every": 100,
        "run.dir": "runs/vit_base_flowers",
    },
)
