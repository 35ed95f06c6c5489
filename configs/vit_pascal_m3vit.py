"""DeiT-small on PASCAL-Context at 512x512, five tasks, by M3ViT's published recipe (see configs/moe_nyud_m3vit.py).

Command:   tools/train.py configs/vit_pascal_m3vit.py --data.root DATA/PASCAL_MT
Hardware:  one GPU with 40 GB
Time:      not measured yet
Expected:  not measured yet; M-ViT as published (ViT-small, twelve heads) reaches mIoU 70.7 (semseg), 58.7 (human
           parts) and 64.9 (saliency), normals 15.5 degrees, edge odsF 68.8
"""

from pathlib import Path

from m3bsr.config import load_config, replace

published = load_config(Path(__file__).with_name("moe_nyud_m3vit.py"))

config = replace(
    load_config(Path(__file__).with_name("vit_pascal.py")),
    {
        "model.head": published.model.head,
        "model.drop_path": published.model.drop_path,
        **{part: getattr(published, part) for part in ("bsr", "loss", "train", "optim")},
        "run.dir": "runs/vit_pascal_m3vit",
    },
)
