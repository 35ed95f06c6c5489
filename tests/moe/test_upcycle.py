"""Upcycling: a mixture that starts as the dense MLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from m3bsr.moe import GATES, MoEMlp, tie_gate_columns, upcycle_mlp

D, F = 24, 48


def dense_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
    for parameter in mlp.parameters():
        parameter.data.normal_(std=0.2)
    return mlp


def dense_state(mlp: nn.Sequential) -> dict[str, torch.Tensor]:
    return {f"fc{i + 1}.{kind}": getattr(mlp[2 * i], kind).detach() for i in (0, 1) for kind in ("weight", "bias")}


def relative_error(hidden_dim: int, method: str, *, tie: bool = False, top_k: int = 4, **kwargs: object) -> float:
    """Of a mixture of 16 upcycled experts against the dense MLP, over random tokens."""
    mlp = dense_mlp()
    moe = MoEMlp(D, hidden_dim, 16, top_k, **kwargs).eval()
    experts = upcycle_mlp(dense_state(mlp), 16, hidden_dim, top_k, method, renormalize=moe.renormalize)
    gate = moe.gates["task"].w_gate
    tied = tie_gate_columns(gate.detach(), F // hidden_dim) if tie else gate.detach()
    state = {f"experts.{name}": tensor for name, tensor in experts.items()}
    moe.load_state_dict({**moe.state_dict(), **state, "gates.task.w_gate": tied})
    x = torch.randn(4, 50, D)
    return ((moe(x, ("task",))[0] - mlp(x)).norm() / mlp(x).norm()).item()


@pytest.mark.parametrize("gate", GATES)
def test_copy_with_renormalised_weights_is_the_dense_mlp(gate: str) -> None:
    assert relative_error(F, "copy", gate=gate) < 1e-6


def test_copy_without_renormalising_is_scaled_to_be_close() -> None:
    assert relative_error(F, "copy", renormalize=False) < 0.25


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", [4, 8])
def test_split_with_tied_gates_is_the_dense_mlp(gate: str, top_k: int) -> None:
    assert relative_error(F // 4, "split", tie=True, top_k=top_k, gate=gate) < 1e-5


def test_split_with_free_gates_is_only_close_in_expectation() -> None:
    """What tying is for: free gates choose some slices twice and miss others (error .8 here with 4 of 16)."""
    free = relative_error(F // 4, "split")
    assert 0.3 < free < 1.2
    mlp = dense_mlp()
    experts = upcycle_mlp(dense_state(mlp), 16, F // 4, 4, "split")
    x = torch.randn(50, D)
    outputs = [
        nn.functional.gelu(x @ experts["fc1.weight"][e].T + experts["fc1.bias"][e]) @ experts["fc2.weight"][e].T
        + experts["fc2.bias"][e]
        for e in range(16)
    ]
    torch.testing.assert_close(torch.stack(outputs).mean(0), mlp(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [4, 8])
def test_slots_choose_a_complete_mlp_however_the_gate_is_trained(top_k: int) -> None:
    """Free columns: a whole MLP in every choice, its slices weighted a little unevenly; top-k is far off here."""
    assert relative_error(F // 4, "split", top_k=top_k, gate="slots") < 0.15
    assert relative_error(F // 4, "split", top_k=top_k, gate="vmoe") > 0.3


def test_noise_tells_experts_apart_a_little() -> None:
    state = dense_state(dense_mlp())
    torch.manual_seed(1)
    noisy = upcycle_mlp(state, 4, F, 2, "copy", noise=0.05)
    difference = noisy["fc1.weight"] - state["fc1.weight"]
    assert difference.std().item() == pytest.approx(0.05 * state["fc1.weight"].std().item(), rel=0.05)
    assert not torch.equal(noisy["fc1.weight"][0], noisy["fc1.weight"][1])
    assert torch.equal(noisy["fc1.bias"][0], state["fc1.bias"])


def test_tied_columns_are_shared_within_a_group() -> None:
    w_gate = torch.randn(3, 6)
    tied = tie_gate_columns(w_gate, 2)
    assert torch.equal(tied[:, 0::2], tied[:, 1::2]) and torch.equal(tied[:, 0::2], w_gate[:, 0::2])
    assert torch.equal(tie_gate_columns(w_gate, 1), w_gate)


def test_what_cannot_be_upcycled_is_said() -> None:
    state = dense_state(dense_mlp())
    for hidden_dim, method, message in (
        (F // 2, "copy", "48 hidden units, experts have 24"),
        (F // 2 + 1, "split", "48 hidden units do not divide into experts of 25"),
        (F, "clone", 'method must be one of copy, split, got "clone"'),
        (F // 8, "split", "at least 8 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle_mlp(state, 4, hidden_dim, 2, method)
    with pytest.raises(ValueError, match="lacks fc2.bias"):
        upcycle_mlp({k: v for k, v in state.items() if k != "fc2.bias"}, 4, F, 2, "copy")
    with pytest.raises(ValueError, match="no two-layer MLP"):
        upcycle_mlp({**state, "fc2.weight": torch.zeros(D, F + 1)}, 4, F, 2, "copy")
