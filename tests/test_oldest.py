"""The constraints of `make oldest` are the lower bounds of pyproject.toml."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_oldest_releases_are_the_lower_bounds() -> None:
    dependencies = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [")[1].split("]\n")[0]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', dependencies))
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.M))
    assert len(bounds) > 8 and oldest.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert re.fullmatch(re.escape(bound) + r"(\.0)*", oldest[name]), name
