"""What to do when a training ran out of memory: a plan that is predicted to fit, and the command that trains it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from m3bsr.cli.plan import PredictedCosts, as_options, empty_job, find_plans
from m3bsr.config import Config

# Allocators lose some memory between blocks, and predictions err by some percent.
USABLE = 0.9
NEW_FIELDS = ("train.batch_size", "train.accumulate", "model.method", "run.resume", "run.overwrite")


def advice(config: Config, argv: Sequence[str], memory_bytes: int) -> str:
    """One line: what fits into ``memory_bytes``, and the command for it.

    The config's own plan in smaller batches comes first, with ``train.accumulate`` raised so that a step sees as many
    images; where no batch is small enough, the best plan that ``tools/plan.py`` finds.

    Args:
        argv: of the command that failed, from the config file on.
    """
    budget = int(USABLE * memory_bytes)
    size = config.train.batch_size
    smaller = sorted({max(1, size // 2**halvings) for halvings in range(1, size.bit_length())} or {1}, reverse=True)
    try:
        found = _own_plan(config, budget, smaller) or _other_plan(config, budget, smaller)
    except (ValueError, FileNotFoundError) as error:
        return (
            f"no plan is known to fit {_gb(budget)} ({error}); lower data.image_size, or use a smaller model.backbone"
        )
    peak, batch_size, what, options = found
    options += f" --train.accumulate {-(-config.train.accumulate * size // batch_size)}"
    if config.model.method != "bsr" and "--bsr." in options:
        options += " --model.method bsr"
    changed = [word[2:].replace("-", "_") for word in options.split() if word.startswith("--")]
    words = without_options(argv, {*NEW_FIELDS, *changed})
    checkpoint = Path(config.run.dir) / "checkpoints" / "last"
    if checkpoint.is_dir():  # another batch size is another run; what was learned so far is not lost
        words = without_options(words, {"run.dir", "model.weights"})
        weights = checkpoint / "model.safetensors"
        words += ["--run.dir", f"{config.run.dir}-smaller", "--model.weights", str(weights)]
    return (
        f"{what} is predicted to need {_gb(peak)} of the {_gb(memory_bytes)} there are: "
        f"tools/train.py {shlex.join(words)} {options}"
    )


def _own_plan(config: Config, budget: int, sizes: Sequence[int]) -> tuple[int, int, str, str] | None:
    if config.model.method != "bsr":
        return None
    traced = PredictedCosts(empty_job(config))
    for size in sizes:
        peak = traced.at(size)(config.bsr)[1]
        if peak <= budget and size < config.train.batch_size:
            return peak, size, f"the same plan in batches of {size}", f"--train.batch-size {size}"
    return None


def _other_plan(config: Config, budget: int, sizes: Sequence[int]) -> tuple[int, int, str, str]:
    blocks = config.bsr.train_blocks
    num_blocks = 3 if config.model.method != "bsr" or blocks == "all" or not blocks else len(blocks)
    rows: list[dict[str, Any]] = find_plans(config, budget, None, num_blocks=num_blocks, top=1, sizes=sizes)
    best = max(rows, key=lambda row: (row["value"], row["batch_size"]))
    what = f"training blocks {', '.join(map(str, best['plan'].train_blocks))} in batches of {best['batch_size']}"
    return best["predicted_peak_bytes"], best["batch_size"], what, as_options(best)


def without_options(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """``argv`` without the options of the fields ``names`` (``train.batch_size``) and their values."""
    kept, keep = [], True
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            keep = name not in names and name.replace(".no_", ".") not in names
        if keep:
            kept.append(word)
    return kept


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GB"
