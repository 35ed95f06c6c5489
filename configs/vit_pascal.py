"""DeiT-small without experts on PASCAL-Context at 512x512, five tasks, with BSR: what experts are compared with.

Command:   tools/train.py configs/vit_pascal.py --data.root DATA/PASCAL_MT
Hardware:  one GPU with 24 GB (bf16)
Time:      not measured yet
Expected:  not measured yet; M-ViT as published (ViT-small, twelve heads) reaches mIoU 70.7 (semseg), 58.7 (human
           parts) and 64.9 (saliency), normals 15.5 degrees, edge odsF 68.8
Full fine-tuning: configs/vit_pascal_full.py; by the published recipe: configs/vit_pascal_m3vit.py
"""

from pathlib import Path

from m3bsr.config import MoEConfig, load_config, replace

config = replace(
    load_config(Path(__file__).with_name("moe_pascal.py")),
    {
        "model.backbone": "deit_small_patch16_224",
        "moe": MoEConfig(blocks=()),
        "run.dir": "runs/vit_pascal",
    },
)
