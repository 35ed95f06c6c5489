"""One task's share of a layer gives what the layer gave for it."""

from __future__ import annotations

import pytest
import torch

from m3bsr.moe import GATES, MoEMlp
from m3bsr.moe.extract import keep_experts, used_experts
from m3bsr.moe.moe_mlp import GATE_MODES

TASKS = ("semseg", "depth", "edge")
OPTIONS = {"embed_dim": 16, "hidden_dim": 8, "top_k": 2, "task_dim": 4}


def make(gate: str, gate_mode: str, tasks=TASKS, num_experts=8, **kwargs) -> MoEMlp:
    torch.manual_seed(0)
    layer = MoEMlp(**OPTIONS, num_experts=num_experts, gate=gate, gate_mode=gate_mode, tasks=tasks, **kwargs)
    for name, parameter in layer.named_parameters():
        if name.startswith("gates"):
            parameter.data.mul_(10)
    return layer.eval()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_mode", GATE_MODES)
@pytest.mark.parametrize("experts_per_task", [None, 4])
@pytest.mark.parametrize("threshold", [0, 1e-6])
def test_the_share_gives_what_the_layer_gave(gate, gate_mode, experts_per_task, threshold) -> None:
    whole = make(gate, gate_mode, experts_per_task=experts_per_task)
    x_BND = torch.randn(1, 6, 16)
    expected, routing = whole(x_BND, ("depth",))
    counts_E, window = routing.counts()[0], whole.windows.get("depth")
    ids = used_experts(counts_E, 2, threshold, window, slots=gate == "slots")
    possible = tuple(range(*(window or (0, 8))))
    if threshold == 0:
        assert ids == possible
    elif gate == "slots":  # all slots keep as many as the one that uses most
        assert set(routing.experts_TK.flatten().tolist()) <= set(ids) <= set(possible)
        assert [e % 2 for e in ids] == [(possible[0] + place) % 2 for place in range(len(ids))]
    else:
        assert set(routing.experts_TK.flatten().tolist()) == set(ids) <= set(possible)
    alone = make(gate, gate_mode, ("depth",), len(ids))
    alone.load_state_dict(keep_experts(whole.state_dict(), ids, "depth", TASKS))
    y_BND, own = alone(x_BND, ("depth",))
    chosen_TK = torch.tensor(ids)[own.experts_TK]
    if gate == "slots" and threshold > 0:  # the same experts; how they are weighed depends on all of a slot
        assert torch.equal(chosen_TK.sort(dim=1).values, routing.experts_TK.sort(dim=1).values)
        return
    assert torch.equal(chosen_TK, routing.experts_TK)
    torch.testing.assert_close(y_BND, expected, rtol=1e-5, atol=1e-7)
    if threshold == 0:
        assert torch.equal(y_BND, expected)


def test_which_experts_stay() -> None:
    counts = torch.tensor([500, 0, 4, 490, 6, 0])
    assert used_experts(counts, 2, 0.001) == (0, 2, 3, 4)
    assert used_experts(counts, 2, 0.005) == (0, 3, 4)
    assert used_experts(counts, 2, 0.9) == (0, 3)  # never fewer than a token needs
    assert used_experts(counts, 3, 0.9) == (0, 3, 4)
    assert used_experts(counts, 2, 0) == (0, 1, 2, 3, 4, 5)
    assert used_experts(counts, 2, 0, window=(1, 4)) == (1, 2, 3)
    assert used_experts(counts, 2, 0.5, window=(1, 4)) == (2, 3)
    assert used_experts(counts, 2, 0.005, slots=True) == (0, 1, 4, 3)  # slot 0 uses 0 and 4: slot 1 keeps two as well
    assert used_experts(counts, 2, 0.9, slots=True) == (0, 3)
    assert used_experts(counts, 4, 0, slots=True) == (0, 1, 2, 3, 4, 5)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold must be a share"):
            used_experts(counts, 2, threshold)
