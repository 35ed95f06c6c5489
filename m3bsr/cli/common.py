"""What all commands share: errors in one line, runs opened again, tables."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from m3bsr.build import build_model
from m3bsr.config import Config, replace
from m3bsr.engine.checkpoint import CheckpointError, load_weights, newest_checkpoint
from m3bsr.engine.distributed import LostProcessError, is_told, who
from m3bsr.engine.finite import NonFiniteError
from m3bsr.models import MultiTaskModel
from m3bsr.utils.foreign import one_line, read_json
from m3bsr.utils.log import show_log
from m3bsr.utils.memory import is_out_of_memory

USER_ERROR, BAD_NUMBERS, OUT_OF_MEMORY, LOST_PROCESS, INTERRUPTED = 2, 3, 4, 5, 130


def one_line_errors(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Turn what a user can mend into a line on stderr and an exit code: 2, 3 for NaN and infinity, 4 out of memory, 5
    for a process that was lost.

    With ``M3BSR_DEBUG=1`` in the environment the traceback is shown. Of several processes that fail alike one speaks.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        show_log()
        if os.environ.get("M3BSR_DEBUG") == "1":
            return main(argv)
        try:
            return main(argv)
        except (ValueError, OSError, NonFiniteError) as error:
            if not is_told(error):
                print(f"{who()}error: {_one_line(str(error))}", file=sys.stderr, flush=True)
            return BAD_NUMBERS if isinstance(error, NonFiniteError) else USER_ERROR
        except LostProcessError as error:
            print(
                f"{who()}error: {error}; go on from the last checkpoint with --run.resume", file=sys.stderr, flush=True
            )
            return LOST_PROCESS
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            hint = "lower the batch size, or see tools/plan.py for plans that fit"
            print(f"error: out of memory: {one_line(error)}; {hint}", file=sys.stderr)
            return OUT_OF_MEMORY
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED

    return wrapped


def _one_line(message: str) -> str:
    """A message without line breaks; of an error in a loader's worker, which comes with its traceback, the end."""
    if message.startswith("Caught "):
        message = re.sub(r"^[\w.]*Error: ", "", message.strip().splitlines()[-1])
    return " ".join(message.split())


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. ValueError for CUDA where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("run.device: cuda was asked for, but PyTorch sees no CUDA device")
    return torch.device(name)


def find_checkpoint(run: str | Path, which: str = "last") -> Path:
    """The checkpoint folder of a run folder, or ``run`` itself if it is one.

    A damaged or missing ``last`` gives way to the newest whole one, with a line that says so.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        CheckpointError: no whole one.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"no such run folder: {run}")
    if (run / "manifest.json").is_file():
        return run
    checkpoints = run / "checkpoints"
    if which != "last":
        if not (checkpoints / which).is_dir():
            raise FileNotFoundError(f"{run} has no checkpoint {which!r}")
        return checkpoints / which
    newest, complaints = newest_checkpoint(checkpoints)
    if newest is None:
        if complaints:
            raise CheckpointError("; ".join(complaints))
        raise FileNotFoundError(f"{run} holds no checkpoint: is it a run folder, and has it trained?")
    for complaint in complaints:
        print(f"warning: {complaint}; using {newest}", file=sys.stderr)
    return newest


def read_config(checkpoint: Path) -> Config:
    """The config that a checkpoint carries.

    Raises:
        FileNotFoundError, ValueError: missing or not understood.
    """
    path = checkpoint / "config.json"
    try:
        return Config.from_dict(read_json(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{checkpoint} is incomplete: config.json is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def open_run(
    run: str | Path, which: str = "last", changes: Mapping[str, Any] | None = None
) -> tuple[Config, MultiTaskModel, Path]:
    """Config and trained model of a run, from its checkpoint alone: base weights are not needed.

    ``changes`` are dotted config fields to set otherwise before the model is built (``bsr.eval_keep_rate``).

    Raises:
        FileNotFoundError, ValueError: see :func:`find_checkpoint` and ``engine.checkpoint.load_weights``.
    """
    checkpoint = find_checkpoint(run, which)
    config = read_config(checkpoint)
    config = replace(config, changes or {})
    model = build_model(replace(config, {"model.weights": ""}))
    load_weights(model, checkpoint)
    return config, model, checkpoint


def take_number(arguments: list[str], option: str, default: int) -> int:
    """Take a positive number behind an option of the command's own out of the arguments; ValueError for another."""
    if option not in arguments:
        return default
    position = arguments.index(option)
    value = arguments[position + 1] if position + 1 < len(arguments) else ""
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{option} needs a positive number, got {value!r}")
    del arguments[position : position + 2]
    return int(value)


def metrics_table(metrics: Mapping[str, Mapping[str, float]], protocol: str) -> str:
    """Metrics as text, a task a line, each with the protocol that it was scored by."""
    width = max(map(len, metrics), default=0)
    lines = []
    for task, values in metrics.items():
        scores = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        lines.append(f"{task:<{width}}  [{protocol}]  {scores}")
    return "\n".join(lines)


def write_json(path: Path, data: object) -> None:
    """Write ``data`` so that a crash leaves the old file or the new one."""
    aside = path.with_name(path.name + ".writing")
    aside.write_text(json.dumps(data, indent=2) + "\n")
    aside.replace(path)
