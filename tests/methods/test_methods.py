"""The contract of every way of fine-tuning: what trains, what stays, what it starts from, what it stores."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m3bsr.backbones import task_backbone
from m3bsr.backbones.moe_vit import MoEVisionTransformer
from m3bsr.bsr.trainable import count_parameters
from m3bsr.build import build_model
from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig, replace
from m3bsr.cost import SavedBytes
from m3bsr.engine.checkpoint import resume, save_checkpoint
from m3bsr.engine.optim import make_optimizer
from m3bsr.engine.schedule import make_schedule
from m3bsr.heads import HEADS, ClassifierHead
from m3bsr.methods import METHODS, find_method
from m3bsr.models import MultiTaskModel, load_model_weights
from m3bsr.plan import Plan

D, DEPTH, EXPERTS, HIDDEN = 48, 4, 4, 32
PLAN = Plan(train_blocks=(1, 3), drop_blocks=(2,), keep_rate=0.5, recompute="cheap")
NEEDS_VALUE = {"last": "last:2"}
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
EVERY = [
    pytest.param(NEEDS_VALUE.get(name, name), marks=needs_peft if name == "lora" else (), id=name) for name in METHODS
]
DROPPING = ("bsr", "token_drop")


def make(name: str, kind: str = "moe", **options) -> MultiTaskModel:
    """``moe``: two dense tasks with experts in block 1; ``dense``: a dense ViT with LayerScale that classifies; and
    the other pairs of a backbone (``moe``, ``vit``, ``distilled``) and what it is for: ``"distilled per pixel"``."""
    torch.manual_seed(0)
    family, _, purpose = {"moe": "moe per pixel", "dense": "vit per image"}.get(kind, kind).partition(" ")
    channels = {"semseg": 5, "depth": 1} if purpose == "per pixel" else {"classification": 7}
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": D, "depth": DEPTH, "num_heads": 2, **options}
    vit: VisionTransformer
    if family == "moe":
        experts = {"moe_blocks": (1,), "num_experts": EXPERTS, "top_k": 2, "moe_mlp_ratio": HIDDEN / D}
        vit = MoEVisionTransformer(tasks=tuple(channels), **sizes, **experts)
    else:
        kinds = {"vit": VisionTransformer, "distilled": VisionTransformerDistilled}
        vit = kinds[family](**sizes, num_classes=0, init_values=0.1 if family == "vit" else None)
    heads: dict[str, nn.Module]
    if purpose == "per pixel":
        heads = {task: HEADS["light"](D, num, head_dim=8) for task, num in channels.items()}
    else:
        heads = {"classification": ClassifierHead(vit, 7)}
    backbone = vit if family == "moe" else task_backbone(vit, tuple(channels))
    model = MultiTaskModel(backbone, heads)
    method, value = find_method(name)
    backbone.set_plan(method.plan(PLAN, DEPTH, value))
    method.change(model, value)
    return model


OTHER_KINDS = ["vit per pixel", "distilled per image", "distilled per pixel", "moe per image"]


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loss_of(model: MultiTaskModel) -> torch.Tensor:
    output = model(images(), size=(16, 16))
    return sum((p**2).mean() for p in output.predictions.values()) + output.balance_loss


def steps(model: MultiTaskModel, optimizer: torch.optim.Optimizer, numbers: range, schedule=None) -> None:
    for i in numbers:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step_update(i + 1)


def stored(name: str, kind: str) -> int:
    model = make(name, kind)
    with SavedBytes(model, [images()]) as saved:
        loss = loss_of(model)
    del loss
    return saved.bytes


def expected(name: str, kind: str, model: MultiTaskModel) -> int:
    """Parameters that train, by formula."""
    scale = 2 * D if kind == "dense" else 0
    moe = kind == "moe"
    gates = 2 * D * EXPERTS
    mlp = {False: 8 * D * D + 5 * D, True: EXPERTS * (2 * D * HIDDEN + HIDDEN + D) + gates}
    block = [4 * D * D + 4 * D + 4 * D + scale + mlp[moe and i == 1] for i in range(DEPTH)]
    biases = [2 * D + 4 * D + (EXPERTS * (HIDDEN + D) if moe and i == 1 else 5 * D) for i in range(DEPTH)]
    total = sum(p.numel() for p in model.parameters())
    return {
        "bsr": block[1] + block[3],
        "head": 0,
        "last": block[2] + block[3],
        "bitfit": sum(biases),
        "norm": DEPTH * 4 * D,
        "lora": DEPTH * 8 * (D + 3 * D + D + D),
        "adapter": DEPTH * (2 * D * (D // 12) + D // 12 + D),
    }.get(name, total - heads(model)) + heads(model)


def heads(model: MultiTaskModel) -> int:
    return sum(p.numel() for p in model.heads.parameters())


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("name", EVERY)
def test_exactly_what_the_method_says_trains(name: str, kind: str) -> None:
    model = make(name, kind)
    word = name.partition(":")[0]
    assert count_parameters(model.parameters()).trained == expected(word, kind, model)
    untouched = {n.replace("base_layer.", "").replace("ls2.scale.", "ls2."): p for n, p in model.named_parameters()}
    assert untouched.keys() >= dict(make("full", kind).named_parameters()).keys()
    assert all(p.requires_grad for n, p in untouched.items() if n.startswith("heads."))


def untouched_and_changed(name: str, kind: str) -> tuple[MultiTaskModel, MultiTaskModel]:
    """A model that is trained whole and the one of the method, in evaluation: they predict the same."""
    full, model = make("full", kind).eval(), make(name, kind).eval()
    if name.startswith(DROPPING):
        full.backbone.set_plan(model.backbone.plan)
    with torch.no_grad():
        ours, base = model(images()).predictions, full(images()).predictions
    assert all(torch.equal(ours[task], base[task]) for task in base)
    return full, model


def two_steps(model: MultiTaskModel) -> None:
    """Train: what is frozen keeps every bit, and everything else moves."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model.train(), make_optimizer("adamw", model, lr=1e-2, weight_decay=0.1), range(2))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved <= trained
    idle = {n for n in trained - moved if "experts" not in n}  # an expert without tokens has no gradient
    assert not idle, idle


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("name", EVERY)
def test_starts_from_the_untouched_model(name: str, kind: str) -> None:
    full, model = untouched_and_changed(name, kind)
    own, names = model.state_dict(), full.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in names.items()), "weights of a base keep their names"


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("name", EVERY)
def test_frozen_parameters_keep_every_bit_and_the_others_move(name: str, kind: str) -> None:
    two_steps(make(name, kind))


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_every_method_for_every_backbone(name: str, kind: str) -> None:
    """Starts from the untouched model, trains what it lets train and nothing else, predicts in evaluation."""
    _, model = untouched_and_changed(name, kind)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained > {n for n, _ in model.named_parameters() if n.startswith("heads.")} or name == "head"
    two_steps(model)
    with torch.no_grad():
        after = model.eval()(images()).predictions
    shapes = {"classification": (3, 7), "semseg": (3, 5, 32, 32), "depth": (3, 1, 32, 32)}
    assert all(after[task].shape == shapes[task] and after[task].isfinite().all() for task in model.tasks)


@pytest.mark.parametrize("name", EVERY)
def test_no_graph_before_the_first_parameter_that_trains(name: str) -> None:
    model = make(name).train()
    entered: dict[int, bool] = {}
    for i, block in enumerate(model.backbone.blocks):
        block.norm1.register_forward_pre_hook(lambda _, args, i=i: entered.update({i: args[0].requires_grad}))
    loss_of(model)
    parts = [p for n, p in model.backbone.named_parameters() if not n.startswith("blocks.")]
    for i, block in enumerate(model.backbone.blocks):
        assert entered[i] == any(p.requires_grad for p in parts), i
        parts += block.parameters()


@pytest.mark.parametrize("name", EVERY)
def test_goes_on_from_a_checkpoint_to_the_same_bits(name: str, tmp_path) -> None:
    def job():
        model = make(name, drop_path=0.2)
        optimizer = make_optimizer("adamw", model.train(), lr=1e-3)
        return model, optimizer, make_schedule("cosine", optimizer, total_steps=4)

    model, optimizer, schedule = job()
    steps(model, optimizer, range(2), schedule)
    save_checkpoint(
        tmp_path / "last", model=model, config={}, progress={"step": 2, "total_steps": 4}, optimizer=optimizer,
        scheduler=schedule, scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    steps(model, optimizer, range(2, 4), schedule)
    again, optimizer, schedule = job()
    resume(tmp_path / "last", again, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), total_steps=4)
    steps(again, optimizer, range(2, 4), schedule)
    one, two = model.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@needs_peft
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_stored_bytes_are_in_the_order_that_the_methods_promise(kind: str) -> None:
    every = {name: stored(NEEDS_VALUE.get(name, name), kind) for name in METHODS}
    full = every["full"]
    assert every["head"] < min(v for name, v in every.items() if name != "head")
    assert every["checkpointing"] < every["backrazor"] < full
    assert every["token_drop"] < full and every["bsr"] < full and every["last"] < full
    # inputs of frozen Linears are not stored
    assert every["bitfit"] <= every["norm"] < every["lora"] < 0.8 * full
    assert every["adapter"] < every["lora"]


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_checkpointing_has_the_gradients_of_full_fine_tuning(kind: str) -> None:
    grads = []
    for name in ("full", "checkpointing"):
        model = make(name, kind).train()
        loss_of(model).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_values_behind_the_colon() -> None:
    assert make("last:1", "dense").backbone.plan.train_blocks == (3,)
    assert make("token_drop:.25").backbone.plan.keep_rates == {2: 0.25}
    assert make("backrazor:.5").backbone.plan.prune_rate == 0.5
    assert make("adapter:3").backbone.blocks[0].ls2.adapter["down"].out_features == 3
    nothing = METHODS["token_drop"].plan(Plan(train_blocks=(1,), score_source="own"), 12, "")
    assert nothing.drop_blocks == (3, 6, 9) and nothing.train_blocks == "all" and nothing.keep_rate == 0.7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ful", r"unknown model.method 'ful' \(did you mean 'full'\?\); known: bsr, full,"),
        ("last", "last takes the number of blocks, as in last:N; got 'last'"),
        ("last:0", "last takes the number of blocks"),
        ("last:9", "last:9: the model has 4 blocks"),
        ("full:3", "full takes no value"),
        ("backrazor:1.5", "backrazor takes a prune rate"),
        ("token_drop:x", "token_drop takes a keep rate"),
        ("lora:-1", "lora takes a rank"),
    ],
)
def test_wrong_names_and_values(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'm3bsr\[lora\]'"):
        make("lora")


TINY = Config(
    data=DataConfig(tasks=("semseg",), image_size=(32, 32)),
    model=ModelConfig(backbone="m3vit_tiny_patch16", head_dim=8),
    moe=MoEConfig(blocks=(9,), num_experts=2, top_k=1, mlp_ratio=0.25),
)


@pytest.mark.parametrize("name", [pytest.param("lora:2", marks=needs_peft), "adapter:2"])
def test_weights_of_another_run(name: str) -> None:
    base, model = build_model(TINY), build_model(replace(TINY, {"model.method": name}))
    fresh = load_model_weights(model, base.state_dict(), "base")
    assert fresh and all("lora" in part or "adapter" in part for part in fresh)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    again = build_model(replace(TINY, {"model.method": name}))
    assert load_model_weights(again, model.state_dict(), "tuned") == ()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="which this model lacks; use the model.method of that run"):
        load_model_weights(base, model.state_dict(), "tuned")


def test_the_plan_is_put_aside_and_not_even_looked_at() -> None:
    unmeasured = Plan(train_blocks=(9, 40), train_experts="top:1")
    model = build_model(replace(TINY, {"bsr": unmeasured, "model.method": "full"}))
    assert model.backbone.plan == Plan()
    with pytest.raises(ValueError, match="train_blocks"):
        build_model(replace(TINY, {"bsr": unmeasured}))
