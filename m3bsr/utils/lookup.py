"""Look-up in a plain table, with an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """``table[name]``.

    Raises:
        ValueError: unknown name; the message lists the known ones and the nearest match.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown {kind} {name!r}{hint}; known: {', '.join(table)}")
