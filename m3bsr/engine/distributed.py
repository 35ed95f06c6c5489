"""Several processes as one run: who is who, and what they tell each other.

``torchrun`` starts the processes and says so in the environment; :func:`processes` joins them. Every function here
works without a process group too, as one process alone, so the code that calls them has no second path. Between
processes go small tensors on the CPU (gloo) and whatever lies on the device (nccl on CUDA, gloo on the CPU).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
USER_ERRORS = (ValueError, OSError)


def is_joined() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0; before :func:`processes` what torchrun says."""
    return dist.get_rank() if is_joined() else int(os.environ.get("RANK", 0))


def num_processes() -> int:
    """Processes that take part, 1 without a process group."""
    return dist.get_world_size() if is_joined() else 1


def place() -> dict[str, int]:
    """``rank`` and ``num_processes`` as keyword arguments of what is shared out."""
    return {"rank": rank() if is_joined() else 0, "num_processes": num_processes()}


def is_main() -> bool:
    """Whether this is process 0, the one that writes."""
    return rank() == 0


@contextmanager
def processes(device: torch.device, timeout_s: float = 600.0) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and part from them at the end; alone, nothing happens.

    Args:
        device: its type decides what gradients travel by: nccl for CUDA, gloo for the CPU.
        timeout_s: how long to wait for another process, in everything they do together.

    Yields:
        The device of this process: of CUDA the one numbered ``LOCAL_RANK``.

    Raises:
        ValueError: more processes on this machine than CUDA devices.
        LostProcessError: another process ended, or did not answer within ``timeout_s``.
    """
    if "WORLD_SIZE" not in os.environ or is_joined():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {rank()} has no CUDA device: {torch.cuda.device_count()} on this machine; "
                "lower --nproc-per-node, or --run.device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = _roll_call.patience = timedelta(seconds=timeout_s)
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=patience))
        # torchrun's store outlives a restart, and with it the addresses of processes that are gone
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=patience)
        _roll_call.begin(store)
        yield device
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        # The group is left as it is: to take it apart would be one more thing to wait for.
        raise LostProcessError(f"{_roll_call.missing()} (train.timeout_s {timeout_s:g}): {_cause(error)}") from None
    dist.destroy_process_group()


class LostProcessError(RuntimeError):
    """Another process ended or did not answer in time, so that this one cannot go on."""


class _RollCall:
    """How often each process has come to a meeting, in the store that torchrun keeps: who is late can be named.

    All meet in the same order, so a process that is missing has been at fewer meetings than those who wait for it.
    A note is written without waiting for an answer: 0.002 ms.
    """

    def __init__(self) -> None:
        self.store: dist.Store | None = None
        self.meetings = 0
        self.patience: timedelta | None = None

    def begin(self, store: dist.Store) -> None:
        self.store, self.meetings = dist.PrefixStore("roll call", store), 0
        self.note()
        dist.barrier()  # from here on all have a number

    def note(self) -> None:
        self.meetings += 1
        if self.store is not None:
            self.store.set(str(rank()), str(self.meetings))

    def missing(self) -> str:
        """Who is late, as far as can be told."""
        if self.store is None:
            return "the processes did not find each other"
        late = []
        for number in range(num_processes()):
            try:
                self.store.set_timeout(timedelta(seconds=2))
                if int(self.store.get(str(number))) < self.meetings:
                    late.append(number)
            except RuntimeError:  # the one that keeps the store is gone
                late.append(number)
                break
        if not late and num_processes() == 2:  # lost between two meetings, in something that a library does
            late = [1 - rank()]
        self._let_the_others_look(late)
        who = f"process {', '.join(map(str, late))} of {num_processes()}" if late else "another process"
        return f"{who} ended or does not answer"

    def _let_the_others_look(self, late: list[int]) -> None:
        """Process 0 keeps the store: if it ended first, the others would take it for the one that is lost."""
        assert self.store is not None
        others = [f"looked {number}" for number in range(1, num_processes()) if number not in late]
        with contextlib.suppress(RuntimeError):  # the store, or one of the others, is gone as well
            if rank() == 0 and others:
                self.store.wait(others, timedelta(seconds=10))
            else:
                self.store.set(f"looked {rank()}", "")


_roll_call = _RollCall()
LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or bool(LOST.search(str(error)))


def _cause(error: RuntimeError) -> str:
    """What the library says, without the place in its source."""
    return re.sub(r"^\[[^\]]*\] *", "", str(error).strip().splitlines()[0]).rstrip(".")


def meet() -> None:
    """Note that this process is about to do something together with the others."""
    _roll_call.note()


def patience() -> timedelta | None:
    """How long to wait for another process, for groups of some of them; None without a process group of ours."""
    return _roll_call.patience


def gather(value: T) -> list[T]:
    """The values of all processes by their number; called by all. For plain data."""
    if num_processes() == 1:
        return [value]
    meet()
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """The largest of the numbers of all processes; called by all. One message of eight bytes."""
    if num_processes() == 1:
        return value
    meet()
    numbers = torch.tensor([value])
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, in place; called by all."""
    if num_processes() > 1:
        meet()
        dist.all_reduce(values)
        values /= num_processes()
    return values


def sum_of_all(tree: dict[Any, Any]) -> dict[Any, Any]:
    """Nested dicts of tensors, added up over the processes; called by all. Keys may be missing on some of them."""
    if num_processes() == 1:
        return tree
    first, *others = gather(_map(lambda tensor: tensor.cpu(), tree))
    for other in others:
        _add(first, other)
    return first


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return {key: _map(function, value) for key, value in tree.items()} if isinstance(tree, dict) else function(tree)


def _add(tree: dict[Any, Any], other: dict[Any, Any]) -> None:
    for key, value in other.items():
        if key in tree and isinstance(value, dict):
            _add(tree[key], value)
        else:
            tree[key] = tree[key] + value if key in tree else value


def wait_for_all() -> None:
    """Go on when every process is here."""
    if num_processes() > 1:
        meet()
        dist.barrier()


def from_main(function: Callable[[], T]) -> T:
    """Call ``function`` on process 0 alone and have its result on all; an error of it ends all of them."""
    result: list[Any] = [None]
    with together():
        if is_main():
            result = [function()]
    if num_processes() > 1:
        meet()
        dist.broadcast_object_list(result, src=0)
    return result[0]


class ElsewhereError(ValueError):
    """Another process failed, and says why."""


@contextmanager
def together() -> Iterator[None]:
    """All processes get through the block, or none does: what the user can mend ends all, and is said once.

    The block must not contain anything that processes do together.

    Raises:
        ValueError, OSError: of this process; ``is_told(error)`` if one with a lower number says the same.
        ElsewhereError: only of other processes.
    """
    error: Exception | None = None
    try:
        yield
    except USER_ERRORS as caught:
        error = caught
    messages = gather(str(error) if error is not None else None)
    if error is not None:
        error.told = messages.index(str(error)) < rank()  # type: ignore[attr-defined]
        raise error
    if any(message is not None for message in messages):
        raise ElsewhereError(next(message for message in messages if message is not None))


def is_told(error: BaseException) -> bool:
    """Whether another process prints this error.

    Before the process group is there, the first process of a machine speaks for all of it: they read the same files.
    """
    if isinstance(error, ElsewhereError):
        return True
    alone = not is_joined() and not hasattr(error, "told")
    return bool(getattr(error, "told", alone and int(os.environ.get("LOCAL_RANK", 0)) > 0))


def who() -> str:
    """``"process 3: "`` in front of what this process says; nothing for the first."""
    return "" if is_main() else f"process {rank()}: "


def same_as_main(tensors: Sequence[Tensor]) -> None:
    """Overwrite the tensors of all processes by those of process 0."""
    if num_processes() > 1:
        meet()
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def same_buffers(model: nn.Module) -> None:
    """Statistics of BatchNorm are those of process 0's share of the data, for evaluation and in checkpoints."""
    same_as_main(list(model.buffers()))
