"""The rules of the house, read off the source: layers, cycles, lengths, and what may import what.

Imports are found by walking the syntax tree, so those inside functions and under ``TYPE_CHECKING`` count, and so do
``importlib.import_module("...")`` and ``__import__("...")`` of a literal.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"config", "plan", "utils"},
    {"bsr", "metrics", "losses", "cost"},
    {"moe", "heads", "tasks", "delta"},
    {"backbones", "data"},
    {"models", "methods"},
    {"build", "engine"},
    {"report", "cli"},
    {""},  # m3bsr/__init__.py: the public names, for users only
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {("engine", "build")}
SOURCES = ("m3bsr", "tools", "configs", "datasets", "tests")
MAX_LINES, MAX_TOOL_LINES = 600, 80


@dataclass(frozen=True)
class Import:
    """``name`` is imported at ``line``; for ``from a import b`` it is ``a.b``, whatever b is."""

    name: str
    line: int


def sources(root: Path, folder: str) -> list[Path]:
    """Python files of a folder, without hidden ones and caches."""
    parts = ((path, path.relative_to(root).parts) for path in sorted((root / folder).rglob("*.py")))
    return [path for path, names in parts if not any(n.startswith(".") or n == "__pycache__" for n in names)]


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, package: str) -> Iterator[Import]:
    """All imports of a file in ``package`` (dotted; what a relative import starts from)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                start = package.split(".")
                base = start[: len(start) - node.level + 1] + base
            yield from (Import(".".join([*base, alias.name]), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno)


def graph(root: Path) -> dict[str, dict[str, int]]:
    """module -> {imported module of m3bsr: line}; names inside a module are cut off to the module."""
    files = {module_name(root, path): path for path in sources(root, "m3bsr")}
    edges: dict[str, dict[str, int]] = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        targets = edges.setdefault(name, {})
        for found in imports(path, package):
            target = found.name
            if target.split(".")[0] != "m3bsr":
                continue
            while target not in files and "." in target:
                target = target.rpartition(".")[0]
            if target != name:
                targets.setdefault(target, found.line)
    return edges


def part(module: str) -> str:
    """Name under m3bsr: ``bsr`` for ``m3bsr.bsr.tokens``, empty for m3bsr itself."""
    return module.split(".")[1] if "." in module else ""


def upward_arrows(edges: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for module, targets in edges.items():
        if part(module) not in LEVEL:
            yield f"{module} belongs to no layer: name its package in LAYERS"
            continue
        for target, line in targets.items():
            source, goal = part(module), part(target)
            if LEVEL.get(goal, 0) > LEVEL[source] or (source, goal) in FORBIDDEN:
                yield f"{module} line {line}: imports {target}, which lies higher"


def cycles(edges: Mapping[str, Iterable[str]], what: str) -> Iterator[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        yield f"{what} cycle: {' <- '.join(error.args[1])}"


def package_edges(edges: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    packages: dict[str, set[str]] = {}
    for module, targets in edges.items():
        packages.setdefault(part(module), set()).update(part(t) for t in targets if part(t) != part(module))
    return packages


def long_files(root: Path) -> Iterator[str]:
    for folder in SOURCES:
        for path in sources(root, folder):
            num_lines = len(path.read_text(encoding="utf-8").splitlines())
            if num_lines > MAX_LINES:
                yield f"{path.relative_to(root)} has {num_lines} lines, more than {MAX_LINES}"
            if folder == "tools" and num_lines >= MAX_TOOL_LINES:
                yield f"{path.relative_to(root)} has {num_lines} lines: a tool stays under {MAX_TOOL_LINES}"


def not_packages(root: Path) -> Iterator[str]:
    """datasets/ and tests/ are folders, not packages: they would shadow others' ``datasets`` and ``tests``."""
    for folder in ("datasets", "tests"):
        for path in sorted((root / folder).rglob("__init__.py")):
            yield f"{path.relative_to(root)} must not exist: {folder}/ is no package"


def wrong_imports(root: Path) -> Iterator[str]:
    """``import datasets`` anywhere, and what configs and tools may not import."""
    for path in [*root.glob("*.py"), *(path for folder in SOURCES for path in sources(root, folder))]:
        place = path.relative_to(root)
        for found in imports(path, ".".join(place.parent.parts)):
            top = found.name.split(".")[0]
            where = f"{place} line {found.line}: imports {found.name}"
            if top == "datasets":
                yield f"{where}; datasets/ is no package, and the name belongs to Hugging Face"
            elif top in sys.stdlib_module_names:
                continue
            elif place.parts[0] == "configs" and not f"{found.name}.".startswith("m3bsr.config."):
                yield f"{where}; a config imports m3bsr.config and the standard library only"
            elif place.parts[0] == "tools" and not found.name.startswith(f"m3bsr.cli.{path.stem}."):
                yield f"{where}; a tool imports its own m3bsr.cli.{path.stem} and the standard library only"


def violations(root: Path) -> list[str]:
    edges = graph(root)
    return [
        *upward_arrows(edges),
        *cycles(edges, "module"),
        *cycles(package_edges(edges), "package"),
        *long_files(root),
        *not_packages(root),
        *wrong_imports(root),
    ]


def test_the_house_is_in_order():
    assert len(graph(ROOT)) > 80, "the walk missed the modules"
    assert violations(ROOT) == []


def test_the_walk_sees_known_arrows():
    edges = graph(ROOT)
    assert "m3bsr.plan" in edges["m3bsr.config"]
    assert "m3bsr.models" in edges["m3bsr.build"] or "m3bsr.models.multitask" in edges["m3bsr.build"]
    assert "m3bsr.bsr" in edges["m3bsr"]


GOOD = {
    "m3bsr/__init__.py": "from m3bsr.bsr import Plan\n",
    "m3bsr/plan.py": "class Plan: ...\n",
    "m3bsr/config.py": "from m3bsr.plan import Plan\n",
    "m3bsr/bsr/__init__.py": "from m3bsr.plan import Plan\nfrom m3bsr.bsr.tokens import keep\n",
    "m3bsr/bsr/tokens.py": "import math\nfrom ..plan import Plan\n",
    "m3bsr/moe/__init__.py": "",
    "m3bsr/moe/gates/__init__.py": "from .linear import Gate\n",
    "m3bsr/moe/gates/linear.py": "from m3bsr.moe.routing import Routing\n",
    "m3bsr/moe/routing.py": "import torch\n",
    "m3bsr/heads/__init__.py": "",
    "m3bsr/build.py": "from m3bsr.engine import train\nfrom m3bsr.config import Config\n",
    "m3bsr/engine/__init__.py": "",
    "m3bsr/engine/train.py": "import m3bsr.bsr.tokens\n",
    "m3bsr/cli/train.py": "from m3bsr import build\n",
    "tools/train.py": "import sys\nfrom m3bsr.cli.train import main\n",
    "configs/a.py": "from pathlib import Path\nfrom m3bsr.config import Config\n",
    "datasets/x/prepare.py": "import numpy\nfrom m3bsr.data import files\n",
    "tests/test_a.py": "import pytest\nfrom m3bsr import Plan\ntext = 'import datasets'\n",
}


def tree(root: Path, changes: Mapping[str, str]) -> Path:
    for name, text in {**GOOD, **changes}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_good_tree_has_no_violations(tmp_path):
    assert violations(tree(tmp_path, {})) == []


BAD = {
    "arrow up": (
        "m3bsr/bsr/tokens.py",
        "from m3bsr.moe import routing",
        "m3bsr.bsr.tokens line 1: imports m3bsr.moe.r",
    ),
    "from the package root": ("m3bsr/moe/routing.py", "from m3bsr import Plan", "imports m3bsr, which lies higher"),
    "module of the root": ("m3bsr/moe/routing.py", "from m3bsr import build", "imports m3bsr.build, which lies higher"),
    "lazy": ("m3bsr/bsr/tokens.py", "def f():\n    import m3bsr.heads", "m3bsr.bsr.tokens line 2: imports m3bsr.heads"),
    "for types only": (
        "m3bsr/plan.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from m3bsr.bsr.tokens import keep",
        "m3bsr.plan line 3: imports m3bsr.bsr.tokens",
    ),
    "relative": ("m3bsr/bsr/tokens.py", "from ..heads import X", "m3bsr.bsr.tokens line 1: imports m3bsr.heads"),
    "relative in __init__": ("m3bsr/bsr/__init__.py", "from .. import build", "m3bsr.bsr line 1: imports m3bsr.build"),
    "import_module": (
        "m3bsr/moe/routing.py",
        "import importlib\nimportlib.import_module('m3bsr.cli.train')",
        "m3bsr.moe.routing line 2: imports m3bsr.cli.train",
    ),
    "engine imports build": ("m3bsr/engine/train.py", "from m3bsr.build import x", "imports m3bsr.build, which lies h"),
    "unknown package": ("m3bsr/misc/a.py", "", "m3bsr.misc.a belongs to no layer"),
    "module cycle": (
        "m3bsr/moe/routing.py",
        "def f():\n    from m3bsr.moe.gates import Gate",
        "module cycle: m3bsr.moe",
    ),
    "too long": ("tests/test_long.py", "x = 1\n" * 601, "tests/test_long.py has 601 lines"),
    "long tool": ("tools/train.py", "import sys\n" * 80, "tools/train.py has 80 lines"),
    "datasets package": ("datasets/__init__.py", "", "datasets/__init__.py must not exist"),
    "datasets subpackage": ("datasets/x/__init__.py", "", "datasets/x/__init__.py must not exist"),
    "tests package": ("tests/deep/er/__init__.py", "", "tests/deep/er/__init__.py must not exist"),
    "import datasets": ("m3bsr/plan.py", "import datasets", "m3bsr/plan.py line 1: imports datasets;"),
    "from datasets": (
        "datasets/x/prepare.py",
        "from datasets.x import y",
        "imports datasets.x.y; datasets/ is no package",
    ),
    "lazy datasets": (
        "tests/test_a.py",
        "def f():\n    import datasets.x as d",
        "tests/test_a.py line 2: imports datasets.x",
    ),
    "datasets in setup.py": ("setup.py", "__import__('datasets')", "setup.py line 1: imports datasets;"),
    "config imports torch": ("configs/deep/b.py", "import torch", "configs/deep/b.py line 1: imports torch; a config"),
    "config imports build": (
        "configs/a.py",
        "from m3bsr.build import build_model",
        "a config imports m3bsr.config and",
    ),
    "config imports plan": (
        "configs/a.py",
        "from m3bsr import Plan",
        "configs/a.py line 1: imports m3bsr.Plan; a config",
    ),
    "config imports look-alike": ("configs/a.py", "import m3bsr.configuration", "a config imports m3bsr.config and"),
    "tool imports torch": ("tools/train.py", "import torch", "a tool imports its own m3bsr.cli.train and"),
    "tool imports another": (
        "tools/train.py",
        "from m3bsr.cli.demo import main",
        "a tool imports its own m3bsr.cli.train",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_each_violation_is_caught(tmp_path, case):
    name, text, message = BAD[case]
    found = violations(tree(tmp_path, {name: text}))
    assert any(message in line for line in found), found


def test_cycle_of_packages_on_one_level_without_a_cycle_of_modules(tmp_path):
    changes = {
        "m3bsr/heads/a.py": "import m3bsr.moe.routing",
        "m3bsr/moe/b.py": "import m3bsr.heads.c",
        "m3bsr/heads/c.py": "",
    }
    found = violations(tree(tmp_path, changes))
    assert len(found) == 1 and found[0].startswith("package cycle: ") and "moe" in found[0] and "heads" in found[0]


def test_exactly_600_lines_and_79_lines_of_tool_are_allowed(tmp_path):
    changes = {"m3bsr/plan.py": "x = 1\n" * 600, "tools/train.py": "import sys\n" * 79}
    assert violations(tree(tmp_path, changes)) == []
