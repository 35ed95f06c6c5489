"""The file of a delta: tensors, and in the metadata what they are and on what they stand.

It is written aside and renamed, and every tensor has its checksum, so that a file is whole or said to be damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m3bsr.plan import Plan
from m3bsr.utils.checks import printable
from m3bsr.utils.disk import flush
from m3bsr.utils.foreign import one_line

FORMAT = "1"


class Fingerprint(NamedTuple):
    """What a tensor is, without its values."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """Over name, dtype, shape and bytes; empty where the values do not matter."""

    @classmethod
    def of(cls, name: str, tensor: Tensor, with_values: bool = True) -> Fingerprint:
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if not with_values or tensor.is_meta:
            return cls(dtype, shape, "")
        digest = hashlib.sha256(f"{name} {dtype} {list(shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return cls(dtype, shape, digest.hexdigest())


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta says about itself."""

    base_name: str
    base_hash: str
    """SHA-256 over names, dtypes, shapes and bytes of all tensors of the base that stayed as they were."""
    plan: Plan
    num_classes: int
    """Outputs of the model's own linear classifier, 0 without one."""
    tensors: Mapping[str, Fingerprint] = field(repr=False)
    """The tensors in the file."""
    base: Mapping[str, Fingerprint] = field(repr=False)
    """The tensors that the delta stands on."""
    settings: Mapping[str, Any] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors in the file."""
        return sum(getattr(torch, t.dtype).itemsize * torch.Size(t.shape).numel() for t in self.tensors.values())

    @property
    def base_title(self) -> str:
        """Name and short hash of the base, for messages."""
        return f"{self.base_name} (base hash {self.base_hash[:12]})"

    def __str__(self) -> str:
        return f"delta of {len(self.tensors)} tensors, {self.num_bytes:,} bytes, on {self.base_title}"


def write(path: Path, tensors: Mapping[str, Tensor], info: DeltaInfo) -> None:
    """Write the file under another name, flush it, and rename it to ``path``.

    Raises:
        OSError: a full disk or the like; what was at ``path`` is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        try:
            save_file(dict(_storable(tensors)), aside, _to_metadata(info))
        except SafetensorError as error:  # what a full disk is to safetensors
            raise OSError(f"could not write {aside}: {one_line(error)}") from None
        aside.chmod(mode)  # safetensors makes it readable by its owner alone
        for place in (aside, path.parent):
            flush(place)
        aside.replace(path)
        flush(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _storable(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Contiguous tensors with a memory of their own: what safetensors can write."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        yield name, tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)


def _to_metadata(info: DeltaInfo) -> dict[str, str]:
    return {
        "format": "pt",
        "m3bsr_delta": FORMAT,
        "base_name": info.base_name,
        "base_hash": info.base_hash,
        "plan": json.dumps(info.plan.to_dict()),
        "num_classes": str(info.num_classes),
        "settings": json.dumps(info.settings),
        "tensors": json.dumps(info.tensors),
        "base": json.dumps(info.base),
    }


def _from_metadata(data: Mapping[str, str]) -> DeltaInfo:
    tensors, base = (
        {name: Fingerprint(dtype, tuple(shape), sha256) for name, (dtype, shape, sha256) in json.loads(text).items()}
        for text in (data["tensors"], data["base"])
    )
    return DeltaInfo(
        base_name=data["base_name"],
        base_hash=data["base_hash"],
        plan=Plan.from_dict(json.loads(data["plan"])),
        num_classes=int(data["num_classes"]),
        tensors=tensors,
        base=base,
        settings=json.loads(data["settings"]),
    )


def read(path: Path, with_tensors: bool = True) -> tuple[DeltaInfo, dict[str, Tensor]]:
    """Metadata and tensors (views of the file), the tensors compared with their checksums.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no delta, or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such delta: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in sorted(names)} if with_tensors else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no delta: {one_line(error)}") from None
    version = metadata.get("m3bsr_delta")
    if version is None:
        raise ValueError(f"{path} is no delta: a safetensors file that save_delta did not write")
    if version != FORMAT:
        raise ValueError(f"{path} is a delta of format {version}; this version of m3bsr reads format {FORMAT}")
    try:
        info = _from_metadata(metadata)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be read ({one_line(error)})") from None
    wrong = sorted(names ^ set(info.tensors)) + [
        n for n, t in tensors.items() if Fingerprint.of(n, t) != info.tensors.get(n)
    ]
    if wrong:
        raise ValueError(f"{path} is damaged: {printable(wrong[0])} does not have its checksum")
    return info, tensors
