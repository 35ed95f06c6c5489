"""M3ViT-small on NYUD at 480x640, four tasks, by the published recipe of M3ViT.

SGD with learning rate 2e-3, momentum .9, weight decay 1e-4 (here never of biases and norms), poly .9 (here each step,
there each epoch), 100 epochs, batch 16, fp32, no warm-up, no clipping, SETR-PUP heads with full-size losses, everything
trained. Its experts were trained on ImageNet; here they are made of DeiT's MLPs. The modern recipe beside it (AdamW,
warm-up, cosine, bf16, heads that read four blocks, losses at a quarter of the size) is configs/moe_nyud_full.py.

Command:   tools/train.py configs/moe_nyud_m3vit.py --data.root DATA/NYUD_MT
Hardware:  one GPU with 24 GB
Time:      not measured yet
Expected:  not measured yet
"""

from pathlib import Path

from m3bsr.config import OptimConfig, Plan, TrainConfig, load_config, replace

config = replace(
    load_config(Path(__file__).with_name("moe_nyud.py")),
    {
        "model.head": "upsample",
        "model.drop_path": 0.0,
        "moe.gate": "vmoe",
        "bsr": Plan(),
        "loss.stride": 1,
        "train": TrainConfig(epochs=100, batch_size=8, accumulate=2, clip_norm=0.0, eval_every=10),
        "optim": OptimConfig(name="sgd", lr=2e-3, momentum=0.9, weight_decay=1e-4, schedule="poly", poly_power=0.9),
        "run.dir": "runs/moe_nyud_m3vit",
    },
)
