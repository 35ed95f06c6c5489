"""What the documentation tells to type: scripts and make targets are there and take the options beside them."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("datasets/*/README.md")]
CONFIGS = sorted(ROOT.glob("configs/*.py"))
# LOG.md and CHANGELOG.md tell of commands as they were.
HISTORY = {"LOG.md", "CHANGELOG.md"}
COMMAND = re.compile(r"(?:tools|datasets)/[\w/]+\.py")
PLACES = {"CONFIG": "configs/moe_nyud_tiny.py"}


def code_in(text: str) -> Iterator[str]:
    """Lines of code blocks, without comments, and code within paragraphs."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text.replace("\\\n", " "), re.S | re.M):
        yield from (re.split(r"\s#\s", line)[0] for line in block.splitlines())
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every script that a text or the head of a config names, and the words behind it."""
    text = path.read_text()
    if path.suffix == ".py":
        head = re.search(r"Command:(.*?)(?=\n\w|\Z)", ast.get_docstring(ast.parse(text)) or "", re.S)
        assert head, f"{path.name} has no line Command:"
        codes = re.split(r" \(|, then |\)", head[1])
    else:
        codes = [*code_in(text)]
    for code in codes:
        for found in COMMAND.finditer(code):
            words = shlex.split(re.sub(r"[\[\]]", "", code[found.end() :]), comments=True)
            yield found[0], [PLACES.get(word, word) for word in words]


DOCUMENTED = {
    (script, *words): path.name
    for path in [*(text for text in TEXTS if text.name not in HISTORY), *CONFIGS]
    for script, words in commands(path)
}


class ParsedError(BaseException):
    """The command has taken its arguments; what it would do is not for this test."""


@pytest.mark.parametrize("command", [c for c in DOCUMENTED if any(w.startswith("-") for w in c)], ids=" ".join)
def test_options_are_taken(command, load, monkeypatch):
    script, *words = command
    monkeypatch.chdir(ROOT)
    module = (
        load(script) if script.startswith("datasets") else importlib.import_module(f"m3bsr.cli.{Path(script).stem}")
    )

    def parsed(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise ParsedError

        return parse_and_stop

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed(argparse.ArgumentParser.parse_args))
    if hasattr(module, "parse_cli"):
        monkeypatch.setattr(module, "parse_cli", parsed(module.parse_cli))
    with pytest.raises((ParsedError, SystemExit)) as ended:
        module.main(words)
    assert ended.type is ParsedError or ended.value.code == 0, f"{DOCUMENTED[command]}: {shlex.join(command)}"


def test_scripts_configs_links_and_targets_are_there():
    assert len(DOCUMENTED) > 60, "the walk missed the commands"
    missing = [
        f"{place}: {word}"
        for command, place in DOCUMENTED.items()
        for word in command
        if (word == command[0] or word.startswith("configs/")) and not (ROOT / word).is_file()
    ]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in TEXTS:
        links = [link for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()) if "://" not in link]
        missing += [f"{path.name}: {link}" for link in links if not (path.parent / link).exists()]
        found = [re.match(r"make (?:\w+=\S+ )?([\w-]+)", code) for code in code_in(path.read_text())]
        missing += [f"{path.name}: make {make[1]}" for make in found if make and make[1] not in targets]
    assert missing == []
