"""What a way of fine-tuning is, and the few things that several of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from m3bsr.models import MultiTaskModel
from m3bsr.plan import Plan

FROZEN = Plan(train_blocks=())
"""Of the backbone nothing trains, but for what a method's ``change`` lets train afterwards."""


def no_change(model: MultiTaskModel, value: str) -> None:
    """The plan says it all."""


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning: the plan that the backbone runs under, then a change of the model that has it.

    The heads train under every method, and with them the final norm, which is theirs. Gates of experts train where
    all of their block does.
    """

    what: str
    """What trains and what is special, in a few words."""
    plan: Callable[[Plan, int, str], Plan]
    """``plan(plan of the config, number of blocks, value)``: the plan of this method. Most ignore the config's."""
    change: Callable[[MultiTaskModel, str], None] = no_change
    """``change(model, value)``: new modules and ``requires_grad``, behind ``set_plan``."""
    value: str = ""
    """What may stand behind the colon (``last:3``); empty: nothing."""
    check_value: Callable[[str], object] | None = None
    """Raises ValueError for a value that will not do; called with the empty string where none is given."""
    lr_scale: float = 1.0
    """Learning rate of what trains in the backbone over that of full fine-tuning, for comparisons: few parameters, or
    parameters that start at zero, want a higher one. A single run takes ``optim.lr`` as it is."""

    def check(self, name: str, value: str) -> None:
        """Raise ValueError for a value that the method does not take or lacks."""
        if self.check_value is None:
            if value:
                raise ValueError(f"model.method {name} takes no value, got {name}:{value}")
            return
        try:
            self.check_value(value)
        except ValueError:
            got = f"{name}:{value}" if value else name
            raise ValueError(f"model.method {name} takes {self.value}, as in {name}:N; got {got!r}") from None


def positive(value: str, default: int | None = None) -> int:
    """A positive integer. ValueError for anything else, and for nothing where there is no default."""
    if not value and default is not None:
        return default
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(value)
    return int(value)


def share(value: str, default: float) -> float:
    """A number in (0, 1)."""
    number = float(value) if value else default
    if not 0 < number < 1:
        raise ValueError(value)
    return number


def train_parameters(modules: Iterable[nn.Module], wanted: Callable[[str], bool]) -> None:
    """Let those parameters of ``modules`` train whose own name (``weight``, ``bias``) is wanted."""
    for module in modules:
        for path, parameter in module.named_parameters():
            if wanted(path.rpartition(".")[2]):
                parameter.requires_grad_(True)


def short_names(module: nn.Module, short: Callable[[str], str]) -> None:
    """In state dicts give the entries of ``module`` other names, in both directions.

    So a wrapper around a layer leaves the layer's name as it was: the weights of a base go on fitting.
    """
    names = {long: short(long) for long in module.state_dict()}
    module.register_state_dict_post_hook(partial(_rename, {k: v for k, v in names.items() if k != v}))
    back = {v: k for k, v in names.items() if k != v}
    module.register_load_state_dict_pre_hook(partial(_rename_on_load, back))


def _rename(names: Mapping[str, str], _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for old, new in names.items():
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)


def _rename_on_load(names: Mapping[str, str], _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    _rename(names, _, state, prefix)
