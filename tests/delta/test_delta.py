"""Deltas: only what was trained, on exactly the base that it was trained on, many over one base."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m3bsr import Plan, reprogram
from m3bsr.build import build_model
from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig
from m3bsr.delta import file as delta_file
from m3bsr.delta import load_delta, read_delta, save_delta
from m3bsr.models import MultiTaskModel

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 7}
PLAN = Plan(train_blocks=(1, 3), drop_blocks=(1,), keep_rate=0.5)


def make(seed: int = 0, cls: type[VisionTransformer] = VisionTransformer, **changes) -> VisionTransformer:
    torch.manual_seed(seed)
    return cls(**{**TINY, **changes}).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, seed: int, steps: int = 2) -> nn.Module:
    """Some steps of AdamW with weight decay, which moves all that it is given."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(torch.randn(2, 3, 32, 32, generator=generator))
        outputs = output.predictions.values() if hasattr(output, "predictions") else [output]
        sum(F.mse_loss(y, torch.randn(y.shape, generator=generator)) for y in outputs).backward()
        optimizer.step()
    return model.eval()


def trained(plan: Plan = PLAN, seed: int = 0, num_classes: int = 5, **changes) -> nn.Module:
    """A model trained on the base ``make()``, with a classifier of its own."""
    vit = make(**changes)
    vit.reset_classifier(num_classes)
    return train(reprogram(vit, plan), seed)


def memory(*models: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    storages = [t.untyped_storage() for m in models for t in (*m.parameters(), *m.buffers())]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def snapshot(model: nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    return {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, tuple[torch.Tensor, bool]]) -> bool:
    now = snapshot(model)
    return list(now) == list(before) and all(
        torch.equal(now[n][0], before[n][0]) and now[n][1] == before[n][1] for n in now
    )


@pytest.mark.parametrize("cls", [VisionTransformer, VisionTransformerDistilled])
@pytest.mark.parametrize("num_classes", [5, 7, 0])
def test_a_delta_holds_what_trained_and_gives_the_model_back(tmp_path, cls, num_classes: int) -> None:
    model = trained(num_classes=num_classes, cls=cls)
    info = save_delta(model, tmp_path / "delta.safetensors", base_name="tiny")
    stored = load_file(tmp_path / "delta.safetensors")
    assert set(stored) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith(("blocks.1.", "blocks.3.", "norm.", "head")) for n in stored)
    assert info == read_delta(tmp_path / "delta.safetensors")
    assert (info.base_name, info.plan, info.num_classes) == ("tiny", PLAN, num_classes)
    assert info.num_bytes == sum(t.nbytes for t in stored.values())

    vit, state = make(cls=cls), torch.get_rng_state()
    before = snapshot(vit)
    loaded = load_delta(vit, tmp_path / "delta.safetensors")
    assert torch.equal(loaded(images()), model(images()))
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert loaded.plan == PLAN and isinstance(loaded, cls) and not loaded.training
    assert unchanged(vit, before) and type(vit) is cls and vit.num_classes == 7
    assert torch.equal(torch.get_rng_state(), state)


def test_deltas_over_one_base_share_its_memory_and_leave_each_other_alone(tmp_path) -> None:
    plans = (PLAN, Plan(train_blocks=(2,), drop_blocks=(0, 1), keep_rate=0.7, restore="adapt"), Plan(train_blocks=()))
    vit = make()
    outputs, sizes, models = [], [], []
    for i, plan in enumerate(plans):
        model = trained(plan, seed=i, num_classes=3 + i)
        outputs.append(model(images()))
        sizes.append(save_delta(model, tmp_path / f"{i}.safetensors").num_bytes)
    before, alone = snapshot(vit), memory(vit)
    for i in range(len(plans)):
        models.append(load_delta(vit, tmp_path / f"{i}.safetensors"))
    assert memory(vit, *models) == alone + sum(sizes)
    for model, output, plan in zip(models, outputs, plans, strict=True):
        assert torch.equal(model(images()), output) and model.plan == plan
    again = train(models[0], seed=9)  # goes on from the delta
    assert not torch.equal(again(images()), outputs[0])
    assert torch.equal(models[1](images()), outputs[1]) and torch.equal(models[2](images()), outputs[2])
    assert unchanged(vit, before)
    # a model of one delta is as good a base for the next, whose plan trains the same blocks
    assert torch.equal(load_delta(again, tmp_path / "0.safetensors")(images()), outputs[0])


def test_everything_trained_fits_any_base_of_that_shape(tmp_path) -> None:
    model = trained(Plan())
    info = save_delta(model, tmp_path / "full.safetensors")
    assert not info.base
    assert torch.equal(load_delta(make(seed=3), tmp_path / "full.safetensors")(images()), model(images()))


def test_tied_and_viewed_parameters_stay_what_they_are(tmp_path) -> None:
    def tied() -> VisionTransformer:
        vit = make()
        vit.blocks[3].norm1 = vit.blocks[1].norm1
        vit.norm.weight = nn.Parameter(torch.ones(30)[3:27])  # a window on a larger storage
        return vit

    model = train(reprogram(tied(), PLAN), seed=0)
    info = save_delta(model, tmp_path / "d.safetensors")
    assert "blocks.3.norm1.weight" not in info.tensors
    loaded = load_delta(tied(), tmp_path / "d.safetensors")
    assert loaded.blocks[3].norm1.weight is loaded.blocks[1].norm1.weight
    assert torch.equal(loaded(images()), model(images()))


OTHER_BASES = {
    "values": (lambda: make(seed=1), "cls_token has other values (and"),
    "depth": (lambda: make(depth=6), "blocks.4.norm1.weight is unknown to the delta"),
    "too shallow": (lambda: make(depth=3), "train_blocks [3] out of range"),
    "width": (lambda: make(embed_dim=48), "cls_token is [1, 1, 24] there and [1, 1, 48] here"),
    "heads": (lambda: make(num_heads=6), "blocks.0.attn.num_heads is 3 there and 6 here"),
    "pooling": (lambda: make(global_pool="avg", fc_norm=False), "global_pool is 'token' there and 'avg' here"),
    "registers": (lambda: make(reg_tokens=2), "reg_token is unknown to the delta"),
    "patches": (lambda: make(patch_size=16), "is [1, 17, 24] there and [1, 5, 24] here"),
    "dtype": (lambda: make().bfloat16(), "cls_token is float32 there and bfloat16 here"),
}


@pytest.mark.parametrize("fault", OTHER_BASES)
def test_another_base_is_refused_by_name_hashes_and_tensor(tmp_path, fault: str) -> None:
    build, message = OTHER_BASES[fault]
    path = tmp_path / "delta.safetensors"
    info = save_delta(trained(), path, base_name="tiny_a")
    vit = build()
    before = snapshot(vit)
    with pytest.raises(ValueError) as caught:
        load_delta(vit, path)
    text = str(caught.value)
    assert message in text and str(path) in text and "\n" not in text
    assert "tiny_a" in text and info.base_hash[:12] in text
    assert fault == "too shallow" or "this model's base hash is" in text
    assert unchanged(vit, before) and type(vit) is VisionTransformer


def test_one_changed_number_of_the_base_is_found_and_named(tmp_path) -> None:
    save_delta(trained(), tmp_path / "delta.safetensors")
    vit = make()
    with torch.no_grad():
        vit.blocks[2].mlp.fc1.bias[5] += 1e-6
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.fc1\.bias has other values; "):
        load_delta(vit, tmp_path / "delta.safetensors")
    with torch.no_grad():  # a block that trains may differ: the delta brings it
        vit.blocks[2].mlp.fc1.bias.copy_(make().blocks[2].mlp.fc1.bias)
        vit.blocks[1].mlp.fc1.bias.zero_()
    load_delta(vit, tmp_path / "delta.safetensors")


def test_not_strict_takes_another_dtype_or_value_but_no_other_shape(tmp_path) -> None:
    model = trained()
    save_delta(model, tmp_path / "delta.safetensors")
    half = load_delta(make().bfloat16(), tmp_path / "delta.safetensors", strict=False)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(images().bfloat16()).float(), model(images()), rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match=r"is \[1, 1, 24\] there and \[1, 1, 48\] here"):
        load_delta(make(embed_dim=48), tmp_path / "delta.safetensors", strict=False)


def spoil(path: Path, fault: str) -> None:
    data = bytearray(path.read_bytes())
    if fault == "truncated":
        path.write_bytes(data[:-100])
    elif fault == "bit":
        data[-50] ^= 1
        path.write_bytes(data)
    elif fault == "text":
        path.write_text("no delta at all")
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "weights":
        save_file({"head.bias": torch.zeros(3)}, path)
    else:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        changes = {
            "format": {"m3bsr_delta": "2"},
            "plan": {"plan": json.dumps({**json.loads(metadata["plan"]), "keep_rate": 7})},
            "metadata": {"base": "[1, 2]"},
        }
        save_file(load_file(path), path, {**metadata, **changes[fault]})


FAULTS = {
    **dict.fromkeys(("truncated", "text", "empty"), "is damaged, or no delta"),
    "bit": "is damaged: norm.weight does not have its checksum",
    "weights": "is no delta: a safetensors file",
    "format": "is a delta of format 2; this version of m3bsr reads format 1",
    "plan": "bsr.keep_rate must lie in",
    "metadata": "metadata cannot be read",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_said_to_be(tmp_path, fault: str) -> None:
    path = tmp_path / "delta.safetensors"
    save_delta(trained(), path)
    spoil(path, fault)
    with pytest.raises(ValueError) as caught:
        load_delta(make(), path)
    assert FAULTS[fault] in str(caught.value) and str(path) in str(caught.value)


def test_models_without_a_plan_and_missing_files_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="reprogram"):
        save_delta(make(), tmp_path / "delta.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_delta(make(), tmp_path / "nowhere.safetensors")
    save_delta(trained(), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="VisionTransformer"):
        load_delta(nn.Linear(3, 3), tmp_path / "delta.safetensors")


def test_a_failing_write_leaves_the_old_delta(tmp_path, monkeypatch) -> None:
    path = tmp_path / "new" / "delta.safetensors"
    save_delta(trained(), path)
    before = path.read_bytes()

    def full_disk(tensors, name, metadata) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(delta_file, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_delta(trained(seed=1), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


class NormedHead(nn.Module):
    """A dense head with statistics that no gradient moves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.logits = nn.Conv2d(width, 1, 1)

    def forward(self, x_BDHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(self.logits(self.norm(x_BDHW)), size=size)


def multitask(plan: Plan = PLAN) -> MultiTaskModel:
    """Two tasks, experts in blocks 9 and 11, a head with BatchNorm; the same at every call."""
    torch.manual_seed(4)
    model = build_model(
        Config(
            data=DataConfig(tasks=("semseg", "depth"), image_size=(32, 32)),
            model=ModelConfig(backbone="m3vit_tiny_patch16", head_dim=8),
            moe=MoEConfig(blocks=(9, 11), num_experts=4, top_k=2, mlp_ratio=0.25),
            bsr=plan,
        )
    )
    model.heads["depth"] = NormedHead(model.backbone.embed_dim)
    return model.eval()


def test_experts_and_statistics_of_a_multi_task_model(tmp_path) -> None:
    plan = Plan(train_blocks=(9, 11), train_experts=((0, 2), (1,)), drop_blocks=(3,), keep_rate=0.5, restore="adapt")
    model = train(multitask(plan), seed=0)
    info = save_delta(model, tmp_path / "delta.safetensors", base_name="m3vit_tiny_patch16")
    experts = {n.split(".mlp.experts.")[0][-2:] + n.split("fc1.")[1] for n in info.tensors if ".experts.fc1." in n}
    assert experts == {".90.weight", ".90.bias", ".92.weight", ".92.bias", "111.weight", "111.bias"}
    assert {n for n in info.tensors if "running" in n} == {f"heads.depth.norm.running_{n}" for n in ("mean", "var")}
    assert info.plan == plan and info.settings["backbone.blocks.9.mlp.top_k"] == 2

    base = multitask()
    before, statistics = snapshot(base), copy.deepcopy(dict(base.named_buffers()))
    loaded = load_delta(base, tmp_path / "delta.safetensors")
    assert isinstance(loaded, MultiTaskModel) and loaded.backbone.plan == plan
    with torch.no_grad():
        expected, found = model(images()).predictions, loaded(images()).predictions
    assert all(torch.equal(expected[task], found[task]) for task in ("semseg", "depth"))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert memory(base, loaded) == memory(base) + info.num_bytes
    train(loaded, seed=2)  # moves statistics and experts of the delta's model alone
    assert unchanged(base, before)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in base.named_buffers())
    with pytest.raises(ValueError, match="stands on another base, m3vit_tiny_patch16"):
        load_delta(make(depth=12), tmp_path / "delta.safetensors")


def test_compiled_models_are_saved_under_their_own_names(tmp_path) -> None:
    model = trained()
    info = save_delta(torch.compile(model, backend="eager"), tmp_path / "delta.safetensors")
    assert set(info.tensors) == {n for n, p in model.named_parameters() if p.requires_grad}
