"""M3ViT-small on PASCAL-Context at 512x512, five tasks, from DeiT-small through timm's hub, with BSR.

Command:   tools/train.py configs/moe_pascal.py --data.root DATA/PASCAL_MT
Hardware:  one GPU with 24 GB (bf16)
Time:      not measured yet
Expected:  not measured yet; the published M3ViT-small (all trained) reaches mIoU 72.8 (semseg), 62.1 (human parts) and
           66.3 (saliency), normals 14.5 degrees, edge odsF 71.7
Full fine-tuning: configs/moe_pascal_full.py; by the published recipe: configs/moe_pascal_m3vit.py
A fifth less memory for a less good head: --model.head light
"""

from m3bsr.config import (
    MERGED,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Plan,
    RunConfig,
    TrainConfig,
)

config = Config(
    data=DataConfig(
        name="pascal",
        root="datasets/pascal/PASCAL_MT",
        tasks=("semseg", "human_parts", "saliency", "normals", "edge"),
        image_size=(512, 512),
        augment="astmt_rotate",
        num_workers=4,
    ),
    model=ModelConfig(backbone="m3vit_small_patch16", weights="timm", head="multilevel", drop_path=0.1),
    moe=MoEConfig(num_experts=16, top_k=4, mlp_ratio=1.0, gate="slots", gate_mode="per_task", upcycle="split"),
    bsr=Plan(train_blocks=(3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.8, **MERGED),
    loss=LossConfig(stride=4),
    train=TrainConfig(epochs=60, batch_size=8, accumulate=2, precision="bf16", eval_every=10),
    optim=OptimConfig(name="adamw", lr=2e-4, weight_decay=0.05, warmup_steps=300),
    run=RunConfig(dir="runs/moe_pascal"),
)
