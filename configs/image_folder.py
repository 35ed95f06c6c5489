"""DeiT-tiny on ten classes of small photographs (CIFAR-10: 2,000 train, 600 val), by BSR.

Command:   tools/train.py configs/image_folder.py --data.root FOLDER
           --model.weights deit_tiny_patch16_224.safetensors
FOLDER holds {train,val}/<class>/*.png; the number of classes is found there. Without --model.weights timm downloads
them.
Hardware:  2 CPU cores, 1 GB of memory
Time:      6 minutes
Expected:  top-1 .826 (mean of three seeds; full fine-tuning .827), the other methods in README.md and LOG.md
"""

from m3bsr.config import Config, DataConfig, ModelConfig, OptimConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(
        name="image_folder",
        root="datasets/classification/cifar10_mini",
        tasks=("classification",),
        image_size=(224, 224),
        augment="flip",
    ),
    model=ModelConfig(backbone="deit_tiny_patch16_224", weights="timm"),
    # A third of the work of full fine-tuning; in evaluation, where nothing is stored, all tokens stay.
    bsr=Plan(train_blocks=(3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.6, eval_keep_rate=1.0),
    train=TrainConfig(epochs=4, batch_size=32, eval_batch_size=100, eval_every=2),
    optim=OptimConfig(lr=5e-4, head_lr_scale=2.0, warmup_steps=20),
    run=RunConfig(dir="runs/image_folder_bsr"),
)
