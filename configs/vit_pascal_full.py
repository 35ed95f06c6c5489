"""DeiT-small on PASCAL-Context at 512x512, five tasks, everything trained: what BSR is compared with.

Command:   tools/train.py configs/vit_pascal_full.py --data.root DATA/PASCAL_MT
Hardware:  one GPU with 24 GB
Time:      not measured yet
Expected:  not measured yet; M-ViT as published (ViT-small, twelve heads) reaches mIoU 70.7 (semseg), 58.7 (human
           parts) and 64.9 (saliency), normals 15.5 degrees, edge odsF 68.8
"""

from pathlib import Path

from m3bsr.config import Plan, load_config, replace

config = replace(
    load_config(Path(__file__).with_name("vit_pascal.py")), {"bsr": Plan(), "run.dir": "runs/vit_pascal_full"}
)
