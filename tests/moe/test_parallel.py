"""Experts shared out among processes: the numbers of one process that has the tokens of all, in gloo processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor

from m3bsr.moe import MoEMlp
from m3bsr.moe.backends import run_experts
from m3bsr.moe.experts import Experts
from m3bsr.moe.parallel import (
    expert_mesh,
    gather_experts,
    is_sharded,
    shard_experts,
    shared_out_parameters,
    whole_state,
)

D, H, E, K = 16, 24, 8, 2
TASKS = ("semseg", "depth")
NUM_TOKENS = {"equal": (6, 6, 6, 6), "unequal": (9, 2, 1, 5), "one_without": (7, 0, 4, 3), "none": (0, 0, 0, 0)}
# of (trained experts, gradient for the tokens, gradient for the gate)
TRAINED = {
    "all": ("all", True, True),
    "first_process_only": ((0, 1), True, True),
    "last_process_only": ((7,), True, False),
    "last_process_only, first trained layer": ((7,), False, False),
    "some, first trained layer": ((1, 2, 6), False, True),
    "none": ((), True, True),
    "nothing": ((), False, False),
}
CASES = [
    *itertools.product(NUM_TOKENS, ["even"], TRAINED, ["grouped"], [torch.float64]),
    *itertools.product(
        ["unequal", "one_without"], ["empty_expert", "one_expert"], ["all"], ["grouped"], [torch.float64]
    ),
    *itertools.product(["unequal", "one_without"], ["even"], TRAINED, ["low_memory"], [torch.float64]),
    *itertools.product(["unequal", "none"], ["empty_expert"], TRAINED, ["grouped_mm"], [torch.float32]),
    *itertools.product(["one_without"], ["even"], ["all"], ["grouped", "low_memory"], [torch.bfloat16]),
]
Numbers = dict[str, Tensor | None]


def in_processes(num: int, function: Callable[[int], Any], folder: Path) -> list[Any]:
    """Results of `function(rank)` in `num` forked processes of one gloo group."""
    folder.mkdir()
    torch.multiprocessing.start_processes(_process, (num, function, folder), nprocs=num, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num)]


def _process(rank: int, num: int, function: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)  # the pool of threads is not forked
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=250), world_size=num, rank=rank)
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def tokens_of(case: tuple[Any, ...], num: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Tokens, gate weights, choices and the gradient of the output, for each process."""
    counts, kind, _, _, dtype = case
    generator = torch.Generator().manual_seed(3)
    parts = []
    for num_tokens in NUM_TOKENS[counts][:num]:
        ids = torch.rand(num_tokens, E, generator=generator).topk(K).indices
        ids = {"even": ids, "empty_expert": torch.where(ids == 2, 5, ids), "one_expert": torch.full_like(ids, 3)}[kind]
        x, grad = (torch.randn(num_tokens, D, generator=generator).to(dtype) for _ in range(2))
        parts.append((x, torch.rand(num_tokens, K, generator=generator).to(dtype), ids, grad))
    return parts


def layer(case: tuple[Any, ...]) -> Experts:
    torch.manual_seed(0)
    experts = Experts(E, D, H)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3)
    experts.set_trainable(TRAINED[case[2]][0])
    return experts.to(case[4])


def numbers(experts: Experts, part: tuple[Tensor, ...], case: tuple[Any, ...]) -> Numbers:
    """Output and all gradients."""
    x, weights, ids, grad = part
    _, x_grad, gate_grad = TRAINED[case[2]]
    x, weights = x.clone().requires_grad_(x_grad), weights.clone().requires_grad_(gate_grad)
    y = run_experts(x, weights, ids, experts, case[3])
    if y.requires_grad:
        y.backward(grad)
    grads = {f"grad {name}": parameter.grad for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **grads}


def all_cases(rank: int) -> list[Numbers]:
    num, found = dist.get_world_size(), []
    mesh = expert_mesh(num, "cpu")
    for case in CASES:
        experts = layer(case)
        shard_experts(experts, mesh)
        found.append(numbers(experts, tokens_of(case, num)[rank], case))
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[Numbers]]:
    """By process and case."""
    return in_processes(request.param, all_cases, tmp_path_factory.mktemp("cases") / "run")


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_shared_out_experts_give_the_numbers_of_one_process(found: list[list[Numbers]], number: int) -> None:
    case, num = CASES[number], len(found)
    parts = tokens_of(case, num)
    together = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    wanted = numbers(layer(case), together, case)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[case[4]]
    for name in ("y", "x", "weights"):
        pieces = [by_case[number][name] for by_case in found]
        if wanted[name] is None:
            assert pieces == [None] * num, name
        else:
            torch.testing.assert_close(torch.cat(pieces), wanted[name], rtol=tolerance, atol=tolerance, msg=name)
    held = [by_case[number] for by_case in found]
    for name in (name for name in wanted if name.startswith("grad ")):
        owners = [values for values in held if name in values]
        assert len(owners) == 1, f"{name} must be on one process"
        value, reference = owners[0][name], wanted[name]
        assert (value is None) == (reference is None), name
        if reference is not None:
            torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance, msg=name)


def moe() -> MoEMlp:
    torch.manual_seed(0)
    layer = MoEMlp(D, H, E, K, gate="vmoe", gate_mode="per_task", tasks=TASKS).double()
    for gate in layer.gates.values():
        gate.w_gate.data.mul_(20)
    layer.set_trainable_experts((0, 1, 2, 4, 7))
    return layer


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens of two tasks, and what they should become; process 1 has no tokens in step 3."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    images = 0 if (step, rank) == (3, 1) else 2 * len(TASKS)
    x, wanted = (torch.randn(images, 3 + rank, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, wanted


def loss_of(layer: MoEMlp, step: int, rank: int) -> Tensor:
    x, wanted = batch_of(step, rank)
    y, routing = layer(x, TASKS)
    return (y - wanted).square().sum() / 100 + 0.01 * routing.balance_loss + 0.01 * routing.z_loss


def train_shared_out(expert_parallel: int) -> Callable[[int], dict[str, Tensor]]:
    def train(rank: int) -> dict[str, Tensor]:
        num, layer = dist.get_world_size(), moe()
        mesh = expert_mesh(expert_parallel, "cpu")
        shard_experts(layer, mesh)
        elsewhere = shared_out_parameters(layer)
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        for step in range(10):
            loss_of(layer, step, rank).backward()
            for name, parameter in trained.items():
                group = mesh["replica"].get_group() if name in elsewhere else None
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= num
            optimizer.step()
            optimizer.zero_grad()
        return whole_state(layer.state_dict())

    return train


@pytest.mark.parametrize(("num", "expert_parallel"), [(2, 2), (4, 4), (4, 2)])
def test_ten_steps_with_task_gates_and_frozen_experts(num: int, expert_parallel: int, tmp_path: Path) -> None:
    results = in_processes(num, train_shared_out(expert_parallel), tmp_path / "run")
    layer, before = moe(), moe().state_dict()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        for rank in range(num):
            (loss_of(layer, step, rank) / num).backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = layer.state_dict()
    for result in results:
        assert list(result) == list(wanted)
        for name, tensor in wanted.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
            if name.startswith("experts."):
                assert torch.equal(result[name][[3, 5, 6]], before[name][[3, 5, 6]]), "frozen experts moved"
                assert not torch.equal(result[name][0], before[name][0])


def save(folder: Path) -> Callable[[int], dict[str, Any]]:
    def run(rank: int) -> dict[str, Any]:
        layer, whole = moe(), moe().state_dict()
        names = [name for name, _ in layer.named_parameters()]
        shard_experts(layer, expert_mesh(dist.get_world_size(), "cpu"))
        state = layer.state_dict()
        assert list(state) == list(whole)
        assert all(isinstance(t, DTensor) == name.startswith("experts.") for name, t in state.items())
        assert all(state[name].shape == tensor.shape for name, tensor in whole.items())
        assert all(torch.equal(tensor, whole[name]) for name, tensor in whole_state(state).items())
        dcp.save(state, checkpoint_id=folder)
        mine = [name for name, _ in layer.named_parameters()]
        assert [name for name in names if name in mine] == mine and len(shared_out_parameters(layer)) < len(names)
        return {"bytes": sum(p.nbytes for p in layer.experts.parameters()), "names": mine}

    return run


def load(folder: Path) -> Callable[[int], dict[str, Tensor]]:
    def run(rank: int) -> dict[str, Tensor]:
        layer = moe()
        shard_experts(layer, expert_mesh(dist.get_world_size(), "cpu"))
        for parameter in layer.parameters():
            parameter.data.zero_()
        state = layer.state_dict()
        dcp.load(state, checkpoint_id=folder)
        layer.load_state_dict(state)
        gather_experts(layer)
        assert not is_sharded(layer) and layer.experts.trainable() == (0, 1, 2, 4, 7)
        return layer.state_dict()

    return run


def test_saved_on_four_processes_and_loaded_on_two_and_on_one(tmp_path: Path) -> None:
    saved = in_processes(4, save(tmp_path / "checkpoint"), tmp_path / "four")
    whole = moe().state_dict()
    assert sum(part["bytes"] for part in saved) == 4 * saved[0]["bytes"]
    for results in (in_processes(2, load(tmp_path / "checkpoint"), tmp_path / "two"), [_load_alone(tmp_path)]):
        for result in results:
            assert list(result) == list(whole) and all(torch.equal(result[name], whole[name]) for name in whole)


def _load_alone(folder: Path) -> dict[str, Tensor]:
    layer = moe()
    state = {name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()}
    dcp.load(state, checkpoint_id=folder / "checkpoint", no_dist=True)
    layer.load_state_dict(state)
    return layer.state_dict()


def load_whole(rank: int) -> list[str]:
    layer, state = moe(), {name: torch.randn_like(tensor) for name, tensor in moe().state_dict().items()}
    dist.broadcast_object_list(states := [state], src=0)
    shard_experts(layer, expert_mesh(2, "cpu"))
    layer.load_state_dict(states[0])
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in whole_state(layer.state_dict()).items())
    experts = layer.experts
    assert list(experts.held) == [4 * rank + i for i in range(4)]
    assert torch.equal(experts.fc1[4 * rank + 1].weight, states[0]["experts.fc1.weight"][4 * rank + 1])
    assert experts.trainable() == ((0, 1, 2), (4, 7))[rank] and experts.any_trains
    layer.set_trainable_experts((5,))
    assert experts.trainable() == ((), (5,))[rank] and experts.any_trains
    messages = []
    for change in ({"experts.fc1.weight": torch.zeros(4, H, D)}, {"experts.fc2.bias": None}):
        wrong = {name: t for name, t in {**states[0], **change}.items() if t is not None}
        with pytest.raises(RuntimeError) as error:
            layer.load_state_dict(wrong)
        messages.append(str(error.value))
    with pytest.raises(ValueError, match="moe.expert_parallel: experts: 8 experts do not divide among 3 processes"):
        _shard_among_three(moe())
    return messages


def _shard_among_three(layer: MoEMlp) -> None:
    class Three(dict):
        ndim = 1

        def size(self) -> int:
            return 3

    shard_experts(layer, {"expert": Three()})  # type: ignore[arg-type]


def test_a_whole_checkpoint_loads_into_shares_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    for shape, missing in in_processes(2, load_whole, tmp_path / "run"):
        assert "experts.fc1.weight: the checkpoint holds experts of shape (4, 24, 16), the model (8, 24, 16)" in shape
        assert 'Missing key(s) in state_dict: "experts.fc2.bias"' in missing


def test_one_process_alone_says_how_to_start_more() -> None:
    with pytest.raises(ValueError, match="moe.expert_parallel 2 needs a multiple.*has 1: .*--nproc-per-node 2"):
        expert_mesh(2, "cpu")
