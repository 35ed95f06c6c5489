"""Values of a frozen dataclass against its annotations, with errors that name the field."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_fields(owner: Any, section: str) -> None:
    """Check every field of a dataclass instance, for use in ``__post_init__``; lists become tuples on the way.

    Knows int, float (finite; an int will do), bool, str, None, Literal, unions, tuples and dicts.

    Raises:
        ValueError: ``section.field must be ..., got ...``, with the nearest match of a Literal.
    """
    for name, hint in _hints(type(owner)).items():  # type: ignore[arg-type]
        value = tuples(getattr(owner, name))
        object.__setattr__(owner, name, value)
        if not fits(value, hint):
            near = did_you_mean(value, [known for known in _literals(hint) if isinstance(known, str)])
            raise ValueError(f"{section}.{name} must be {describe(hint)}, got {value!r}{near}")


def check_positive(owner: Any, section: str, *names: str) -> None:
    """That numbers, also in tuples and dicts, are above 0; None passes.

    Raises:
        ValueError: ``section.field must be positive, got ...``.
    """
    for where, value, numbers in _numbers(owner, section, names):
        if any(number <= 0 for number in numbers):
            what = "positive" if len(numbers) > 1 or isinstance(numbers[0], float) else "a positive integer"
            raise ValueError(f"{where} must be {what}, got {value}")


def check_not_negative(owner: Any, section: str, *names: str) -> None:
    """That numbers, also in tuples and dicts, are 0 or above; None passes.

    Raises:
        ValueError: ``section.field must not be negative, got ...``.
    """
    for where, value, numbers in _numbers(owner, section, names):
        if any(number < 0 for number in numbers):
            raise ValueError(f"{where} must not be negative, got {value}")


def check_share(owner: Any, section: str, *names: str, bounds: str = "[0, 1)") -> None:
    """That numbers, also in tuples and dicts, lie between 0 and 1 (``bounds`` says with which ends); None passes.

    Raises:
        ValueError: ``section.field must lie in [0, 1), got ...``.
    """
    for where, value, numbers in _numbers(owner, section, names):
        low, high = min(numbers, default=0.5), max(numbers, default=0.5)
        if low < 0 or high > 1 or (low == 0 and bounds[0] == "(") or (high == 1 and bounds[-1] == ")"):
            raise ValueError(f"{where} must lie in {bounds}, got {value}")


def _numbers(owner: Any, section: str, names: Iterable[str]) -> Iterator[tuple[str, Any, Sequence[float]]]:
    """Every field of ``names``, and every entry of a dict, with its numbers."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, Mapping):
            yield from ((f"{section}.{name} of {key}", number, (number,)) for key, number in value.items())
        elif value is not None:
            yield f"{section}.{name}", value, value if isinstance(value, tuple) else (value,)


def check_known(name: str, known: Iterable[str], kind: str) -> None:
    """``unknown kind name``, with the nearest known one, as a ValueError; a ``kind`` such as ``field bsr.`` goes on in
    the name."""
    known = list(known)
    if name not in known:
        gap = "" if kind.endswith(".") else " "
        raise ValueError(f"unknown {kind}{gap}{printable(name)}{did_you_mean(name, known)}")


def tuples(value: Any) -> Any:
    """Lists as tuples, also inside one another: JSON knows no tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what the annotation ``hint`` allows."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in args)
    if _is_union(hint):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(fits(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(fits, value, args))
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if hint in (int, float) and isinstance(value, bool):  # bool is an int to Python
        return False
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    assert isinstance(hint, type), f"annotation {hint} is not supported"
    return isinstance(value, hint)


def describe(hint: Any, many: bool = False) -> str:
    """The annotation in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if _is_union(hint):
        return " or ".join(describe(arg, many) for arg in args)
    if origin is tuple:
        number = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"{'tuples' if many else 'a tuple'} of {number}{describe(args[0], many=True)}"
    if origin is dict:
        return f"a dict from {describe(args[0], many=True)} to {describe(args[1], many=True)}"
    one, several = {
        int: ("an integer", "integers"),
        float: ("a finite number", "finite numbers"),
        bool: ("True or False", "True or False"),
        str: ("a string", "strings"),
        type(None): ("None", "None"),
    }[hint]
    return several if many else one


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [known for arg in get_args(hint) for known in _literals(arg)] if _is_union(hint) else []


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def printable(name: str) -> str:
    """A name from elsewhere for a message of one line: as it is, or with escapes for line breaks and the like."""
    return name if name.isprintable() else repr(name)
