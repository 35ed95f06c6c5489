"""The layer: gate modes, one task's path, windows, nothing kept between steps, published parity."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.moe import GATES, MoEMlp
from m3bsr.moe.moe_mlp import GATE_MODES
from m3bsr.moe.published import from_published, to_published
from m3bsr.moe.routing import most_used

GOLDEN = Path(__file__).parents[1] / "golden"
TASKS = ("semseg", "depth", "edge")


def make(gate_mode: str = "per_task", **kwargs: object) -> MoEMlp:
    torch.manual_seed(0)
    moe = MoEMlp(16, 8, 6, 2, gate_mode=gate_mode, tasks=TASKS, **kwargs)
    for name, parameter in moe.named_parameters():
        if name.startswith("gates"):
            parameter.data.mul_(10)
    return moe


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_mode", GATE_MODES)
@pytest.mark.parametrize("experts_per_task", [None, 3])
def test_one_tasks_path_is_its_part_of_all_tasks(gate: str, gate_mode: str, experts_per_task: int | None) -> None:
    moe = make(gate_mode, gate=gate, experts_per_task=experts_per_task).eval()
    x_BND = torch.randn(2, 5, 16)
    y_all, routing = moe(x_BND.repeat(3, 1, 1), TASKS)
    assert routing.tasks == TASKS and routing.num_experts == 6
    assert routing.counts().shape == (3, 6) and routing.counts().sum(1).tolist() == [20, 20, 20]
    for i, task in enumerate(TASKS):
        y, alone = moe(x_BND, (task,))
        torch.testing.assert_close(y, y_all[2 * i : 2 * i + 2], rtol=1e-5, atol=1e-7)
        assert torch.equal(alone.experts_TK, routing.experts_TK[10 * i : 10 * i + 10])
        assert torch.equal(alone.counts()[0], routing.counts()[i])
    if moe.task_dependent:
        assert not torch.equal(routing.experts_TK[:10], routing.experts_TK[10:20])
    else:
        assert torch.equal(routing.experts_TK[:10], routing.experts_TK[10:20])


@pytest.mark.parametrize(("gate_mode", "window", "dependent"), [
    ("shared", None, False), ("shared", 3, True), ("per_task", None, True), ("task_conditioned", None, True),
])  # fmt: skip
def test_task_dependent_says_whether_tasks_differ(gate_mode: str, window: int | None, dependent: bool) -> None:
    assert make(gate_mode, experts_per_task=window).task_dependent is dependent
    assert not MoEMlp(16, 8, 6, 2, gate_mode=gate_mode, tasks=("only",), experts_per_task=window).task_dependent


def test_balance_loss_is_each_gates_own_then_the_mean() -> None:
    moe = make().eval()
    x_BND = torch.randn(6, 5, 16)
    routing = moe.route(x_BND, TASKS)
    alone = [moe.route(x_BND[2 * i : 2 * i + 2], (task,)) for i, task in enumerate(TASKS)]
    torch.testing.assert_close(routing.balance_loss, sum(a.balance_loss for a in alone) / 3)
    torch.testing.assert_close(routing.z_loss, sum(a.z_loss for a in alone) / 3)
    shared = make("shared").eval()
    together = shared.gates["shared"](x_BND.reshape(-1, 16)).balance_loss
    torch.testing.assert_close(shared.route(x_BND, TASKS).balance_loss, together)


def test_windows_keep_tasks_on_their_experts() -> None:
    moe = make("per_task", experts_per_task=2)
    counts = moe.route(torch.randn(6, 5, 16), TASKS).counts()
    assert (counts > 0).tolist() == [[e // 2 == i for e in range(6)] for i in range(3)]


def test_most_used_experts_are_the_ones_to_train() -> None:
    counts_GE = torch.tensor([[1, 5, 0, 3], [1, 0, 4, 1]])
    assert most_used(counts_GE, 2) == (1, 2)  # 2, 5, 4, 4: a tie goes to the lower id
    assert most_used(counts_GE[0], 4) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="top:n must choose 1..4 experts, got 5"):
        most_used(counts_GE, 5)


def test_unused_gates_get_no_gradient() -> None:
    moe = make()
    y, routing = moe(torch.randn(2, 5, 16), ("depth",))
    (y.sum() + routing.balance_loss).backward()
    assert {name for name in TASKS if moe.gates[name].w_gate.grad is not None} == {"depth"}


def test_gate_input_routes_and_tokens_are_transformed() -> None:
    moe = make().eval()
    x_BND, before_BND = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    y, routing = moe(x_BND, ("depth",), before_BND)
    assert torch.equal(routing.experts_TK, moe.route(before_BND, ("depth",)).experts_TK)
    assert not torch.equal(routing.experts_TK, moe.route(x_BND, ("depth",)).experts_TK)
    with pytest.raises(ValueError, match="differ in shape"):
        moe(x_BND, ("depth",), before_BND[:1])
    assert y.shape == x_BND.shape
    ahead = make(gate_input="before").eval()
    assert torch.equal(ahead(x_BND, ("depth",), before_BND)[0], y)
    with pytest.raises(AssertionError, match="need their input"):
        ahead(x_BND, ("depth",))
    with pytest.raises(ValueError, match="gate_input must be one of after, before"):
        make(gate_input="within")


def test_state_dict_names() -> None:
    experts = {f"experts.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert set(make().state_dict()) == experts | {f"gates.{task}.w_gate" for task in TASKS}
    assert set(make("shared").state_dict()) == experts | {"gates.shared.w_gate"}
    conditioned = make("task_conditioned")
    assert conditioned.state_dict()["gates.shared.w_gate"].shape == (16 + 64, 6)
    assert all(key.startswith(("experts.", "gates.")) for key in conditioned.state_dict())
    other = make("task_conditioned")
    other.load_state_dict(conditioned.state_dict())


@pytest.mark.parametrize("kwargs", [
    {"gate": "vmoes"}, {"gate_mode": "per-task"}, {"backend": "loops"}, {"top_k": 7}, {"tasks": ()}, {"tasks": "depth"},
    {"tasks": ("a", "a")}, {"tasks": ("a.b",)}, {"experts_per_task": 1}, {"experts_per_task": 7},
])  # fmt: skip
def test_bad_arguments_are_value_errors(kwargs: dict[str, object]) -> None:
    arguments = {"embed_dim": 16, "hidden_dim": 8, "num_experts": 6, "top_k": 2, "tasks": TASKS, **kwargs}
    with pytest.raises(ValueError):
        MoEMlp(**arguments)


def test_unknown_task_and_odd_batch_are_value_errors() -> None:
    with pytest.raises(ValueError, match='no gate for task "normals"; this layer knows semseg, depth, edge'):
        make()(torch.randn(2, 5, 16), ("normals",))
    with pytest.raises(ValueError, match="3 images do not divide"):
        make()(torch.randn(3, 5, 16), ("semseg", "depth"))


@pytest.mark.parametrize("gate_mode", GATE_MODES)
def test_no_tokens(gate_mode: str) -> None:
    y, routing = make(gate_mode)(torch.randn(0, 5, 16, requires_grad=True), TASKS)
    assert y.shape == (0, 5, 16) and routing.counts().sum() == 0
    (y.sum() + routing.balance_loss + routing.z_loss).backward()


@pytest.mark.parametrize("backend", ["grouped", "low_memory", "grouped_mm", "loop"])
def test_autocast_bf16_trains(backend: str) -> None:
    moe = make(backend=backend)
    x_BND = torch.randn(6, 5, 16)
    exact, routing = moe(x_BND, TASKS)
    with torch.autocast("cpu", torch.bfloat16):
        y, auto = moe(x_BND, TASKS)
        loss = y.float().square().sum() + auto.balance_loss
    assert torch.equal(auto.experts_TK, routing.experts_TK) and auto.weights_TK.dtype == torch.float32
    assert ((y - exact).norm() / exact.norm()).item() < 0.02
    loss.backward()
    grads = [p.grad for p in moe.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)


class Kept:
    """A tensor that autograd keeps for the backward pass; alive as long as the graph holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def live_tensors() -> tuple[int, int]:
    """Number and bytes of the tensors that Python knows."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


def graph_size(*roots: torch.Tensor) -> int:
    """Nodes of the autograd graph behind some tensors."""
    found, open_nodes = set(), [root.grad_fn for root in roots]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            open_nodes += [function for function, _ in node.next_functions]
    return len(found)


@pytest.mark.parametrize(("gate", "backend"), [*((gate, "grouped") for gate in GATES), ("vmoe", "low_memory")])
def test_nothing_accumulates_over_fifty_steps(gate: str, backend: str) -> None:
    moe = make(gate=gate, backend=backend)
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-3)
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        entry = Kept(tensor)
        kept.add(entry)
        return entry

    memory, graphs = [], set()
    for step in range(50):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
            y, routing = moe(torch.randn(3, 4, 16), TASKS)
            loss = y.square().mean() + routing.balance_loss + routing.z_loss
        assert len(kept) > 0
        graphs.add(graph_size(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del y, routing, loss
        assert len(kept) == 0, f"step {step}: what the graph kept is still there"
        if step in (4, 49):
            memory.append(live_tensors())
    assert memory[1] <= memory[0]
    assert len(graphs) == 1, f"the graph changes its size from step to step: {graphs}"
    for module in moe.modules():
        held = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not held and not module._buffers, f"{type(module).__name__} keeps {held}"


@pytest.mark.parametrize("task", ["semseg", "depth"])
@pytest.mark.parametrize("backend", ["loop", "grouped", "low_memory", "grouped_mm"])
def test_parity_with_the_published_layer(task: str, backend: str) -> None:
    golden = load_file(GOLDEN / "m3vit_moe.safetensors")
    prefix = "weights/backbone.blocks.1.mlp."
    published = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    tasks = ("semseg", "depth")
    moe = MoEMlp(48, 48, 8, 2, gate="vmoe", tasks=tasks, renormalize=False, backend=backend)
    moe.load_state_dict(from_published(published, tasks))
    y, routing = moe(golden["moe1/input"], (task,))
    assert torch.equal(routing.experts_TK, golden[f"moe1/{task}/indices"])
    for value, name in ((routing.weights_TK, "weights"), (y, "output")):
        wanted = golden[f"moe1/{task}/{name}"]
        assert ((value - wanted).abs().max() / wanted.abs().max()).item() < 1e-4
    back = to_published(moe.state_dict(), tasks)
    assert back.keys() == published.keys() and all(torch.equal(back[key], published[key]) for key in back)
