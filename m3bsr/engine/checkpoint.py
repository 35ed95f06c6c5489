"""Checkpoints that survive a crash while they are written, and that say so when they are damaged.

A checkpoint is a folder:

    model.safetensors   every parameter and buffer, the frozen ones too: it stands alone
    state.pt            optimizer, scheduler, loss scaler, random generators, progress; loads with weights_only=True.
                        With a moving average of the weights (which is then the model) also the weights themselves
    shards/             instead of model.safetensors where the model is spread over processes: parameters, buffers and
                        optimizer state, a file a process (see ``engine.shards``)
    config.json         the run's config, from which the model is rebuilt
    manifest.json       step, and the SHA-256 of each file above; written last

It is written under a temporary name, flushed to the disk and renamed. ``last`` that was there before is kept as
``previous``, so at any moment at least one whole checkpoint lies in the folder. Kept are ``last``, ``previous``
and ``best``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3bsr.engine import distributed
from m3bsr.engine.ema import Ema
from m3bsr.engine.rng import derive_seed, get_rng_state, seed_everything, set_rng_state
from m3bsr.engine.shards import is_sharded, load_whole, read_shards, spread, write_shards
from m3bsr.utils.disk import flush
from m3bsr.utils.foreign import load_tensors, one_line, read_json

FORMAT, SHARDS = "m3bsr checkpoint 1", "shards"
MODEL, STATE, CONFIG, MANIFEST = "model.safetensors", "state.pt", "config.json", "manifest.json"


# Names of torch.save's writer in its errors.
STREAM_WRITER = ("PytorchStreamWriter", "inline_container")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or made for another model."""


def save_checkpoint(
    folder: str | Path,
    *,
    model: Any,
    config: Mapping[str, Any],
    progress: Mapping[str, Any],
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    ema: Ema | None = None,
    rng: Sequence[Mapping[str, Any]] = (),
    keep_previous: bool = False,
) -> None:
    """Write all that an exact resume needs into ``folder``, which is replaced only when everything is on the disk.

    Called by all processes; the first writes, and of a model that is spread out (``engine.shards``) each its part.

    Args:
        model, optimizer, ...: anything with a ``state_dict()``.
        progress: plain data with the number of steps done under ``"step"``.
        ema: applied to ``model`` now, so that the averaged weights are what the folder gives to others.
        rng: random generators of every process by its number; by default those of this one.
        keep_previous: rename a checkpoint that was in ``folder`` to ``previous`` beside it, instead of removing it.

    Raises:
        OSError: a full disk or the like; ``folder`` is as it was before.
    """
    folder = Path(folder)
    aside, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    spread_out = is_sharded(model)
    if not spread_out and not distributed.is_main():
        return
    try:
        if spread_out:
            sums = _save_shards(aside / SHARDS, model, optimizer)
            if not distributed.is_main():
                return
        else:
            _remove(aside)
            aside.mkdir(parents=True)
            with _only_os_errors(aside / MODEL):
                save_file(_storable(model.state_dict()), aside / MODEL)
        optimizer_state = optimizer.state_dict() if optimizer is not None else None
        state = {
            "optimizer": {**optimizer_state, "state": {}} if spread_out and optimizer_state else optimizer_state,
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema": ema.state_dict() if ema is not None else None,
            "rng": rng[0] if rng else get_rng_state(),
            **({"rng_of_others": list(rng[1:])} if rng[1:] else {}),
            "progress": dict(progress),
        }
        with _only_os_errors(aside / STATE):
            torch.save(state, aside / STATE)
        (aside / CONFIG).write_text(json.dumps(config, indent=2))
        if not spread_out:
            (aside / MODEL).chmod((aside / CONFIG).stat().st_mode)  # safetensors makes it readable by its owner alone
            sums = {MODEL: _sha256(aside / MODEL)}
        sums |= {name: _sha256(aside / name) for name in (STATE, CONFIG)}
        manifest = {"format": FORMAT, "step": progress["step"], "sha256": sums}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in (*aside.rglob("*"), aside):
            flush(path)
    except BaseException:
        _remove(aside)
        raise
    # A full folder cannot be replaced in one step. Between the two renames the checkpoints are `old` and `aside`,
    # both whole: newest_checkpoint looks at every folder, and tidy gives them their names.
    if keep_previous:
        old = folder.with_name("previous")
    if folder.exists():
        _remove(old)
        folder.rename(old)
    aside.rename(folder)
    flush(folder.parent)
    if not keep_previous:
        _remove(old)


def _save_shards(folder: Path, model: nn.Module, optimizer: Any) -> dict[str, str]:
    """Every process writes its part; checksums of all files by their path in the checkpoint."""
    with distributed.together():
        if distributed.is_main():
            _remove(folder.parent)
            folder.mkdir(parents=True)
    write_shards(folder, model, optimizer)
    own = sorted(folder.iterdir())[distributed.rank() :: distributed.num_processes()]
    sums = distributed.gather({f"{SHARDS}/{path.name}": _sha256(path) for path in own})
    return {name: value for part in sums for name, value in part.items()}


def verify_checkpoint(folder: str | Path) -> int:
    """The step of a checkpoint whose files are all there and as they were written.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: a file is missing or differs from its checksum.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint {folder}")
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {folder} has format {manifest['format']!r}, expected {FORMAT!r}")
        step, sums = int(manifest["step"]), dict(manifest["sha256"])
        weights = [name for name in sums if name == MODEL or re.fullmatch(rf"{SHARDS}/[\w.-]+", name)]
        if not weights or sums.keys() != {STATE, CONFIG, *weights}:
            raise KeyError(f"sha256 of {', '.join(sums)}")
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder} is incomplete: {MANIFEST} is missing") from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error})") from None
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} is incomplete: {name} is missing")
        if _sha256(folder / name) != expected:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} does not have its checksum")
    return step


def newest_checkpoint(checkpoints: str | Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint among all folders in ``checkpoints``, and a line for each damaged one.

    ``last`` wins among equals. Leftovers of a crash while writing (hidden names) count when they are whole, and are no
    news when they are not. None if there is none at all.
    """
    found: list[tuple[int, bool, Path]] = []
    complaints = []
    checkpoints = Path(checkpoints)
    for folder in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        if not folder.is_dir():
            continue
        try:
            found.append((verify_checkpoint(folder), folder.name == "last", folder))
        except CheckpointError as error:
            if not folder.name.startswith("."):
                complaints.append(str(error))
    return (max(found)[2] if found else None), complaints


def tidy(checkpoints: str | Path) -> None:
    """Clear away what a crash left while a checkpoint was written; finish the rename if only that was missing."""
    checkpoints = Path(checkpoints)
    for suffix in ("writing", "old"):
        for folder in checkpoints.glob(f".*.{suffix}"):
            final = checkpoints / folder.name.split(".")[1]
            if not final.exists() and _is_whole(folder):
                folder.rename(final)
            else:
                _remove(folder)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a verified checkpoint; every key must be there with its shape.

    Raises:
        FileNotFoundError, CheckpointError: see :func:`verify_checkpoint`; or the checkpoint is of another model.
    """
    folder = Path(folder)
    verify_checkpoint(folder)
    if (folder / SHARDS).is_dir():
        _read_shards(folder, model)
        return
    try:
        saved = load_file(folder / MODEL)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {folder}: {MODEL} cannot be read ({error})") from None
    if is_sharded(model):
        load_whole(model, saved)
        return
    own = model.state_dict()
    problems = [
        f"{key} is {list(saved[key].shape)} there and {list(own[key].shape)} in the model"
        for key in own
        if key in saved and saved[key].shape != own[key].shape
    ]
    problems += [f"{key} is missing there" for key in own if key not in saved]
    problems += [f"{key} is not in the model" for key in saved if key not in own]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"checkpoint {folder} is of another model: {problems[0]}{more}; "
            f"use the settings in its {CONFIG}, or another run.dir"
        )
    model.load_state_dict(saved)


def _read_shards(folder: Path, model: nn.Module, optimizer: Any = None) -> None:
    try:
        read_shards(folder / SHARDS, model, optimizer)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {error}; use the settings in its {CONFIG}, or another run.dir") from None


def load_state(folder: str | Path) -> dict[str, Any]:
    """What else a checkpoint holds: ``optimizer, scheduler, scaler, rng, progress``. No code in it is run.

    Raises:
        CheckpointError: the file cannot be read, or something is missing in it.
    """
    try:
        state = load_tensors(Path(folder) / STATE)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {folder}: {STATE} cannot be read ({one_line(error)})") from None
    missing = [key for key in ("optimizer", "scheduler", "scaler", "rng", "progress") if key not in dict_of(state)]
    if missing or "step" not in dict_of(state["progress"]):
        raise CheckpointError(f"checkpoint {folder}: {STATE} has no {missing[0] if missing else 'step in progress'}")
    return state


def resume(
    folder: str | Path,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    scaler: Any,
    *,
    total_steps: int,
    ema: Ema | None = None,
) -> dict[str, Any]:
    """Put everything back as it was when ``folder`` was saved and return the progress.

    The schedule is put back only for a run of the same length; otherwise the new one goes on at the old step.

    Raises:
        CheckpointError: damaged, or other parameters trained then.
    """
    load_weights(model, folder)
    state = load_state(folder)
    if state["optimizer"] is None:
        raise CheckpointError(
            f"checkpoint {folder} holds a model and no training to go on with; "
            f"start another run from it with model.weights {Path(folder) / MODEL}"
        )
    groups = dict_of(state["optimizer"]).get("param_groups")
    then = [dict_of(group).get("param_names") for group in groups] if isinstance(groups, list) else None
    now = [group.get("param_names") for group in optimizer.state_dict()["param_groups"]]
    if then != now:
        raise CheckpointError(
            f"checkpoint {folder}: other parameters trained then than now; "
            "resume with the bsr and optim settings of its config.json"
        )
    averaged = state.get("ema")
    if (averaged is None) != (ema is None):
        raise CheckpointError(
            f"checkpoint {folder} was trained with{'out' if averaged is None else ''} a moving average of its weights; "
            "resume with the train.ema_decay of its config.json"
        )
    try:
        if ema is not None:
            ema.load_state_dict(dict_of(averaged))
        optimizer.load_state_dict(state["optimizer"])
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    slots[slot] = spread(value, parameter)
        if state["progress"]["total_steps"] == total_steps:
            scheduler.load_state_dict(state["scheduler"])
        scheduler.step_update(state["progress"]["step"])
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        _set_rng(state, state["progress"]["step"])
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        # whole by its checksum, and yet not what this version writes
        raise CheckpointError(f"checkpoint {folder}: {STATE} does not fit this run ({one_line(error)})") from None
    if (Path(folder) / SHARDS).is_dir():
        _read_shards(Path(folder), model, optimizer)
    return dict_of(state["progress"])


@contextmanager
def _only_os_errors(path: Path) -> Iterator[None]:
    """A full disk is a SafetensorError to safetensors and a RuntimeError to torch.save."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in STREAM_WRITER):
            raise
        raise OSError(f"could not write {path}: {one_line(error)}") from None


def dict_of(value: Any) -> dict[str, Any]:
    """``value`` if it is a dict, else an empty one: of content that nobody vouches for."""
    return value if isinstance(value, dict) else {}


def _set_rng(state: Mapping[str, Any], step: int) -> None:
    """Put back the generators of this process. With another number of processes than then only the first has some;
    the others draw from (step, number) on."""
    then = [state["rng"], *state.get("rng_of_others", [])]
    if len(then) == distributed.num_processes():
        set_rng_state(then[distributed.place()["rank"]])
    elif distributed.is_main():
        set_rng_state(then[0])
    else:
        seed_everything(derive_seed(step, distributed.rank()))


def _is_whole(folder: Path) -> bool:
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, no two of which share memory: what safetensors can write."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
