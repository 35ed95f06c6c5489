"""Gates: a contract that every entry of GATES keeps, then each gate's own definition by brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from m3bsr.moe import balance
from m3bsr.moe.gates import GATES
from m3bsr.moe.gates.linear import expert_windows
from m3bsr.moe.gates.noisy_topk import MIN_STD, NoisyTopKGate
from m3bsr.moe.gates.slots import SlotGate
from m3bsr.moe.gates.vmoe import VMoEGate

D, E, K, T = 12, 8, 3, 40
ALL_GATES = pytest.mark.parametrize("name", GATES)


def make_gate(name: str, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    gate = GATES[name](D, E, K, **kwargs)
    gate.w_gate.data.mul_(20)  # routing that is far from uniform
    return gate


def tokens(num: int = T) -> torch.Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(1))


@ALL_GATES
@pytest.mark.parametrize("training", [True, False])
def test_choices_are_distinct_ordered_and_weighted(name: str, training: bool) -> None:
    routed = make_gate(name).train(training)(tokens())
    assert routed.experts_TK.shape == routed.weights_TK.shape == (T, K)
    assert routed.experts_TK.dtype == torch.int64
    assert all(len(set(row)) == K and min(row) >= 0 and max(row) < E for row in routed.experts_TK.tolist())
    assert (routed.weights_TK > 0).all() and (routed.weights_TK.diff(dim=1) <= 0).all()
    torch.testing.assert_close(routed.weights_TK.sum(1), torch.ones(T))
    assert routed.balance_loss.shape == routed.z_loss.shape == ()


@ALL_GATES
def test_weight_is_published_layout_and_small(name: str) -> None:
    torch.manual_seed(0)
    gate = GATES[name](256, 16, 4)
    assert gate.w_gate.shape == (256, 16)
    assert gate.w_gate.std().item() == pytest.approx(0.02, rel=0.1)
    largest = torch.softmax(gate.eval()(torch.randn(64, 256)).weights_TK, -1).max()
    assert largest < 0.5, "routing must start near uniform"


@ALL_GATES
def test_gradient_reaches_the_gate_through_weights_and_losses(name: str) -> None:
    gate = make_gate(name)
    routed = gate(tokens())
    for part in (routed.weights_TK[:, 0].sum(), routed.balance_loss, routed.z_loss):
        (grad,) = torch.autograd.grad(part, gate.w_gate, retain_graph=True)
        assert grad.abs().sum() > 0


@ALL_GATES
def test_router_stays_fp32_under_autocast(name: str) -> None:
    gate = make_gate(name).eval()
    plain = gate(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        auto = gate(tokens())
    assert auto.weights_TK.dtype == torch.float32
    assert torch.equal(plain.experts_TK, auto.experts_TK) and torch.equal(plain.weights_TK, auto.weights_TK)


@ALL_GATES
def test_window_holds_every_choice_and_adds_its_offset_once(name: str) -> None:
    gate = make_gate(name).eval()
    routed = gate(tokens(), (3, 7))
    assert routed.experts_TK.min() >= 3 and routed.experts_TK.max() <= 6
    alone = GATES[name](D, 4, K).eval()
    alone.load_state_dict({**gate.state_dict(), **{k: v[:, 3:7] for k, v in gate.state_dict().items() if v.dim() == 2}})
    expected = alone(tokens())
    assert torch.equal(routed.experts_TK, expected.experts_TK + 3)
    torch.testing.assert_close(routed.weights_TK, expected.weights_TK)
    torch.testing.assert_close(routed.balance_loss, expected.balance_loss)


@ALL_GATES
def test_no_tokens_give_finite_zero_losses(name: str) -> None:
    routed = make_gate(name)(tokens(0))
    assert routed.weights_TK.shape == (0, K)
    assert routed.balance_loss == 0 and routed.z_loss == 0


@ALL_GATES
def test_ties_go_to_the_lower_expert(name: str) -> None:
    gate = GATES[name](D, 9, K).eval()  # 9: as many experts in every slot of K
    gate.w_gate.data.copy_(gate.w_gate[:, :1].expand(-1, 9))
    assert torch.equal(gate(tokens()).experts_TK, torch.arange(K).expand(T, K))


@ALL_GATES
def test_sizes_that_cannot_route_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="top_k must lie in 1..num_experts=4, got 5"):
        GATES[name](D, 4, 5)
    with pytest.raises(ValueError, match="noise_std"):
        GATES[name](D, 4, 2, noise_std=-1.0)


def test_noisy_topk_refuses_a_fixed_noise() -> None:
    with pytest.raises(ValueError, match="learns its noise"):
        NoisyTopKGate(D, E, K, noise_std=1.0)


def test_vmoe_is_softmax_over_all_then_top_k() -> None:
    gate = make_gate("vmoe", renormalize=False).eval()
    routed = gate(tokens())
    probabilities = torch.softmax(tokens() @ gate.w_gate, -1)
    for t in range(T):
        best = sorted(range(E), key=lambda e: (-probabilities[t, e].item(), e))[:K]
        assert routed.experts_TK[t].tolist() == best
        torch.testing.assert_close(routed.weights_TK[t], probabilities[t, best])
    assert routed.weights_TK.sum(1).max() < 1


def test_noisy_topk_is_softmax_over_the_chosen() -> None:
    gate = make_gate("noisy_topk").eval()
    routed = gate(tokens())
    chosen = (tokens() @ gate.w_gate).gather(1, routed.experts_TK)
    torch.testing.assert_close(routed.weights_TK, torch.softmax(chosen, -1))


def test_cosine_ignores_the_length_of_a_token() -> None:
    gate = make_gate("cosine").eval()
    lengths = torch.rand(T, 1) * 100 + 0.01
    torch.testing.assert_close(gate(tokens() * lengths).weights_TK, gate(tokens()).weights_TK)
    gate.log_scale.data.fill_(50.0)
    assert gate.logits(tokens(), (0, E)).abs().max() <= 100.1


@pytest.mark.parametrize("num_experts", [6, 8, 3])
@pytest.mark.parametrize("training", [True, False])
def test_slots_hold_one_choice_each_and_it_is_the_best(num_experts: int, training: bool) -> None:
    torch.manual_seed(0)
    gate = SlotGate(D, num_experts, K).train(training)
    gate.w_gate.data.mul_(20)
    routed, logits = gate(tokens()), tokens() @ gate.w_gate
    for t in range(T):
        members = [[e for e in range(num_experts) if e % K == slot] for slot in range(K)]
        best = [max(slot, key=lambda e: logits[t, e].item()) for slot in members]
        p = torch.stack([torch.softmax(logits[t, slot], 0).max() for slot in members])
        assert set(routed.experts_TK[t].tolist()) == set(best)
        torch.testing.assert_close(routed.weights_TK[t], (p / p.sum()).sort(descending=True).values)


@pytest.mark.parametrize("num_experts", [8, 9])
def test_noisy_load_of_slots_is_the_monte_carlo_load(num_experts: int) -> None:
    torch.manual_seed(0)
    gate = SlotGate(D, num_experts, K, noise_std=4.0, renormalize=False)
    gate.w_gate.data.mul_(5)
    x, draws = tokens(20), 1500
    routed = gate(x.repeat(draws, 1))
    counted = torch.bincount(routed.experts_TK.flatten(), minlength=num_experts).float()
    load = routed.balance_loss.detach() - balance.cv_squared(
        balance.importance(routed.weights_TK.detach(), routed.experts_TK, num_experts)
    )
    # The smooth load and the counted one have one expectation, so nearly the same unevenness over so many draws.
    assert load.item() == pytest.approx(balance.cv_squared(counted).item(), rel=0.03)


def test_cv_squared_is_unbiased_variance_over_squared_mean() -> None:
    values = [1.0, 4.0, 7.0, 2.0]
    mean = sum(values) / 4
    expected = sum((v - mean) ** 2 for v in values) / 3 / mean**2
    assert balance.cv_squared(torch.tensor(values)).item() == pytest.approx(expected, rel=1e-6)
    assert balance.cv_squared(torch.full((5,), 3.0)) == 0
    assert balance.cv_squared(torch.tensor([3.0])) == 0


def test_balance_loss_without_noise_counts_choices() -> None:
    gate = make_gate("vmoe", renormalize=False)
    routed = gate(tokens())
    load, importance = [0.0] * E, [0.0] * E
    for t in range(T):
        for k in range(K):
            load[routed.experts_TK[t, k]] += 1.0
            importance[routed.experts_TK[t, k]] += routed.weights_TK[t, k].item()
    expected = sum(torch.tensor(v).var() / torch.tensor(v).mean() ** 2 for v in (load, importance))
    torch.testing.assert_close(routed.balance_loss.detach(), expected, rtol=1e-5, atol=0)


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    gate = make_gate("vmoe")
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in (tokens() @ gate.w_gate).tolist()) / T
    assert gate(tokens()).z_loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_noisy_load_is_the_monte_carlo_load(top_k: int) -> None:
    torch.manual_seed(0)
    clean, std = torch.randn(20, E), torch.rand(20, E) + 0.3
    draws = 4000
    noisy = clean + torch.randn(draws, 20, E) * std
    counted = F.one_hot(noisy.topk(top_k, dim=-1).indices, E).sum((0, 1, 2)) / draws
    smooth = sum(balance.noisy_load(clean, noisy[i], std, top_k) for i in range(400)) / 400
    # Both estimate the same expectation; a smooth draw varies far less than a counted one.
    torch.testing.assert_close(smooth, counted, rtol=0.05, atol=0.1)
    assert smooth.sum().item() == pytest.approx(20 * top_k, rel=0.02)


def test_noisy_load_equals_redrawing_one_experts_noise() -> None:
    torch.manual_seed(0)
    clean, std = torch.randn(5, E), torch.rand(5, E) + 0.3
    noisy = clean + torch.randn(5, E) * std
    for expert in (0, 4):
        redrawn = noisy.repeat(20000, 1, 1)
        redrawn[..., expert] = clean[:, expert] + torch.randn(20000, 5) * std[:, expert]
        counted = (redrawn.topk(K, dim=-1).indices == expert).any(-1).float().mean(0).sum()
        assert balance.noisy_load(clean, noisy, std, K)[expert].item() == pytest.approx(counted.item(), abs=0.03)


@pytest.mark.parametrize("window", [None, (2, 7)])
@pytest.mark.parametrize(("name", "noise"), [("noisy_topk", 0.0), ("vmoe", 6.0), ("cosine", 6.0)])
def test_load_of_a_gate_is_what_its_own_noise_makes_of_it(
    name: str, noise: float, window: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, noise and its size reach the load as the gate uses them: smooth and counted loads agree in the mean."""
    smooth, losses = [], []
    exact = balance.noisy_load
    monkeypatch.setattr(balance, "noisy_load", lambda *args: smooth.append(exact(*args)) or smooth[-1])
    gate = make_gate(name, noise_std=noise)
    if name == "noisy_topk":
        gate.w_noise.data.normal_(std=0.5)
    first, end = window or (0, E)
    x, counted, draws = tokens(30), torch.zeros(E), 600
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(draws):
            routed = gate(x, window)
            drawn = F.one_hot(routed.experts_TK, E)
            counted += drawn.sum((0, 1))
            importance = (drawn * routed.weights_TK[..., None]).sum((0, 1))[first:end]
            losses.append((routed.balance_loss, balance.cv_squared(importance) + balance.cv_squared(smooth[-1])))
    torch.testing.assert_close(torch.stack(smooth).mean(0), counted[first:end] / draws, rtol=0.05, atol=0.2)
    got, wanted = (torch.stack(values) for values in zip(*losses, strict=True))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_noisy_load_with_all_experts_chosen_is_every_token() -> None:
    clean = torch.randn(6, 4)
    assert torch.equal(balance.noisy_load(clean, clean, 1.0, 4), torch.full((4,), 6.0))


@pytest.mark.parametrize("name", ["vmoe", "cosine", "slots"])
def test_noise_is_for_training_only_and_its_load_has_a_gradient(name: str) -> None:
    gate = make_gate(name, noise_std=8.0)
    first, second = gate(tokens()), gate(tokens())
    assert not torch.equal(first.weights_TK, second.weights_TK)
    load_only = balance.noisy_load(tokens() @ gate.w_gate, tokens() @ gate.w_gate, 1.0, K)
    assert load_only.requires_grad
    gate.eval()
    assert torch.equal(gate(tokens()).weights_TK, gate(tokens()).weights_TK)


def noise_std(weights_TE: torch.Tensor) -> float:
    """Std of the logits' noise, from a softmax over all experts whose clean logits are equal."""
    return weights_TE.log().var(dim=1).mean().sqrt().item()


def test_noise_of_vmoe_is_noise_std_over_all_experts() -> None:
    gate = VMoEGate(D, E, E, noise_std=4.0, renormalize=False)
    gate.w_gate.data.zero_()
    torch.manual_seed(0)
    routed = gate(tokens(4000))
    assert noise_std(routed.weights_TK) == pytest.approx(4.0 / E, rel=0.03)


def test_noise_of_noisy_topk_starts_at_softplus_of_zero() -> None:
    gate = NoisyTopKGate(D, E, E)
    gate.w_gate.data.zero_()
    torch.manual_seed(0)
    assert noise_std(gate(tokens(4000)).weights_TK) == pytest.approx(math.log(2) + MIN_STD, rel=0.03)


@pytest.mark.parametrize(
    ("num_tasks", "num_experts", "width"), [(5, 16, 4), (3, 16, 16), (1, 8, 4), (4, 16, 4), (2, 7, 3)]
)
def test_windows_spread_from_the_first_to_the_last_expert(num_tasks: int, num_experts: int, width: int) -> None:
    windows = expert_windows(num_tasks, num_experts, width)
    starts = [first for first, _ in windows]
    assert len(windows) == num_tasks and all(end - first == width for first, end in windows)
    assert starts[0] == 0 and starts == sorted(starts)
    assert windows[-1][1] == num_experts or num_tasks == 1
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
