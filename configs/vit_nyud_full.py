"""DeiT-small on NYUD at 480x640, four tasks, everything trained: what BSR is compared with.

Command:   tools/train.py configs/vit_nyud_full.py --data.root DATA/NYUD_MT
Hardware:  one GPU with 24 GB
Time:      not measured yet
Expected:  not measured yet; M-ViT as published, for semseg and depth alone, reaches mIoU 40.9, rmse .631
"""

from pathlib import Path

from m3bsr.config import Plan, load_config, replace

config = replace(load_config(Path(__file__).with_name("vit_nyud.py")), {"bsr": Plan(), "run.dir": "runs/vit_nyud_full"})
