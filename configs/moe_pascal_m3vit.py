"""M3ViT-small on PASCAL-Context at 512x512, five tasks, by M3ViT's published recipe (see configs/moe_nyud_m3vit.py).

Command:   tools/train.py configs/moe_pascal_m3vit.py --data.root DATA/PASCAL_MT
Hardware:  one GPU with 40 GB
Time:      not measured yet
Expected:  not measured yet; the published M3ViT-small reaches mIoU 72.8 (semseg), 62.1 (human parts) and 66.3
           (saliency), normals 14.5 degrees, edge odsF 71.7
"""

from pathlib import Path

from m3bsr.config import load_config, replace

published = load_config(Path(__file__).with_name("moe_nyud_m3vit.py"))

config = replace(
    load_config(Path(__file__).with_name("moe_pascal.py")),
    {
        "model.head": published.model.head,
        "model.drop_path": published.model.drop_path,
        **{part: getattr(published, part) for part in ("moe", "bsr", "loss", "train", "optim")},
        "run.dir": "runs/moe_pascal_m3vit",
    },
)
