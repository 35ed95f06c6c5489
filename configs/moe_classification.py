"""One MoE backbone for two classification data sets, a gate and a linear classifier for each, adapted by BSR.

Command:   tools/train.py configs/moe_classification.py --model.weights deit_tiny_patch16_224.safetensors
           --data.sets.objects image_folder:FOLDER
Batches come from one set at a time, in proportion to their sizes (--data.interleave). An optimizer step sees one batch;
--data.interleave round_robin --train.accumulate 2 makes a step of both sets.
Hardware:  2 CPU cores, 2 GB of memory
Time:      4 minutes with bf16 on a processor that has its arithmetic
Expected:  top-1 .775 on 10 classes of CIFAR-10 (2,000 training images), .987 on digits (bf16, one seed)
"""

from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(
        sets={"objects": "image_folder:datasets/classification/cifar10_mini", "digits": "digits"},
        tasks=("objects", "digits"),
        image_size=(224, 224),
        augment="none",
    ),
    model=ModelConfig(backbone="m3vit_tiny_patch16", weights="timm"),
    moe=MoEConfig(blocks=(7, 9, 11), num_experts=8, top_k=2, mlp_ratio=2.0),
    bsr=Plan(
        train_blocks=(3, 7, 11),
        drop_blocks=(3, 6, 9),
        keep_rate=0.6,
        eval_keep_rate=1.0,
        restore="bypass",
    ),
    train=TrainConfig(epochs=2, batch_size=32, eval_batch_size=100),
    optim=OptimConfig(lr=5e-4, head_lr_scale=2.0, warmup_steps=20),
    run=RunConfig(dir="runs/moe_classification"),
)
