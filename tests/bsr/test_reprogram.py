"""The model that ``reprogram`` returns: any timm ViT, same keys, frozen means frozen."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from m3bsr import Plan, reprogram

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 5}
FAMILIES = {
    "vit": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4, "init_values": 1e-1, "no_embed_class": True}),
    "layer_scale": (VisionTransformer, {"init_values": 1e-1}),
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "average_pool": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "qk_norm": (VisionTransformer, {"qk_norm": True}),
    "pre_norm": (VisionTransformer, {"pre_norm": True}),
    "not_square": (VisionTransformer, {"img_size": (24, 40)}),
}


def make(family: str = "vit", **overrides) -> VisionTransformer:
    torch.manual_seed(0)
    cls, options = FAMILIES[family]
    return cls(**{**TINY, **options, **overrides})


def images(vit: VisionTransformer, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


PLAN = Plan(train_blocks=(2, 5), drop_blocks=(1, 3), keep_rate=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_rate_one_equals_timm_and_dropping_counts_tokens(family: str) -> None:
    vit = make(family)
    x = images(vit)
    expected, keys = vit(x), list(vit.state_dict())
    model = reprogram(vit, Plan(train_blocks=(2, 5), drop_blocks=(1, 3), keep_rate=1.0))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == keys
    assert isinstance(model, type(vit))

    for fuse in ("sum", "mean", "none"):
        model = reprogram(vit, Plan(train_blocks=(2, 5), drop_blocks=(1, 3), keep_rate=(0.6, 0.5), fuse=fuse))
        state, _ = model.forward_tokens(x)
        assert state.x_BND.shape[1] == model.tokens_after_block[-1]
        model(x).sum().backward()
        trained = {
            n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None and n.startswith("blocks")
        }
        assert trained == {"2", "5"}


def test_parameters_are_shared_and_report_counts() -> None:
    vit = timm.create_model("deit_small_patch16_224", num_classes=10)
    model = reprogram(vit, Plan(train_blocks=(3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.5, score_source="own"))
    report = model.report()
    assert (report.parameters.trained, report.parameters.total) == (5_328_010, 21_669_514)
    assert report.tokens_after_block == (197,) * 3 + (100,) * 3 + (52,) * 3 + (28,) * 3
    assert "5,328,010" in str(report)
    assert all(a is b for a, b in zip(vit.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fuse", "rate", "counts"),
    [("none", 0.5, (99, 50, 26)), ("sum", 0.7, (140, 100, 72)), ("none", 0.7, (139, 98, 69))],
)
def test_reference_token_counts(fuse: str, rate: float, counts: tuple[int, ...]) -> None:
    with torch.device("meta"):
        vit = VisionTransformer(num_classes=10, embed_dim=24, num_heads=3)
    model = reprogram(vit, Plan(train_blocks=(4,), drop_blocks=(3, 6, 9), keep_rate=rate, fuse=fuse))
    assert model.tokens_after_block[3::3] == counts


def test_frozen_parameters_are_bit_identical_after_training_and_have_no_state() -> None:
    model = reprogram(make(), PLAN)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images(model)), torch.tensor([0, 1])).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        chosen = name.startswith(("blocks.2.", "blocks.5.", "norm.", "head."))
        assert parameter.requires_grad == chosen
        assert torch.equal(parameter, before[name]) != chosen, name


def test_no_graph_before_the_first_trained_block() -> None:
    model = reprogram(make(), Plan(train_blocks=(4,), drop_blocks=(1,), keep_rate=0.5))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, i=i: None)
        state, _ = model.forward_tokens(images(model))
    assert state.x_BND.requires_grad
    tokens = model.tokens_after_block
    # block 0 has 65 tokens, after the drop there are 34: nothing that autograd keeps may have 65
    assert saved and not any(65 in t.shape for t in saved if t.ndim >= 2 and t.shape[0] == 2)
    assert tokens[0] == 65 and tokens[-1] == 34


def test_all_blocks_and_keep_rate_one_gives_bit_equal_losses() -> None:
    def losses(plan: Plan) -> list[float]:
        model = reprogram(make(), plan)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        result = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images(model)), torch.tensor([0, 1]))
            loss.backward()
            optimizer.step()
            result.append(loss.item())
        return result

    bsr = losses(Plan(train_blocks="all", drop_blocks=(1, 3), keep_rate=1.0, score_source="own"))
    assert bsr == losses(Plan()) and bsr[0] != bsr[-1]


def test_score_source_frozen_uses_the_block_before_and_carries_no_gradient() -> None:
    vit = make()
    plan = Plan(train_blocks=(2,), drop_blocks=(2,), keep_rate=0.5, fuse="sum", score_source="frozen")
    model = reprogram(vit, plan)
    assert model.roles.score_of == {2: 1}
    kept = model.forward_tokens(images(vit))[0].stages[0].keep_idx_BK
    at_one = reprogram(vit, Plan(train_blocks=(2,), drop_blocks=(1,), keep_rate=0.5, fuse="none"))
    assert torch.equal(kept, at_one.forward_tokens(images(vit))[0].stages[0].keep_idx_BK)
    with pytest.raises(ValueError, match="score_source"):
        reprogram(vit, Plan(train_blocks=(0, 1), drop_blocks=(1,), keep_rate=0.5, score_source="frozen"))


def test_batch_elements_are_independent_and_heads_may_be_permuted() -> None:
    vit = make()
    model = reprogram(vit, PLAN).eval()
    x = images(vit, 3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-5, atol=1e-6)

    permuted = reprogram(copy.deepcopy(vit), PLAN).eval()
    order = torch.tensor([2, 0, 1])
    for block in permuted.blocks:
        width = block.attn.head_dim
        rows = (order.view(-1, 1) * width + torch.arange(width)).flatten()
        qkv = torch.cat([rows, rows + 24, rows + 48])
        with torch.no_grad():
            block.attn.qkv.weight.copy_(block.attn.qkv.weight[qkv])
            block.attn.qkv.bias.copy_(block.attn.qkv.bias[qkv])
            block.attn.proj.weight.copy_(block.attn.proj.weight[:, rows])
    torch.testing.assert_close(model(x), permuted(x), rtol=1e-4, atol=1e-5)


def test_recompute_gives_the_same_gradients_and_stores_less() -> None:
    def run(recompute: str) -> tuple[list[torch.Tensor], int]:
        model = reprogram(make(depth=8), Plan(train_blocks=(1,), drop_blocks=(3,), keep_rate=0.5, recompute=recompute))
        stored: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(images(model)).square().sum()
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None], sum(stored.values())

    (plain, plain_bytes), (again, again_bytes) = run("none"), run("frozen")
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    assert again_bytes < 0.6 * plain_bytes


@pytest.mark.parametrize("mode", ["bypass", "adapt", "interpolate", "transfer", "unmerge"])
def test_restore_before_mends_the_grid(mode: str) -> None:
    vit = make()
    plan = Plan(train_blocks=(5,), drop_blocks=(1, 3), keep_rate=0.5, restore=mode, restore_before=5)
    model = reprogram(vit, plan)
    state, _ = model.forward_tokens(images(vit))
    assert state.x_BND.shape[1] == 65 and model.tokens_after_block == (65, 34, 34, 19, 19, 65)
    state.x_BND.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_copies_pickles_and_state_dicts_round_trip() -> None:
    model = reprogram(make(), PLAN).eval()
    x = images(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x)) and twin.plan == PLAN
    fresh = make()
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(reprogram(fresh, PLAN).eval()(x), model(x))


def test_schedule_goes_from_no_drop_to_the_keep_rate_in_training_only() -> None:
    model = reprogram(
        make(),
        Plan(train_blocks=(5,), drop_blocks=(1,), keep_rate=0.5, fuse="none", schedule="cosine", schedule_steps=10),
    )
    counts = []
    for step in (0, 5, 10, 20):
        model.set_step(step)
        counts.append(model.forward_tokens(images(model))[0].x_BND.shape[1])
    assert counts == [65, 1 + 48, 33, 33]
    model.set_step(0)
    assert model.eval().forward_tokens(images(model))[0].x_BND.shape[1] == 33


def test_a_second_plan_gets_adapters_for_its_own_drops_and_keeps_those_that_it_shares() -> None:
    plan = Plan(train_blocks=(5,), drop_blocks=(1, 3), keep_rate=0.5, restore="adapt")
    model = reprogram(make(), plan)
    shared = model.bsr_adapters["3"]
    again = reprogram(model, replace(plan, drop_blocks=(2, 3)))
    assert set(again.bsr_adapters) == {"2", "3"} and again.bsr_adapters["3"] is shared
    again.forward_tokens(images(model), restorable=True)


def test_the_pooling_of_a_model_without_class_token_trains_with_its_head() -> None:
    model = reprogram(make("siglip"), Plan(train_blocks=()))
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"norm", "attn_pool", "head"}


def test_evaluation_at_its_own_keep_rate_is_the_plan_with_that_rate() -> None:
    plan = Plan(train_blocks=(5,), drop_blocks=(1, 3), keep_rate=0.3, score_source="own")
    vit = make()
    x = images(reprogram(vit, plan))
    trains_on = reprogram(vit, plan).train()(x)
    same, whole = reprogram(vit, replace(plan, keep_rate=0.7)).eval()(x), reprogram(vit, Plan(())).eval()(x)
    model = reprogram(vit, replace(plan, eval_keep_rate=0.7))
    assert torch.equal(model.train()(x), trains_on) and torch.equal(model.eval()(x), same)
    assert not torch.allclose(trains_on, same)
    torch.testing.assert_close(reprogram(vit, replace(plan, eval_keep_rate=1.0)).eval()(x), whole)


def test_bf16_and_compile_agree() -> None:
    model = reprogram(make(), PLAN).eval()
    x = images(model)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.05)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop_blocks": (5,), "keep_rate": 0.5}, "last block"),
        ({"drop_blocks": (9,), "keep_rate": 0.5}, "drop_blocks"),
        ({"train_blocks": (6,)}, "train_blocks"),
        ({"drop_blocks": (1,), "keep_rate": -0.5}, "keep_rate"),
        ({"drop_blocks": (1, 2), "keep_rate": (0.5,)}, "keep_rate"),
        ({"fuse": "product"}, "fuse"),
        ({"select": "cove"}, "bsr.select 'cove'.*'cover'"),
        ({"proportional": True}, "bsr.proportional"),
        ({"proportional": True, "fuse": "merge", "drop_from": "backward"}, "bsr.proportional"),
    ],
)
def test_bad_plans_are_refused_by_field(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reprogram(make(), Plan(**{"train_blocks": (2,), **fields}))


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="VisionTransformer"):
        reprogram(torch.nn.Linear(2, 2), Plan())
