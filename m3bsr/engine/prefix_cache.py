"""Tokens behind the frozen prefix, kept on disk: the first epoch writes them, later ones read them and skip the prefix.

One safetensors file for each view of each sample, in a folder named by a hash of everything that the tokens depend on:
weights of the prefix, plan, data and transforms, image size, precision, batch size, device and library. With another
hash nothing is found, so nothing stale is ever read. A file is written aside and renamed; one that is damaged counts as
missing. A batch of which any file is missing is computed as a whole, so that products have the shapes, and bits, that
they have without a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3bsr.bsr import Prefix, TokenState, frozen_prefix, prefix_weights, state_tensors, with_tensors
from m3bsr.engine.precision import autocast
from m3bsr.engine.progress import say
from m3bsr.models import MultiTaskModel
from m3bsr.utils.log import get_logger

log = get_logger(__name__)
FORMAT = 1


class PrefixFiles:
    """The files of a folder, by index of the sample and seed of its augmentation; plain enough for worker processes.

    Args:
        shapes: name of each tensor of a sample, its shape and dtype.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.folder, self.shapes, self.full = folder, dict(shapes), False

    def path(self, index: int, seed: int) -> Path:
        return self.folder / f"{index:06d}-{seed:016x}.safetensors"

    def read(self, index: int, seed: int) -> dict[str, Tensor] | None:
        """The tensors of a sample; None where they are missing or damaged."""
        path = self.path(index, seed)
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s): computed again", path, error)
            return None
        if {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} != self.shapes:
            log.warning("%s holds other tensors than it should: computed again", path)
            return None
        return tensors

    def read_batch(self, indices: Sequence[int], seeds: Sequence[int]) -> dict[str, Tensor] | None:
        """The tensors of samples, stacked; None if any is missing."""
        samples = []
        for index, seed in zip(indices, seeds, strict=True):
            tensors = self.read(index, seed)
            if tensors is None:
                return None
            samples.append(tensors)
        return {name: torch.stack([tensors[name] for tensors in samples]) for name in self.shapes}

    def write_batch(self, tensors: Mapping[str, Tensor], indices: Sequence[int], seeds: Sequence[int]) -> None:
        """Write the samples of a batch. A full disk is a line, once; what does not fit is computed each time."""
        if self.full:
            return
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        for i, (index, seed) in enumerate(zip(indices, seeds, strict=True)):
            path = self.path(index, seed)
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_file({name: tensor[i].contiguous() for name, tensor in on_cpu.items()}, aside)
                aside.replace(path)
            except (OSError, SafetensorError) as error:
                aside.unlink(missing_ok=True)
                self.full = True
                say(f"warning: the cache in {self.folder} stays as it is, what is not there is computed: {error}")
                return


class PrefixCache:
    """Finds, or computes and keeps, the tokens of a batch behind the frozen prefix of a model.

    Args:
        root: folder for caches; several runs may share it.
        key: plain data that the tokens depend on beside the model: data set, transforms, batch size ...
        image_size: height and width of the pictures.
        num_files: samples times views.
    """

    def __init__(self, root: Path, key: Mapping[str, Any], image_size: tuple[int, int], num_files: int) -> None:
        self.root, self.key, self.image_size, self.num_files = root, dict(key), image_size, num_files
        self.files: PrefixFiles | None = None

    def open(self, model: MultiTaskModel, device: torch.device, precision: str) -> PrefixFiles:
        """Look at a model whose weights are the final ones, and say what will be kept and how large it gets.

        Raises:
            ValueError: nothing before the first trained block stays the same, or the folder cannot be made.
        """
        backbone = model.backbone
        self.model = model
        self.num_blocks, ends = frozen_prefix(backbone, backbone.plan)
        if model.first_read < self.num_blocks:  # a head wants the output of a block itself, not what lies behind it
            self.num_blocks, ends = model.first_read, f"a head reads block {model.first_read}"
        if self.num_blocks == 0:
            raise ValueError(f"bsr.cache_prefix: there is nothing to keep: {ends}")
        with autocast(device, precision):
            state = model.forward_prefix(torch.zeros(1, 3, *self.image_size, device=device), self.num_blocks).state
        self.template: TokenState = state.map(torch.Tensor.detach)
        tensors = state_tensors(self.template)
        shapes = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tensors.items()}
        self.files = PrefixFiles(self.root / self._hash(device, precision), shapes)
        try:
            self.files.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.cache_dir: cannot make {self.files.folder}: {error}") from None
        self._announce(sum(tensor.nbytes for tensor in tensors.values()), ends)
        return self.files

    def prefix(self, images: Tensor, batch: Mapping[str, Any]) -> Prefix:
        """The tokens of a training batch; call it under the autocast of the forward pass."""
        assert self.files is not None, "open comes first"
        if batch["prefix"] is not None:
            loaded = {name: t.to(images.device, non_blocking=True) for name, t in batch["prefix"].items()}
            return Prefix(with_tensors(self.template, loaded), self.num_blocks)
        found = self.model.forward_prefix(images, self.num_blocks)
        self.files.write_batch(state_tensors(found.state), batch["index"], batch["seed"])
        return found

    def _hash(self, device: torch.device, precision: str) -> str:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        key = {"format": FORMAT, "torch": torch.__version__, "device": where, "precision": precision, **self.key}
        key |= {"image_size": self.image_size, "blocks": self.num_blocks, "plan": _plan_key(self.model)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
        for name, tensor in prefix_weights(self.model.backbone, self.num_blocks).items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:24]

    def _announce(self, sample_bytes: int, ends: str) -> None:
        assert self.files is not None
        folder = self.files.folder
        there = sum(1 for _ in folder.glob("[0-9]*.safetensors"))
        needed, free = max(0, self.num_files - there) * sample_bytes, shutil.disk_usage(folder).free
        what = "block 0" if self.num_blocks == 1 else f"blocks 0 to {self.num_blocks - 1}"
        say(
            f"prefix cache: the embedding and {what} ({ends}); {sample_bytes / 2**20:.2f} MB a view, "
            f"{there} of {self.num_files} views in {folder}, {needed / 2**20:,.0f} MB to come, "
            f"{free / 2**20:,.0f} MB free"
        )
        if needed > free:
            say("warning: the disk will be full before the prefix cache is; what does not fit is computed each time")


def _plan_key(model: MultiTaskModel) -> dict[str, Any]:
    """The plan, without what only says how much is stored for the backward pass, or what evaluation does."""
    other = ("cache_prefix", "recompute", "activation_dtype", "prune_rate", "eval_keep_rate", "train_experts")
    return {name: value for name, value in model.backbone.plan.to_dict().items() if name not in other}


def described(value: Any) -> Any:
    """What transforms are made of, as plain data for a key: names of classes and functions, and all their settings."""
    if isinstance(value, dict):
        return {str(name): described(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    if isinstance(value, partial):
        return [described(value.func), described(value.args), described(value.keywords)]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__") and not isinstance(value, Enum):
        return [described(type(value)), described(vars(value))]
    return repr(value)
