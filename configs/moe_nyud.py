"""M3ViT-small on NYUD at 480x640, four tasks, from DeiT-small through timm's hub: the reference setting, with BSR.

Command:   tools/train.py configs/moe_nyud.py --data.root DATA/NYUD_MT
Hardware:  one GPU with 16 GB (bf16), or several by torchrun (docs/distributed.md), or a patient CPU
Time:      not measured yet: this repository has no GPU numbers so far (LOG.md says what was measured, on which machine)
Expected:  not measured yet; the published M3ViT-small (2 tasks, all trained) reaches mIoU 45.6, rmse .589
Full fine-tuning: configs/moe_nyud_full.py; by the published recipe: configs/moe_nyud_m3vit.py
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
    data=DataConfig(name="nyud", tasks=("semseg", "depth", "normals", "edge"), image_size=(480, 640), augment="astmt"),
    model=ModelConfig(backbone="m3vit_small_patch16", weights="timm", head="multilevel", drop_path=0.1),
    moe=MoEConfig(num_experts=16, top_k=4, mlp_ratio=1.0, gate="slots", gate_mode="per_task", upcycle="split"),
    bsr=Plan(train_blocks=(3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.8, **MERGED),
    loss=LossConfig(stride=4),
    train=TrainConfig(epochs=100, batch_size=8, accumulate=2, precision="bf16", eval_every=10),
    optim=OptimConfig(name="adamw", lr=2e-4, weight_decay=0.05, warmup_steps=200),
    run=RunConfig(dir="runs/moe_nyud"),
)
