"""``CONFIG [--section.field value ...]``: a config file and what the command line changes of it, by tyro."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import tyro

from m3bsr.config import Config, load_config
from m3bsr.utils.checks import describe, did_you_mean


def parse_cli(argv: Sequence[str], description: str) -> tuple[Config, str]:
    """Parse ``CONFIG [--section.field value ...]``.

    Args:
        argv: arguments without the program's name. ``--help`` shows every field, with the values of CONFIG if given.
        description: first line of the help.

    Returns:
        The config and the path of its file.

    Raises:
        FileNotFoundError, ValueError: a missing or faulty config file; an unknown option or a bad value, named with
            its nearest match.
        SystemExit: after ``--help``.
    """
    path = argv[0] if argv and not argv[0].startswith("-") else None
    if path is None and not {"-h", "--help"} & set(argv):
        raise ValueError("the first argument must be a config file, such as configs/moe_nyud_tiny.py")
    default = Config() if path is None else load_config(path)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            arguments = list(argv[1:] if path else argv)
            config = tyro.cli(
                Config,
                prog=f"{Path(sys.argv[0]).name} CONFIG",
                default=default,
                args=arguments,
                description=description,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_one_line(errors.getvalue())) from None
    return config, str(path)


def _one_line(message: str) -> str:
    """tyro's framed error as one line: the field, what it takes, what it got, the nearest match."""
    message = re.sub(r"\A[^\n]*\n\s*-{5,}\s*\n", "", message)  # the title, where the terminal has no box characters
    lines = [re.sub(r"^[\s│]+|[\s│]+$", "", line) for line in message.splitlines()]
    text = "\n".join(line for line in lines if line and line[0] not in "╭╰")
    what, *rest = re.split(r"\n?(?:─|-){5,}\n?", text)
    what = re.sub(r"\s+", " ", what).strip()
    if choice := re.match(r"invalid choice '(.*)' for argument '(--[\w.-]+)'\. Expected one of \((.*)\)", what):
        got, option, known = choice.groups()
        nearest = did_you_mean(got, re.findall("'([^']*)'", known))
        return f"{option} must be one of {known}, got {got!r}{nearest}"
    if wrong := re.match(r"Error parsing (--[\w.-]+): ", what):
        return f"{wrong[1]} must be {_takes(wrong[1])}; {_got(what)}"
    what = re.sub(r"^Error parsing \w+: (?=\w+\.\w+ )", "", what)  # one of our own checks: it names its field
    near = re.findall(r"^(--[\w.-]+)", "\n".join(part for part in rest if part.startswith("Perhaps")), re.MULTILINE)
    return what + (f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else "")


def _takes(option: str) -> str:
    """What ``--section.field`` takes, in words."""
    section, name = option.removeprefix("--").replace("-", "_").split(".")
    hint = get_type_hints(type(getattr(Config(), section)))[name]
    if (section, name) == ("loss", "weights"):
        return "pairs of a task and a number, such as semseg 1 depth 2"
    return describe(hint)


def _got(message: str) -> str:
    """The end of tyro's message: the arguments that it could not use."""
    arguments = re.findall(r"instantiated from (\[.*?\])|arguments (\[.*?\])|: ('.*')$", message)
    return f"got {next(filter(None, arguments[0]))}" if arguments else "some of them are missing or wrong"
