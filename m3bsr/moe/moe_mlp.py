"""The MoE layer that stands in for a ViT block's MLP: gates, routing, experts.

Shapes: G tasks, B images, N tokens an image, T = G * B * N tokens, D embed_dim, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.moe.backends import check_backend, run_experts
from m3bsr.moe.experts import Experts
from m3bsr.moe.gates import GATES
from m3bsr.moe.gates.linear import expert_windows
from m3bsr.moe.routing import GateOutput, Routing
from m3bsr.utils.lookup import lookup

GATE_MODES = ("shared", "per_task", "task_conditioned")
GATE_INPUTS = ("after", "before")
SHARED = "shared"


class TaskCode(nn.Module):
    """One-hot task -> small MLP -> LayerNorm: what a task-conditioned gate sees beside every token."""

    def __init__(self, num_tasks: int, dim: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.fc1 = nn.Linear(num_tasks, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, index: int) -> Tensor:
        """Code of a task: `[dim]`."""
        one_hot = torch.zeros(self.num_tasks, device=self.fc1.weight.device, dtype=self.fc1.weight.dtype)
        one_hot[index] = 1.0
        return self.norm(self.fc2(F.gelu(self.fc1(one_hot))))


class MoEMlp(nn.Module):
    """Mixture-of-experts MLP with task gates over shared experts.

    Args:
        embed_dim, hidden_dim: width of the tokens, and of each expert.
        num_experts, top_k: experts, and how many of them serve a token.
        gate: a name in `GATES`.
        gate_mode: "per_task" (M3ViT's best: one gate a task), "shared" (one gate for all), or "task_conditioned"
            (one gate that reads token and task code).
        tasks: names that `forward` will be asked for; in mode "shared" without windows any name will do.
        noise_std, renormalize: passed to the gate.
        backend: a name in `BACKENDS`, or "auto".
        experts_per_task: give each task a contiguous window of this many experts (None: all experts for all).
        task_dim: width of the task code (task_conditioned only).
        gate_input: what the gates read: "after" attention, the tokens that the experts get, or "before" it, the
            block's input (M3ViT's `gate_input_ahead`), which `forward` must then be given.

    Raises:
        ValueError: for unknown names, sizes that cannot route, or a backend whose library is missing.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        gate: str = "vmoe",
        gate_mode: str = "per_task",
        tasks: Sequence[str] = ("task",),
        noise_std: float = 0.0,
        renormalize: bool = True,
        backend: str = "auto",
        experts_per_task: int | None = None,
        task_dim: int = 64,
        gate_input: str = "after",
    ) -> None:
        super().__init__()
        gate_type = lookup(GATES, gate, "gate")
        if gate_mode not in GATE_MODES:
            raise ValueError(f'gate_mode must be one of {", ".join(GATE_MODES)}, got "{gate_mode}"')
        if gate_input not in GATE_INPUTS:
            raise ValueError(f'gate_input must be one of {", ".join(GATE_INPUTS)}, got "{gate_input}"')
        if isinstance(tasks, str) or not tasks or len(set(tasks)) != len(tasks) or any("." in t for t in tasks):
            raise ValueError(f"tasks must be a tuple of distinct names without dots, got {tasks!r}")
        check_backend(backend)
        self.embed_dim, self.hidden_dim, self.num_experts, self.top_k = embed_dim, hidden_dim, num_experts, top_k
        self.gate_mode, self.gate_input, self.backend, self.tasks = gate_mode, gate_input, backend, tuple(tasks)
        self.windows: dict[str, tuple[int, int]] = {}
        if experts_per_task is not None:
            if experts_per_task < top_k:
                raise ValueError(f"experts_per_task={experts_per_task} is fewer than top_k={top_k}")
            self.windows = dict(zip(tasks, expert_windows(len(tasks), num_experts, experts_per_task), strict=True))
        names = self.tasks if gate_mode == "per_task" else (SHARED,)
        in_dim = embed_dim + (task_dim if gate_mode == "task_conditioned" else 0)
        self.gates = nn.ModuleDict(
            {
                name: gate_type(in_dim, num_experts, top_k, noise_std=noise_std, renormalize=renormalize)
                for name in names
            }
        )
        self.renormalize = bool(self.gates[names[0]].renormalize)  # whether the weights sum to 1
        if gate_mode == "task_conditioned":
            # Within the gate: every entry of `gates` is a gate, and loading may leave all of it fresh.
            self.gates[SHARED].add_module("task_code", TaskCode(len(self.tasks), task_dim))
        self.experts = Experts(num_experts, embed_dim, hidden_dim)

    @property
    def task_dependent(self) -> bool:
        """Whether tokens of different tasks are treated differently (so the batch must be split by task here)."""
        return len(self.tasks) > 1 and (self.gate_mode != "shared" or bool(self.windows))

    def set_trainable_experts(self, ids: Sequence[int] | str) -> None:
        """Train exactly these experts (`"all"` or ids); the others get no gradient and no optimizer state."""
        self.experts.set_trainable(ids)

    def forward(
        self, x_BND: Tensor, tasks: Sequence[str], gate_input_BND: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Route and run tokens `[len(tasks) * B, N, D]`, task-major; returns the same shape, and the routing.

        `gate_input_BND` (same shape) is what the gates read instead of the tokens, such as the block's input before
        attention; a layer with `gate_input="before"` must get it. Nothing is kept on the module: the losses are in
        the routing.

        Raises:
            ValueError: for a task without gate or window, or a batch that does not divide among the tasks.
        """
        assert gate_input_BND is not None or self.gate_input == "after", "gates before attention need their input"
        gate_x_BND = x_BND if gate_input_BND is None else gate_input_BND
        if gate_x_BND.shape != x_BND.shape:
            raise ValueError(f"gate input {tuple(gate_x_BND.shape)} and tokens {tuple(x_BND.shape)} differ in shape")
        x_TD = x_BND.reshape(-1, x_BND.shape[-1])
        routing = self.route(gate_x_BND, tasks)
        y_TD = run_experts(x_TD, routing.weights_TK, routing.experts_TK, self.experts, self.backend)
        return y_TD.view(x_BND.shape), routing

    def route(self, x_BND: Tensor, tasks: Sequence[str]) -> Routing:
        """The gates alone. Balance and z-loss: each gate's own over the tokens it sees together, then their mean.

        With per-task gates, or windows, that is one loss a task: each task must use its own experts evenly. A shared
        or task-conditioned gate balances over all tasks at once, so that tasks may specialise.
        """
        tasks = tuple(tasks)
        if not tasks or x_BND.shape[0] % len(tasks):
            raise ValueError(f"{x_BND.shape[0]} images do not divide among the tasks {tasks}")
        if self.task_dependent:
            unknown = [task for task in tasks if task not in self.tasks]
            if unknown:
                raise ValueError(f'no gate for task "{unknown[0]}"; this layer knows {", ".join(self.tasks)}')
        images, num_tokens, dim = x_BND.shape
        parts_TD = x_BND.reshape(len(tasks), images // len(tasks) * num_tokens, dim).unbind(0)
        # A layer made for a single task has no choice to make, whatever the task is called.
        names = tasks if self.task_dependent else self.tasks[:1] * len(tasks)
        if self.gate_mode == "task_conditioned":
            parts_TD = tuple(self._with_code(part, name) for part, name in zip(parts_TD, names, strict=True))
        if self.gate_mode == "per_task" or self.windows:
            outputs = [
                self._gate(name)(part, self.windows.get(name)) for part, name in zip(parts_TD, names, strict=True)
            ]
        else:
            outputs = [self.gates[SHARED](torch.cat(parts_TD))]
        return self._join(outputs, tasks)

    def _gate(self, task: str) -> nn.Module:
        return self.gates[task if self.gate_mode == "per_task" else SHARED]

    def _with_code(self, part_TD: Tensor, task: str) -> Tensor:
        code = self.gates[SHARED].get_submodule("task_code")(self.tasks.index(task)).to(part_TD.dtype)
        return torch.cat([part_TD, code.expand(part_TD.shape[0], -1)], dim=1)

    def _join(self, outputs: Sequence[GateOutput], tasks: tuple[str, ...]) -> Routing:
        return Routing(
            weights_TK=torch.cat([output.weights_TK for output in outputs]),
            experts_TK=torch.cat([output.experts_TK for output in outputs]),
            balance_loss=torch.stack([output.balance_loss for output in outputs]).mean(),
            z_loss=torch.stack([output.z_loss for output in outputs]).mean(),
            num_experts=self.num_experts,
            tasks=tasks,
        )
