"""DeiT-small without experts on NYUD at 480x640, four tasks, with BSR: what experts are compared with.

Command:   tools/train.py configs/vit_nyud.py --data.root DATA/NYUD_MT
Hardware:  one GPU with 16 GB (bf16)
Time:      not measured yet
Expected:  not measured yet; M-ViT as published, for semseg and depth alone, reaches mIoU 40.9, rmse .631
Full fine-tuning: configs/vit_nyud_full.py; by the published recipe: configs/vit_nyud_m3vit.py
"""

from pathlib import Path

from m3bsr.config import MoEConfig, load_config, replace

config = replace(
    load_config(Path(__file__).with_name("moe_nyud.py")),
    {
        "model.backbone": "deit_small_patch16_224",
        "moe": MoEConfig(blocks=()),
        "run.dir": "runs/vit_nyud",
    },
)
