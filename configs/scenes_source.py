"""A small M3ViT from scratch on ray-cast rooms (source domain), four tasks: the start of the demo.

Command:   tools/train.py configs/scenes_source.py (after `make demo` has drawn the rooms; see
           datasets/scenes/README.md)
Hardware:  2 CPU cores, 2 GB of memory
Time:      about 3 minutes
Expected:  after 300 steps a start for the adaptation, not more: mIoU about .35, depth rmse about .8 m on its own domain
"""

from m3bsr.config import Config, DataConfig, LossConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig

config = Config(
    data=DataConfig(
        name="scenes",
        root="datasets/scenes/data/source",
        tasks=("semseg", "depth", "normals", "edge"),
        image_size=(128, 160),
        augment="astmt",
        num_workers=1,
    ),
    model=ModelConfig(backbone="m3vit_tiny_patch16", head="light", head_dim=64),
    moe=MoEConfig(blocks=(9, 11), num_experts=8, top_k=2, mlp_ratio=2.0, gate="vmoe", gate_mode="per_task"),
    loss=LossConfig(stride=2, weights={"semseg": 1.0, "depth": 1.0, "normals": 2.0, "edge": 5.0}),
    train=TrainConfig(epochs=5, batch_size=8, eval_every=0, eval_batch_size=20),
    optim=OptimConfig(name="adamw", lr=7e-4, weight_decay=0.05, warmup_steps=30),
    run=RunConfig(dir="runs/demo/source"),
)
