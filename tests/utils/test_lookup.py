from __future__ import annotations

import pytest

from m3bsr.utils.lookup import lookup

TABLE = {"light": 1, "upsample": 2}


def test_known_name():
    assert lookup(TABLE, "light", "head") == 1


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ValueError) as caught:
        lookup(TABLE, "lite", "head")
    assert str(caught.value) == "unknown head 'lite' (did you mean 'light'?); known: light, upsample"


def test_nothing_near():
    with pytest.raises(ValueError, match="^unknown head 'zzz'; known: light, upsample$"):
        lookup(TABLE, "zzz", "head")
