"""Published names: fused, per expert, per rank, and what does not belong."""

from __future__ import annotations

import pytest
import torch

from m3bsr.moe import MoEMlp
from m3bsr.moe.published import from_published, join_ranks, to_published

TASKS = ("semseg", "depth")


def layer(**kwargs: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MoEMlp(6, 4, 4, 2, tasks=TASKS, **kwargs).state_dict()


@pytest.mark.parametrize("kwargs", [{}, {"gate_mode": "shared"}, {"gate": "noisy_topk"}])
def test_round_trip(kwargs: dict[str, object]) -> None:
    ours = layer(**kwargs)
    theirs = to_published(ours, TASKS)
    assert theirs["experts.htoh4.weight"].shape == (4, 4, 6) and theirs["experts.h4toh.weight"].shape == (4, 6, 4)
    back = from_published(theirs, TASKS)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


def test_gates_follow_the_order_of_the_tasks() -> None:
    ours = layer()
    theirs = to_published(ours, TASKS)
    assert torch.equal(theirs["gate.1.w_gate"], ours["gates.depth.w_gate"])
    swapped = from_published(theirs, TASKS[::-1])
    assert torch.equal(swapped["gates.semseg.w_gate"], ours["gates.depth.w_gate"])


def test_one_entry_per_expert() -> None:
    ours = layer()
    fused = to_published(ours, TASKS)
    separate = {key: value for key, value in fused.items() if key.startswith("gate")}
    for e in (2, 0, 3, 1):
        for name in ("htoh4", "h4toh"):
            for kind in ("weight", "bias"):
                separate[f"experts.{e}.{name}.{kind}"] = fused[f"experts.{name}.{kind}"][e : e + 1]
    back = from_published(separate, TASKS)
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    del separate["experts.1.htoh4.weight"]
    with pytest.raises(ValueError, match=r"lacks some experts, it holds \[0, 2, 3\]"):
        from_published(separate, TASKS)


def test_what_does_not_fit_is_named() -> None:
    theirs = to_published(layer(), TASKS)
    with pytest.raises(ValueError, match="fc1.weight"):
        from_published({**theirs, "fc1.weight": torch.zeros(1)}, TASKS)
    with pytest.raises(ValueError, match="gate number 1, but only 1 tasks"):
        from_published(theirs, TASKS[:1])
    with pytest.raises(ValueError, match='no gate for task "edge"'):
        from_published(theirs, (*TASKS, "edge"))
    with pytest.raises(ValueError, match="log_scale"):
        to_published(layer(gate="cosine"), TASKS)


def test_ranks_are_joined_along_the_experts() -> None:
    whole = {f"backbone.blocks.1.mlp.{key}": value for key, value in to_published(layer(), TASKS).items()}
    whole["backbone.pos_embed"] = torch.randn(1, 5, 6)
    experts = {key: value.chunk(2) for key, value in whole.items() if ".experts." in key}
    first = {key: experts[key][0] if key in experts else value for key, value in whole.items()}
    second = {key: parts[1] for key, parts in experts.items()}
    joined = join_ranks([first, second])
    assert list(joined) == list(whole) and all(torch.equal(joined[key], whole[key]) for key in whole)
    second.pop("backbone.blocks.1.mlp.experts.h4toh.bias")
    with pytest.raises(ValueError, match="rank 1, backbone.blocks.1.mlp.experts.h4toh.bias: found nothing"):
        join_ranks([first, second])
    with pytest.raises(ValueError, match="no rank files"):
        join_ranks([])
