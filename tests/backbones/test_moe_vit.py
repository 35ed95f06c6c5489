"""The task backbone: one shared prefix, one stream per task, weights from dense models."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from m3bsr import Plan
from m3bsr.backbones import MoEVisionTransformer, add_moe, load_weights, read_weights, task_backbone
from m3bsr.moe import MoEMlp

TASKS = ("semseg", "depth", "normals")
SIZES = {"patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3}
DEIT = Path(__file__).parents[3] / "shared" / "weights" / "deit_tiny_patch16_224.safetensors"


def make(**overrides) -> MoEVisionTransformer:
    torch.manual_seed(0)
    options = {"img_size": (32, 48), "moe_blocks": (3, 5), "num_experts": 8, "top_k": 4, "renormalize": True}
    return MoEVisionTransformer(**{**SIZES, "tasks": TASKS, **options, **overrides})


def dense(**overrides) -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(**{"img_size": 32, "num_classes": 7, **SIZES, **overrides})


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan((5,), drop_blocks=(1, 4), keep_rate=0.5),
        Plan((3, 5), drop_blocks=(2,), keep_rate=0.6, fuse="mean", restore="bypass"),
    ],
)
@pytest.mark.parametrize(
    ("gate_mode", "gate_input"),
    [("per_task", "after"), ("shared", "after"), ("task_conditioned", "after"), ("per_task", "before")],
)
def test_tasks_together_equal_tasks_alone(plan: Plan, gate_mode: str, gate_input: str) -> None:
    backbone = make(gate_mode=gate_mode, gate_input=gate_input).eval()
    backbone.set_plan(plan)
    together = backbone.forward_tasks(images())
    assert together.grid == (4, 6)
    for task in TASKS:
        alone = backbone.forward_tasks(images(), (task,))
        torch.testing.assert_close(alone.features[task], together.features[task], rtol=1e-4, atol=1e-5)
        assert len(alone.stages[task]) == len(together.stages[task]) == len(plan.drop_blocks)
        for a, b in zip(alone.stages[task], together.stages[task], strict=True):
            assert torch.equal(a.keep_idx_BK, b.keep_idx_BK)


@pytest.mark.parametrize("fuse", ["sum", "mean", "none"])
def test_gates_before_attention_read_the_tokens_that_are_still_there(fuse: str) -> None:
    backbone = make(gate_input="before", gate_mode="task_conditioned").eval()
    backbone.set_plan(Plan((), drop_blocks=(2, 3, 4), keep_rate=(0.7, 0.5, 0.9), fuse=fuse))
    entered: dict[int, torch.Tensor] = {}
    for i in (3, 5):
        backbone.blocks[i].norm1.register_forward_pre_hook(lambda _, args, i=i: entered.update({i: args[0]}))
    with torch.no_grad():
        output = backbone.forward_tasks(images())
    assert entered[3].shape[0] == 2  # still shared by the tasks
    stage = output.stages["depth"][1]
    ordinary = entered[3][:, 1 : 1 + stage.patch_BM.shape[1]]
    kept = torch.stack([tokens[idx] for tokens, idx in zip(ordinary, stage.keep_idx_BK, strict=True)])
    dropped = torch.stack([tokens[idx] for tokens, idx in zip(ordinary, stage.drop_idx_BR, strict=True)])
    weight = stage.weight_BR / (stage.weight_BR.sum(1, keepdim=True) if fuse == "mean" else 1)
    fused = (weight[..., None] * dropped).sum(1, keepdim=True)
    protected = entered[3][:, 1 + ordinary.shape[1] :]
    parts = {"sum": [kept, fused], "mean": [kept, protected, fused], "none": [kept]}[fuse]
    expected = {3: torch.cat([entered[3][:, :1], *parts], dim=1).repeat(3, 1, 1), 5: entered[5]}
    for i, before_BND in expected.items():
        routing = backbone.blocks[i].mlp.route(before_BND, TASKS)
        torch.testing.assert_close(output.routing[i].weights_TK, routing.weights_TK)
        assert (output.routing[i].experts_TK == routing.experts_TK).float().mean() > 0.99


def test_gates_before_attention_get_the_same_gradients_when_recomputed() -> None:
    gradients = []
    for recompute in ("none", "both"):
        backbone = make(gate_input="before")
        backbone.set_plan(Plan((3, 5), drop_blocks=(3,), keep_rate=0.5, restore="bypass", recompute=recompute))
        output = backbone.forward_tasks(images())
        (sum(f.square().mean() for f in output.features.values()) + output.balance_loss).backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "blocks.3.mlp.gates.depth.w_gate" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("gate_mode", "gate_input"), [("per_task", "after"), ("per_task", "before"), ("shared", "after")]
)
def test_drops_from_the_backward_pass_leave_what_tasks_see(gate_mode: str, gate_input: str) -> None:
    backbone = make(gate_mode=gate_mode, gate_input=gate_input).train()
    backbone.set_plan(Plan((3, 5)))
    expected = backbone.forward_tasks(images())
    plan = Plan((3, 5), drop_blocks=(1, 4), keep_rate=0.5, drop_from="backward", select="cover")
    backbone.set_plan(plan)
    output = backbone.forward_tasks(images())
    for task in TASKS:
        torch.testing.assert_close(output.features[task], expected.features[task], rtol=1e-4, atol=1e-5)
        assert [stage.keep_idx_BK.shape for stage in output.stages[task]] == [(2, 12), (2, 6)]
    assert output.routing[5].experts_TK.shape[0] == (len(TASKS) if gate_mode == "per_task" else 1) * 2 * 7
    (sum(f.square().mean() for f in output.features.values()) + output.balance_loss).backward()
    trained = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert any("blocks.5.mlp.gates" in name for name in trained) and not any("blocks.4" in name for name in trained)


def test_behind_task_gates_each_task_drops_its_own_tokens() -> None:
    backbone = make(gate_mode="per_task").eval()
    for gate in backbone.blocks[3].mlp.gates.values():
        torch.nn.init.normal_(gate.w_gate, std=3.0)
    for select in ("score", "cover"):
        backbone.set_plan(Plan((5,), drop_blocks=(1, 4), keep_rate=0.5, select=select, score_source="own"))
        stages = backbone.forward_tasks(images()).stages
        shared, own = ({tuple(stages[t][i].patch_after_BN.flatten().tolist()) for t in TASKS} for i in (0, 1))
        assert len(shared) == 1 and len(own) > 1


def test_windows_and_task_codes_reach_the_layers() -> None:
    backbone = make(experts_per_task=4, task_dim=5, gate_mode="task_conditioned", num_experts=(8, 6))
    first, last = backbone.blocks[3].mlp, backbone.blocks[5].mlp
    assert (first.num_experts, last.num_experts) == (8, 6)
    assert first.windows == {"semseg": (0, 4), "depth": (2, 6), "normals": (4, 8)}
    assert last.windows["normals"] == (2, 6)
    assert first.gates["shared"].w_gate.shape == (24 + 5, 8)
    with pytest.raises(ValueError, match=r"moe.num_experts has 3 numbers for 2 MoE blocks \(3, 5\)"):
        make(num_experts=(8, 6, 4))


def test_the_prefix_is_computed_once_and_one_task_costs_one_path() -> None:
    backbone = make(moe_blocks=(5,)).eval()

    def flops(tasks: tuple[str, ...]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(images(), tasks)
        return counter.get_total_flops()

    one, two, three = flops(TASKS[:1]), flops(TASKS[:2]), flops(TASKS)
    assert three - two == two - one < one / 6  # only the last block's MLP is done again


def test_no_state_is_left_and_the_balance_loss_reaches_the_gates() -> None:
    backbone = make()
    before = set(backbone.__dict__)
    output = backbone.forward_tasks(images())
    output.balance_loss.backward()
    assert set(backbone.__dict__) == before
    gate = backbone.blocks[3].mlp.gates["depth"]
    assert gate.w_gate.grad is not None and gate.w_gate.grad.abs().sum() > 0
    assert output.routing.keys() == {3, 5} and output.routing[3].tasks == TASKS


@pytest.mark.parametrize(("upcycle", "moe_mlp_ratio"), [("copy", 4.0), ("split", 1.0)])
def test_upcycled_weights_start_as_the_dense_model(upcycle: str, moe_mlp_ratio: float) -> None:
    vit = dense(img_size=(32, 48)).eval()
    backbone = make(moe_mlp_ratio=moe_mlp_ratio).eval()
    report = load_weights(backbone, vit.state_dict(), upcycle=upcycle)
    assert report.upcycled_blocks == (3, 5) and report.ignored == ("head", "norm")
    vit.norm = torch.nn.Identity()
    expected = vit.forward_features(images())
    for features in backbone(images()).values():
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_position_embeddings_are_resampled_also_with_as_many_patches() -> None:
    vit = dense(img_size=48)  # 6 x 6
    wide = MoEVisionTransformer(img_size=(32, 72), moe_blocks=(), tasks=TASKS, **SIZES)  # 4 x 9: also 36
    load_weights(wide, vit.state_dict())
    assert not torch.allclose(wide.pos_embed, vit.pos_embed)
    torch.testing.assert_close(wide.pos_embed[:, 0], vit.pos_embed[:, 0])
    same = MoEVisionTransformer(img_size=48, moe_blocks=(), tasks=TASKS, **SIZES)
    load_weights(same, vit.state_dict())
    assert torch.equal(same.pos_embed, vit.pos_embed)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_files_load(tmp_path: Path, suffix: str) -> None:
    vit, path = dense(), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(vit.state_dict(), path)
    elif suffix == ".pth":
        torch.save({"model": vit.state_dict(), "epoch": 3}, path)
    else:
        write_npz(vit, path)
    backbone = MoEVisionTransformer(img_size=32, moe_blocks=(), tasks=TASKS, **SIZES)
    load_weights(backbone, path)
    own = backbone.state_dict()
    assert all(torch.equal(own[k], v) for k, v in vit.state_dict().items() if k in own)


def write_npz(vit: VisionTransformer, path: Path) -> None:
    """The layout of the ImageNet-21k files, as far as timm reads it."""
    import numpy as np

    state = {k: v.numpy() for k, v in vit.state_dict().items()}
    D, H = vit.embed_dim, vit.blocks[0].attn.num_heads
    out = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(len(vit.blocks)):
        block, target = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{target}{theirs}/scale"] = state[f"{block}{ours}.weight"]
            out[f"{target}{theirs}/bias"] = state[f"{block}{ours}.bias"]
        qkv, bias = state[f"{block}attn.qkv.weight"], state[f"{block}attn.qkv.bias"]
        for n, name in enumerate(("query", "key", "value")):
            out[f"{target}MultiHeadDotProductAttention_1/{name}/kernel"] = qkv[n * D : (n + 1) * D].T.reshape(D, H, -1)
            out[f"{target}MultiHeadDotProductAttention_1/{name}/bias"] = bias[n * D : (n + 1) * D].reshape(H, -1)
        out[f"{target}MultiHeadDotProductAttention_1/out/kernel"] = state[f"{block}attn.proj.weight"].T.reshape(
            H, -1, D
        )
        out[f"{target}MultiHeadDotProductAttention_1/out/bias"] = state[f"{block}attn.proj.bias"]
        for n, name in enumerate(("fc1", "fc2")):
            out[f"{target}MlpBlock_3/Dense_{n}/kernel"] = state[f"{block}mlp.{name}.weight"].T
            out[f"{target}MlpBlock_3/Dense_{n}/bias"] = state[f"{block}mlp.{name}.bias"]
    renamed = {k.replace("LayerNorm_2", "LayerNorm_2"): v for k, v in out.items()}
    np.savez(path, **renamed)


def test_real_deit_weights_load_and_are_upcycled() -> None:
    if not DEIT.is_file():
        pytest.skip(f"needs the DeiT-tiny weights at {DEIT}")
    backbone = timm.create_model("m3vit_tiny_patch16", img_size=(240, 320), tasks=("semseg", "depth"), renormalize=True)
    report = load_weights(backbone, DEIT, upcycle="split")
    assert report.upcycled_blocks == (1, 3, 5, 7, 9, 11)
    assert backbone.pos_embed.shape == (1, 1 + 15 * 20, 192)


def test_weights_with_another_head_count_are_refused() -> None:
    twelve = MoEVisionTransformer(embed_dim=384, depth=1, num_heads=12, moe_blocks=(), tasks=TASKS)
    six = VisionTransformer(embed_dim=384, depth=1, num_heads=6).state_dict()
    with pytest.raises(ValueError, match="6 attention heads, the model has 12"):
        load_weights(twelve, six)
    load_weights(twelve, six, num_heads=12)


def test_bad_weight_files_are_refused(tmp_path: Path) -> None:
    backbone = make(moe_blocks=(), img_size=32)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(backbone, tmp_path / "none.safetensors")
    for name in ("broken.safetensors", "broken.pth", "broken.npz"):
        (tmp_path / name).write_bytes(b"\x00\x01 not weights")
        with pytest.raises(ValueError, match=name):
            load_weights(backbone, tmp_path / name)
    torch.save({"model": {"x": object}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth"):
        read_weights(tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="has shape"):
        load_weights(backbone, dense(embed_dim=48).state_dict())
    with pytest.raises(ValueError, match="missing"):
        load_weights(backbone, {})


def test_weights_load_under_a_plan_that_adds_parameters() -> None:
    """The maps of ``adapt`` are the plan's own; no file of a backbone has them."""
    backbone = make(moe_blocks=(), img_size=32)
    backbone.set_plan(Plan((3, 5), drop_blocks=(1,), keep_rate=0.5, restore="adapt"))
    weights = dense(img_size=32).state_dict()
    load_weights(backbone, weights)
    assert torch.equal(backbone.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    assert torch.equal(backbone.bsr_adapters["1"].weight, torch.ones(24))


@pytest.mark.parametrize("cls", [VisionTransformer, VisionTransformerDistilled])
def test_any_timm_vit_serves_tasks_and_takes_experts(cls: type) -> None:
    backbone = task_backbone(cls(img_size=(32, 48), num_classes=3, **SIZES), TASKS)
    dense_features = backbone(images())
    assert dense_features["depth"] is dense_features["semseg"]
    add_moe(
        backbone, blocks=(4,), tasks=TASKS, num_experts=4, top_k=2, mlp_ratio=1, gate="noisy_topk", gate_mode="per_task"
    )
    assert backbone.moe_blocks == (4,) and isinstance(backbone.blocks[4].mlp, MoEMlp)
    features = backbone.eval()(images())
    assert features["depth"].shape == (2, 24 + backbone.num_prefix_tokens, 24)
    assert not torch.equal(features["depth"], features["semseg"])
    with pytest.raises(ValueError, match="out of range"):
        add_moe(
            backbone, blocks=(6,), tasks=TASKS, num_experts=4, top_k=2, mlp_ratio=1, gate="vmoe", gate_mode="shared"
        )
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        backbone(images(), tasks=("dept",))


def test_registered_models_have_moe_at_odd_blocks_and_any_size() -> None:
    model = timm.create_model("m3vit_tiny_patch16", img_size=(48, 80), tasks=("depth",), num_experts=4, top_k=2)
    assert isinstance(model, MoEVisionTransformer) and model.moe_blocks == (1, 3, 5, 7, 9, 11)
    assert model.blocks[0].attn.num_heads == 3
    assert model(torch.randn(1, 3, 48, 80))["depth"].shape == (1, 16, 192)
    model.set_input_size((64, 64))
    assert model(torch.randn(1, 3, 64, 64))["depth"].shape == (1, 17, 192)
