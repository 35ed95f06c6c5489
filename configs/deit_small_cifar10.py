"""DeiT-S on CIFAR-10 by BSR: AdamW, 50 epochs, layer decay .75, as the BSR paper fine-tunes DeiT.

Command:   tools/train.py configs/deit_small_cifar10.py (after datasets/classification/prepare.py cifar10)
Weights:   from timm's hub, or --model.weights deit_small_patch16_224-cd65a155.pth
Hardware:  written for one GPU with 8 GB; --train.batch-size 8 --train.accumulate 16 fits less
Time:      not measured here
Expected:  not run here; the study that was run is configs/image_folder.py
"""

from m3bsr.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(
        name="cifar10",
        root="datasets/classification/data",
        tasks=("classification",),
        image_size=(224, 224),
        augment="crop",
        test_split="test",  # scored once, with the checkpoint that val chose
        num_workers=4,
    ),
    model=ModelConfig(backbone="deit_small_patch16_224", weights="timm"),
    bsr=Plan(train_blocks=(3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.5, score_source="own"),
    loss=LossConfig(label_smoothing=0.1),
    train=TrainConfig(epochs=50, batch_size=128, eval_batch_size=64, clip_norm=0.0),
    optim=OptimConfig(lr=5e-4, weight_decay=0.05, layer_decay=0.75, warmup_steps=1750, min_lr=1e-6),
    run=RunConfig(dir="runs/deit_small_cifar10"),
)
