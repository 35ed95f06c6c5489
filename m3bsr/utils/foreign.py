"""Files from elsewhere: what they claim to hold is looked at before any memory is given to it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# So many times larger may a file grow when it is unpacked: weights and pictures hardly shrink, zeros by 1000.
MAX_RATIO = 100
# Below so many bytes growth does no harm.
SMALL = 1 << 24


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its name if it has none."""
    return " ".join((str(error).strip() or type(error).__name__).split("\n")[0].split())


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, or nested too deeply; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"missing file: {path}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no JSON file: {one_line(error)}") from None


def read_object(path: Path) -> dict[str, Any]:
    """:func:`read_json` of a file that holds an object.

    Raises:
        FileNotFoundError, ValueError: see there; or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def check_growth(packed: int, unpacked: int, what: str) -> None:
    """Refuse what would grow beyond all measure when it is unpacked.

    Raises:
        ValueError: more than ``MAX_RATIO`` times as large.
    """
    if unpacked > max(SMALL, MAX_RATIO * packed):
        raise ValueError(
            f"{what} would grow from {packed:,} to {unpacked:,} bytes, more than {MAX_RATIO} times: not unpacked"
        )


def check_zip(path: Path) -> None:
    """:func:`check_growth` of a zip file, by its directory; what is no zip file passes.

    Python and PyTorch read no more of a member than its directory says.

    Raises:
        ValueError: a bomb, or a damaged directory.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # a damaged directory fails in many ways
        raise ValueError(f"{path} is a damaged zip file: {one_line(error)}") from None
    check_growth(path.stat().st_size, unpacked, str(path))


def check_npz(path: Path) -> None:
    """That every array of an ``.npz`` file is plain, and no larger than its own bytes.

    Raises:
        ValueError: a bomb, objects (pickles), or no such file.
    """
    check_zip(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    major, _ = np.lib.format.read_magic(file)  # type: ignore[arg-type]
                    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(file)  # type: ignore[arg-type]
                if dtype.hasobject:
                    raise ValueError(f"{member.filename} holds Python objects, which are never unpickled")
                if int(np.prod(shape, dtype=object)) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{member.filename} claims shape {shape}, more than its {member.file_size} bytes")
    except Exception as error:  # no zip file, no array, a damaged header
        raise ValueError(f"cannot read {path} as .npz: {one_line(error)}") from None


def load_tensors(path: Path) -> Any:
    """``torch.load(weights_only=True)`` on the CPU, of a file that is no bomb; no code in it is run.

    Raises:
        ValueError: damaged, code, or tensors that claim more than the file holds.
    """
    check_zip(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle fails in many ways
        raise ValueError(f"cannot read {path} safely: {one_line(error)}") from None
    _check_tensors(loaded, path, "")
    return loaded


def _check_tensors(value: Any, path: Path, name: str, depth: int = 0) -> None:
    """A view can claim any size over a storage of one number: copied, it would fill the memory."""
    if depth > 20:
        raise ValueError(f"{path} is nested too deeply")
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: tensor {name} of shape {tuple(value.shape)} is more than what the file holds")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_tensors(item, path, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_tensors(item, path, f"{name}.{number}", depth + 1)
