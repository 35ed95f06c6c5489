"""ViT-B/16 (ImageNet-21k) on CIFAR-10 by BSR, with the hyperparameters of the BSR paper's scripts.

Command:   tools/train.py configs/vit_base_cifar10.py (after datasets/classification/prepare.py cifar10)
Weights:   from timm's hub, or --model.weights ViT-B_16.npz
Hardware:  written for one GPU with 8 GB; --train.batch-size 8 --train.accumulate 16 fits less
Time:      not measured here
Expected:  not run here; the study that was run is configs/image_folder.py
"""

from m3bsr.config import Config, DataConfig, ModelConfig, OptimConfig, Plan, RunConfig, TrainConfig

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
    model=ModelConfig(backbone="vit_base_patch16_224.augreg_in21k", weights="timm"),
    bsr=Plan(train_blocks=(3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.5, score_source="own"),
    train=TrainConfig(epochs=10_000, max_steps=20_000, batch_size=128, eval_batch_size=64, eval_every=3),
    optim=OptimConfig(name="sgd", momentum=0.9, lr=1e-3, weight_decay=0.0, warmup_steps=500),
    run=RunConfig(dir="runs/vit_base_cifar10"),
)
