"""M3ViT-small on PASCAL-Context at 512x512, five tasks, everything trained: what BSR is compared with.

Command:   tools/train.py configs/moe_pascal_full.py --data.root DATA/PASCAL_MT
Hardware:  one GPU with 24 GB
Time:      not measured yet
Expected:  not measured yet; the published M3ViT-small reaches mIoU 72.8 (semseg), 62.1 (human parts) and 66.3
           (saliency), normals 14.5 degrees, edge odsF 71.7
"""

from pathlib import Path

from m3bsr.config import Plan, load_config, replace

config = replace(
    load_config(Path(__file__).with_name("moe_pascal.py")), {"bsr": Plan(), "run.dir": "runs/moe_pascal_full"}
)
