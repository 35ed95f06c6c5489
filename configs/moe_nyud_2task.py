"""M3ViT-small on NYUD at 480x640, semantic segmentation and depth: the tasks of M3ViT's own table, with BSR.

Command:   tools/train.py configs/moe_nyud_2task.py --data.root DATA/NYUD_MT
Hardware:  one GPU with 16 GB (bf16)
Time:      not measured yet
Expected:  not measured yet; the published M3ViT-small reaches mIoU 45.6, rmse .589
Full fine-tuning: configs/moe_nyud_2task_full.py; by the published recipe: configs/moe_nyud_2task_m3vit.py
"""

from pathlib import Path

from m3bsr.config import load_config, replace

config = replace(
    load_config(Path(__file__).with_name("moe_nyud.py")),
    {
        "data.tasks": ("semseg", "depth"),
        "run.dir": "runs/moe_nyud_2task",
    },
)
