"""Every backend against the loop, forward and backward."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3bsr.moe.backends import BACKENDS, check_backend, fmoe, grouped_mm, resolve_backend, run_experts
from m3bsr.moe.backends.grouped import pad_rows
from m3bsr.moe.dispatch import plan_dispatch
from m3bsr.moe.experts import Experts

D, H, E, K = 16, 24, 5, 2
FAST = ("grouped", "low_memory")
CPU_BACKENDS = (*FAST, "grouped_mm")
PATTERNS: dict[str, tuple[int, ...] | str] = {"all": "all", "none": (), "one": (3,), "some": (0, 3), "last": (4,)}


def choices(kind: str) -> Tensor:
    """`[T, K]` expert ids of one scenario."""
    generator = torch.Generator().manual_seed(0)
    even = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(37)])
    return {
        "even": even,
        "empty_expert": torch.where(even == 2, 4, even),  # expert 2 idle; makes duplicate choices as well
        "all_on_one": torch.full((37, K), 3),
        "one_choice": even[:, :1],
        "duplicates": even[:, :1].expand(-1, K).contiguous(),
        "one_token": even[:1],
        "no_tokens": even[:0],
    }[kind]


def make_experts(dtype: torch.dtype = torch.float32, num_experts: int = E) -> Experts:
    torch.manual_seed(0)
    experts = Experts(num_experts, D, H)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3)
    return experts.to(dtype)


def run_all(
    backend: str,
    experts: Experts,
    ids_TK: Tensor,
    dtype: torch.dtype,
    *,
    x_grad: bool = True,
    gate_grad: bool = True,
    rounded_to: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """Output and every gradient, by name; in `dtype`, from numbers that `rounded_to` can hold."""
    generator, held = torch.Generator().manual_seed(2), rounded_to or dtype
    x = torch.randn(ids_TK.shape[0], D, generator=generator).to(held).to(dtype).requires_grad_(x_grad)
    weights = torch.rand(ids_TK.shape, generator=generator).to(held).to(dtype).requires_grad_(gate_grad)
    target = torch.randn(ids_TK.shape[0], D, generator=generator).to(held).to(dtype)
    experts.zero_grad()
    y = run_experts(x, weights, ids_TK, experts, backend)
    if y.requires_grad:
        (y * target).sum().backward()
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **grads}


def assert_same(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None], rtol: float, atol: float) -> None:
    assert got.keys() == wanted.keys()
    for name, reference in wanted.items():
        value = got[name]
        none = value is None, reference is None
        assert none in ((True, True), (False, False)), f"{name}: one has a gradient, the other has none: {none}"
        if reference is not None:
            torch.testing.assert_close(value, reference, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "kind", ["even", "empty_expert", "all_on_one", "one_choice", "duplicates", "one_token", "no_tokens"]
)
def test_parity_with_the_loop(backend: str, pattern: str, kind: str) -> None:
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    experts = make_experts(dtype)
    experts.set_trainable(PATTERNS[pattern])
    for x_grad, gate_grad in ((True, True), (False, True), (True, False), (False, False)):
        wanted = run_all("loop", experts, choices(kind), dtype, x_grad=x_grad, gate_grad=gate_grad)
        got = run_all(backend, experts, choices(kind), dtype, x_grad=x_grad, gate_grad=gate_grad)
        assert_same(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("frozen", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"])
def test_parity_with_a_single_kind_of_tensor_frozen_or_trained(backend: str, frozen: str) -> None:
    experts = make_experts(torch.float64)
    layer, kind = frozen.split(".")
    for trains in (False, True):
        for name, parameter in experts.named_parameters():
            is_it = name.startswith(layer) and name.endswith(kind)
            parameter.requires_grad_(is_it if trains else not is_it)
        for x_grad in (True, False):
            wanted = run_all("loop", experts, choices("even"), torch.float64, x_grad=x_grad, gate_grad=x_grad)
            got = run_all(backend, experts, choices("even"), torch.float64, x_grad=x_grad, gate_grad=x_grad)
            assert_same(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_parity_for_every_set_of_frozen_experts(backend: str) -> None:
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    experts = make_experts(dtype)
    for number in range(2**E):
        experts.set_trainable([e for e in range(E) if number >> e & 1])
        for grads in (True, False):
            wanted = run_all("loop", experts, choices("empty_expert"), dtype, x_grad=grads, gate_grad=grads)
            got = run_all(backend, experts, choices("empty_expert"), dtype, x_grad=grads, gate_grad=grads)
            assert_same(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_single_expert_is_the_mlp_itself(backend: str) -> None:
    experts = make_experts(num_experts=1)
    only = torch.zeros(9, 1, dtype=torch.int64)
    wanted = run_all("loop", experts, only, torch.float32)
    assert_same(run_all(backend, experts, only, torch.float32), wanted, rtol=1e-5, atol=1e-5)
    x = torch.randn(9, D)
    y = run_experts(x, torch.ones(9, 1), torch.zeros(9, 1, dtype=torch.int64), experts, backend)
    mlp = torch.nn.Sequential(experts.fc1[0], torch.nn.GELU(), experts.fc2[0])
    torch.testing.assert_close(y, mlp(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_gradcheck(backend: str) -> None:
    torch.manual_seed(0)
    experts = Experts(3, 3, 4).double()
    for parameter in experts.parameters():
        parameter.data.normal_()
    experts.fc1[1].requires_grad_(False)
    ids = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 1]])  # expert 2 idle, one duplicate
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    inputs = (x, weights, *(p for p in experts.parameters() if p.requires_grad))
    assert torch.autograd.gradcheck(lambda x, w, *_: run_experts(x, w, ids, experts, backend), inputs)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["even", "empty_expert", "all_on_one", "duplicates", "one_token", "no_tokens"])
def test_bf16_agrees_to_its_precision(backend: str, pattern: str, kind: str) -> None:
    """Against the loop in float64 on the same (rounded) numbers; rows of an expert are padded to 16 here."""
    experts = make_experts(torch.bfloat16)
    experts.set_trainable(PATTERNS[pattern])
    got = run_all(backend, experts, choices(kind), torch.bfloat16)
    wanted = run_all("loop", experts.double(), choices(kind), torch.float64, rounded_to=torch.bfloat16)
    for name, value in wanted.items():
        assert (value is None) == (got[name] is None), name
        if value is not None and value.numel():
            assert (got[name] - value).abs().max().item() <= 0.03 * value.abs().max().item(), name


@pytest.mark.parametrize("backend", (*CPU_BACKENDS, "loop"))
def test_autocast_computes_in_bf16_and_keeps_fp32_gradients(backend: str) -> None:
    experts = make_experts()
    x, weights = torch.randn(37, D, requires_grad=True), torch.rand(37, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = run_experts(x, weights, choices("even"), experts, backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # an expanded gradient, which grouped_mm alone refuses
    assert x.grad.dtype == weights.grad.dtype == experts.fc1[0].weight.grad.dtype == torch.float32
    exact = run_experts(x, weights, choices("even"), experts, "loop")
    assert ((y - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_result_does_not_depend_on_what_memory_held(backend: str) -> None:
    experts = make_experts()
    clean = run_all(backend, experts, choices("empty_expert"), torch.float32)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # fills fresh buffers with NaN
    try:
        dirty = run_all(backend, experts, choices("empty_expert"), torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(dirty, clean, rtol=0, atol=0)


def test_dispatch_sorts_stably_and_pads() -> None:
    ids = torch.tensor([[2, 0], [0, 3], [2, 2]])
    plain = plan_dispatch(ids, 4)
    assert plain.counts == (2, 0, 3, 1) and plain.spans == ((0, 2), (2, 2), (2, 5), (5, 6))
    assert plain.tokens_R.tolist() == [0, 1, 0, 2, 2, 1]
    padded = plan_dispatch(ids, 4, pad_rows=4)
    assert padded.counts == plain.counts and padded.spans == ((0, 4), (4, 4), (4, 8), (8, 12))
    for plan in (plain, padded):
        assert torch.equal(plan.tokens_R[plan.row_TK], torch.arange(3)[:, None].expand(3, 2))
        weights = plan.row_weights(torch.ones(3, 2))
        assert weights.sum() == 6 and weights.shape == (plan.num_rows,)


def test_bf16_on_cpu_pads_and_fp32_does_not() -> None:
    assert pad_rows(torch.zeros(1, dtype=torch.bfloat16)) == 16
    assert pad_rows(torch.zeros(1)) == 1


@pytest.mark.parametrize("pattern", ["some", "none"])
def test_grouped_stores_no_rows_for_frozen_experts(pattern: str) -> None:
    experts = make_experts()
    stored: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor.numel())
        return tensor

    sizes = {}
    for name in ("all", pattern):
        experts.set_trainable(PATTERNS[name])
        stored.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run_experts(torch.randn(37, D, requires_grad=True), torch.rand(37, K), choices("even"), experts, "grouped")
        sizes[name] = sum(stored)
    rows = 37 * K
    counts = plan_dispatch(choices("even"), E).counts
    kept = sum(counts[e] for e in PATTERNS[pattern])
    assert sizes["all"] - sizes[pattern] == (rows - kept) * (D + H)


def test_low_memory_saves_inputs_only() -> None:
    experts = make_experts()
    stored: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(tuple(t.shape)) or t, lambda t: t):
        x = torch.randn(37, D, requires_grad=True)
        run_experts(x, torch.rand(37, K, requires_grad=True), choices("even"), experts, "low_memory")
    parameters = [tuple(p.shape) for p in experts.parameters()]
    assert sorted(stored) == sorted([(37, D), (37, K), *parameters])


def test_low_memory_keeps_no_copies_of_the_weights_under_autocast() -> None:
    experts = make_experts()
    stored: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        x = torch.randn(37, D, requires_grad=True)
        y = run_experts(x, torch.rand(37, K, requires_grad=True), choices("even"), experts, "low_memory")
    own = {p.data_ptr() for p in experts.parameters()}
    copies = [t for t in stored if t.data_ptr() not in own]
    assert sorted(tuple(t.shape) for t in copies) == sorted([(37, D), (37, K)]), "tokens and weights only"
    y.float().sum().backward()
    assert experts.fc1[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", FAST)
def test_frozen_experts_cost_no_weight_gemm(backend: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    experts, ids, flops = make_experts(), choices("even"), {}
    for pattern in ("all", "some", "none"):
        experts.set_trainable(PATTERNS[pattern])
        y = run_experts(torch.randn(37, D, requires_grad=True), torch.rand(37, K), ids, experts, backend)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        flops[pattern] = counter.get_total_flops()
    trained_rows = sum(plan_dispatch(ids, E).counts[e] for e in PATTERNS["some"])
    assert flops["all"] - flops["none"] == 2 * 2 * 37 * K * D * H
    assert flops["some"] - flops["none"] == 2 * 2 * trained_rows * D * H


def test_work_and_optimizer_state_fall_with_the_trained_experts() -> None:
    """Weight-gradient FLOPs go with the tokens of the trained experts, gradients and moments with their number."""
    from torch.utils.flop_counter import FlopCounterMode

    ids, counts = choices("even"), plan_dispatch(choices("even"), E).counts
    flops, state_bytes = {}, {}
    for trained in ((), (3,), (0, 3), (1, 2, 4), tuple(range(E))):
        experts = make_experts()
        experts.set_trainable(trained)
        y = run_experts(torch.randn(37, D, requires_grad=True), torch.rand(37, K), ids, experts, "grouped")
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        flops[trained] = counter.get_total_flops()
        if trained:
            optimizer = torch.optim.AdamW(p for p in experts.parameters() if p.requires_grad)
            optimizer.step()
            moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
            gradients = [p.grad for p in experts.parameters() if p.grad is not None]
            state_bytes[trained] = sum(t.nbytes for t in moments + gradients)
    for trained in state_bytes:
        share = sum(counts[e] for e in trained) / sum(counts)
        everything = tuple(range(E))
        assert flops[trained] - flops[()] == share * (flops[everything] - flops[()])
        assert state_bytes[trained] == state_bytes[everything] * len(trained) // E


def test_first_trained_layer_backpropagates_trained_rows_only() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    experts, ids = make_experts(), choices("even")
    experts.set_trainable((0, 3))
    rows = sum(plan_dispatch(ids, E).counts[e] for e in (0, 3))
    for backend in FAST:
        y = run_experts(torch.randn(37, D), torch.rand(37, K), ids, experts, backend)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        recomputed = 2 * 37 * K * D * H if backend == "low_memory" else 0
        assert counter.get_total_flops() == 3 * 2 * rows * D * H + recomputed, backend


def test_auto_on_cpu_is_grouped() -> None:
    assert resolve_backend("auto", torch.zeros(1, D), make_experts()) is BACKENDS["grouped"]
    assert not grouped_mm.is_fast(torch.device("cpu"), torch.bfloat16, make_experts())


def test_a_named_backend_that_cannot_serve_says_why() -> None:
    with pytest.raises(ValueError, match="grouped_mm.*not available.*float64"):
        resolve_backend("grouped_mm", torch.zeros(1, D, dtype=torch.float64), make_experts())
    with pytest.raises(ValueError, match="multiple of 16 bytes, embed_dim=6"):
        resolve_backend("grouped_mm", torch.zeros(1, 6), Experts(2, 6, 8))
    with pytest.raises(ValueError, match="groupd"):
        check_backend("groupd")


def test_fmoe_without_fastmoe_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmoe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="fmoe.*not available: fastmoe is not installed"):
        check_backend("fmoe")


def test_fmoe_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel without its CUDA part: the import fails, not the look-up."""
    (tmp_path / "fmoe").mkdir()
    (tmp_path / "fmoe" / "__init__.py").write_text("import fmoe_cuda_that_was_never_built")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="fmoe.*not available: fastmoe does not load.*fmoe_cuda_that"):
        check_backend("fmoe")


def test_fmoe_calls_the_library_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for fastmoe's kernel: rows sorted by expert, counts on the CPU, weights stacked."""

    class MOELinear:
        @staticmethod
        def apply(rows: Tensor, counts: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            parts = rows.split(counts.tolist())
            return torch.cat([p @ w.t() + b for p, w, b in zip(parts, weight, bias, strict=True)])

    linear = types.ModuleType("fmoe.linear")
    linear.MOELinear = MOELinear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fmoe", types.ModuleType("fmoe"))
    monkeypatch.setitem(sys.modules, "fmoe.linear", linear)
    experts = make_experts(torch.float64)
    wanted = run_all("loop", experts, choices("even"), torch.float64)
    monkeypatch.setattr(fmoe, "why_not", lambda *_: None)
    monkeypatch.setattr(fmoe, "missing", lambda: None)
    assert_same(run_all("fmoe", experts, choices("even"), torch.float64), wanted, rtol=1e-12, atol=1e-12)


def test_fmoe_refuses_cpu_tokens_and_frozen_experts() -> None:
    experts = make_experts()
    assert "CUDA kernels only" in fmoe.why_not(torch.device("cpu"), torch.float32, experts)
    experts.set_trainable((1,))
    assert "frozen" in fmoe.why_not(torch.device("cuda"), torch.float32, experts)
