"""M3ViT-tiny on NYUD, semantic segmentation and depth at 240x320, from DeiT-tiny, adapted by BSR.

Command:   tools/train.py configs/moe_nyud_tiny.py --data.root DATA/NYUD_MT
           --model.weights deit_tiny_patch16_224.safetensors
Hardware:  2 CPU cores, 2 GB of memory
Time:      3 to 12 minutes; full fine-tuning takes 2.1 times the operations
Expected:  mIoU .176, depth rmse .971 m on 200 training and 100 validation frames in bf16, mean of three seeds
           (full: .181, .940; --model.head multilevel: .197, .963)
Full fine-tuning: add --bsr.train-blocks all --bsr.drop-blocks; heads only: --bsr.train-blocks --bsr.drop-blocks;
for half of the memory: --bsr.recompute all; a better head for more work: --model.head multilevel
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
    data=DataConfig(name="nyud", tasks=("semseg", "depth"), image_size=(240, 320), augment="astmt"),
    model=ModelConfig(backbone="m3vit_tiny_patch16", weights="timm", head="light"),
    moe=MoEConfig(blocks=(7, 9, 11), num_experts=16, top_k=4, gate="slots", gate_mode="per_task", upcycle="split"),
    bsr=Plan(train_blocks=(3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.8, **MERGED),
    loss=LossConfig(stride=4),
    train=TrainConfig(epochs=8, batch_size=8, eval_every=4, eval_batch_size=10),
    optim=OptimConfig(name="adamw", lr=3e-4, head_lr_scale=3.0, weight_decay=0.05, warmup_steps=20),
    run=RunConfig(dir="runs/moe_nyud_tiny"),
)
