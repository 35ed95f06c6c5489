"""M3ViT-small on NYUD at 480x640, two tasks, by M3ViT's published recipe (see configs/moe_nyud_m3vit.py).

Command:   tools/train.py configs/moe_nyud_2task_m3vit.py --data.root DATA/NYUD_MT
Hardware:  one GPU with 24 GB
Time:      not measured yet
Expected:  not measured yet; the published M3ViT-small reaches mIoU 45.6, rmse .589
"""

from pathlib import Path

from m3bsr.config import load_config, replace

published = load_config(Path(__file__).with_name("moe_nyud_m3vit.py"))

config = replace(
    load_config(Path(__file__).with_name("moe_nyud_2task.py")),
    {
        "model.head": published.model.head,
        "model.drop_path": published.model.drop_path,
        **{part: getattr(published, part) for part in ("moe", "bsr", "loss", "train", "optim")},
        "run.dir": "runs/moe_nyud_2task_m3vit",
    },
)
