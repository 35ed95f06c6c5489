"""``m3bsr COMMAND ...``, also ``python -m m3bsr.cli COMMAND ...``: what ``tools/COMMAND.py`` does, once installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from m3bsr.utils.lookup import lookup

COMMANDS = {
    "train": "one run, from config to metrics",
    "evaluate": "metrics of a trained run",
    "predict": "what a trained run sees in photographs",
    "report": "a run's page",
    "plan": "plans that fit a budget",
    "measure_cost": "what a training step costs",
    "compare": "ways of fine-tuning under one budget",
    "compare_runs": "finished runs side by side",
    "show_tokens": "which patches a model keeps",
    "score": "metrics of predictions on disk",
    "extract_task": "one task of a run as a model of its own",
    "check_data": "every file of a data set read",
    "demo": "the whole story on generated rooms",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; 2 for one that nobody knows."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: m3bsr COMMAND ..., m3bsr COMMAND --help\n")
        print("\n".join(f"  {command:<14}{what}" for command, what in COMMANDS.items()))
        return 0
    name = name.replace("-", "_")
    try:
        lookup(COMMANDS, name, "command")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return importlib.import_module(f"m3bsr.cli.{name}").main(rest)  # the others need not be imported


if __name__ == "__main__":
    sys.exit(main())
