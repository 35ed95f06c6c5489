"""DeiT-small on NYUD at 480x640, four tasks, by M3ViT's published recipe (see configs/moe_nyud_m3vit.py).

Command:   tools/train.py configs/vit_nyud_m3vit.py --data.root DATA/NYUD_MT
Hardware:  one GPU with 24 GB
Time:      not measured yet
Expected:  not measured yet; M-ViT as published, for semseg and depth alone, reaches mIoU 40.9, rmse .631
"""

from pathlib import Path

from m3bsr.config import load_config, replace

published = load_config(Path(__file__).with_name("moe_nyud_m3vit.py"))

config = replace(
    load_config(Path(__file__).with_name("vit_nyud.py")),
    {
        "model.head": published.model.head,
        "model.drop_path": published.model.drop_path,
        **{part: getattr(published, part) for part in ("bsr", "loss", "train", "optim")},
        "run.dir": "runs/vit_nyud_m3vit",
    },
)
