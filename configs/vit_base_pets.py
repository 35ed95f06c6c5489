"""ViT-B/16 (ImageNet-21k) on Oxford-IIIT Pets by BSR, with the hyperparameters of the BSR paper's scripts.

Command:   tools/train.py configs/vit_base_pets.py (after datasets/classification/prepare.py pets)
Hardware:  as configs/vit_base_cifar10.py
Time:      not measured here
Expected:  not run here; the study that was run is configs/image_folder.py
"""

from pathlib import Path

from m3bsr.config import load_config, replace

config = replace(
    load_config(Path(__file__).with_name("vit_base_cifar10.py")),
    {
        "data.name": "pets",
        "optim.lr": 1e-3,
        "train.eval_every": 30,
        "run.dir": "runs/vit_base_pets",
    },
)
