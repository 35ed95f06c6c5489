"""Deltas: what a plan trained, in a file of its own, to be put on the untouched base again.

A delta file is safetensors. Its tensors are the parameters that trained (``requires_grad``, one tensor per expert) and
all buffers that a state dict would hold, such as BatchNorm statistics; its metadata say on what they stand: the name
of the base, the plan, and the SHA-256 of every tensor of the base that stayed as it was. So a delta finds out whether
a model is its base, and names the tensor that is not.

``load_delta`` leaves the model that it is given alone and returns a second one over the same memory, so any number of
deltas over one base live side by side, each for the price of its own tensors.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from m3bsr.bsr.reprogram import ReprogrammedMixin, recast
from m3bsr.delta.file import DeltaInfo, Fingerprint, read, write

# What decides about a forward pass and shows in no tensor's name or shape; compared wherever a module has it.
SETTINGS = ("num_heads", "global_pool", "pool", "tasks", "top_k", "gate_mode", "gate_input", "renormalize")

Model = TypeVar("Model", bound=nn.Module)


def save_delta(model: nn.Module, path: str | Path, *, base_name: str | None = None) -> DeltaInfo:
    """Write what was trained of ``model`` into a file; ``path`` is replaced only when all of it is on the disk.

    Args:
        model: from :func:`m3bsr.reprogram`, or a model that has one as its backbone (``MultiTaskModel``).
        path: ``*.safetensors``; its folder is made if need be.
        base_name: what the base is called in messages; by default timm's name of the model.

    Raises:
        ValueError: ``model`` has no plan.
        OSError: a full disk or the like; what was at ``path`` is as it was before.
    """
    model = _unwrapped(model)
    planned = _planned(model)
    if planned is None:
        raise ValueError(f"save_delta needs a model from reprogram(vit, plan), got {type(model).__name__} without one")
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {name: b.detach() for name, b in _buffers(model)}
    base = _fingerprints((name, p) for name, p in model.named_parameters() if name not in tensors)
    info = DeltaInfo(
        base_name=base_name or _name(planned),
        base_hash=_hash(base),
        plan=planned.plan,
        num_classes=_num_classes(planned),
        tensors=_fingerprints(tensors.items()),
        base=base,
        settings=_settings(model),
    )
    write(Path(path), tensors, info)
    return info


def read_delta(path: str | Path) -> DeltaInfo:
    """What the delta at ``path`` says about itself; its tensors are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or no delta.
    """
    return read(Path(path), with_tensors=False)[0]


@overload
def load_delta(vit: VisionTransformer, path: str | Path, *, strict: bool = True) -> ReprogrammedMixin: ...
@overload
def load_delta(vit: Model, path: str | Path, *, strict: bool = True) -> Model: ...
def load_delta(vit: nn.Module, path: str | Path, *, strict: bool = True) -> nn.Module:
    """The model that a delta was saved from, on its base ``vit``, which stays as it is.

    The new model has modules of its own. Its frozen parameters lie in the memory of ``vit``'s (move or train ``vit``
    before or not at all), the trained ones and the buffers in its own. ``vit``'s own classifier does not matter: it is
    replaced by the delta's, whatever its number of classes.

    Args:
        vit: the base: a timm ``VisionTransformer``, or a model built like the one that was saved (``MultiTaskModel``).
        path: a file that :func:`save_delta` wrote.
        strict: compare the values of the base. With ``False`` names and shapes must fit, values and dtypes may differ
            (a base in bfloat16, say), and ``vit`` is not read through.

    Returns:
        A reprogrammed model with the delta's plan, or one like ``vit`` with that plan; ``requires_grad`` as when saved,
        device and training mode as in ``vit``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or no delta; another base (names it, both hashes, and the first tensor that differs).
    """
    path = Path(path)
    info, tensors = read(path)
    model = _shared_copy(_unwrapped(vit))
    planned = _planned(model)
    if planned is None:
        model = planned = recast(model, ReprogrammedMixin)  # type: ignore[arg-type]
    if hasattr(planned, "bsr_adapters"):  # of an earlier plan
        del planned.bsr_adapters
    device = next(model.parameters()).device
    if _num_classes(planned) != info.num_classes and (info.num_classes == 0 or "head.weight" in info.tensors):
        _reset_classifier(planned, info)
    try:
        planned.set_plan(info.plan)
    except ValueError as error:
        raise ValueError(f"{path} stands on another base, {info.base_title}: {error}") from None
    _check(path, info, model, strict)
    _put(model, tensors, device, strict)
    return model


def _shared_copy(model: Model) -> Model:
    """Modules and buffers copied, parameters new but over the same memory (so that each has its own requires_grad)."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without what torch.compile and data parallelism put around it."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)


def _planned(model: nn.Module) -> ReprogrammedMixin | None:
    return next((module for module in model.modules() if isinstance(module, ReprogrammedMixin)), None)


def _name(vit: nn.Module) -> str:
    config = getattr(vit, "pretrained_cfg", None)
    return (config or {}).get("architecture") or type(vit).__name__


def _num_classes(vit: nn.Module) -> int:
    head = getattr(vit, "head", None)
    return head.out_features if isinstance(head, nn.Linear) else 0


def _reset_classifier(vit: ReprogrammedMixin, info: DeltaInfo) -> None:
    """timm's ``reset_classifier`` without values (and random numbers): they come from the delta."""
    like = next(vit.parameters())
    for name in ("head", "head_dist"):
        if isinstance(getattr(vit, name, None), nn.Module):
            sizes = (vit.embed_dim, info.num_classes, f"{name}.bias" in info.tensors)
            setattr(vit, name, nn.Linear(*sizes, "meta", like.dtype) if info.num_classes else nn.Identity())
    vit.num_classes = info.num_classes


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state dict holds. All of them go into a delta: statistics change without a gradient."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def _settings(model: nn.Module) -> dict[str, Any]:
    found = ((f"{path}.{name}", getattr(m, name, None)) for path, m in model.named_modules() for name in SETTINGS)
    return {
        path.lstrip("."): list(value) if isinstance(value, tuple) else value
        for path, value in found
        if isinstance(value, str | int) or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))
    }


def _fingerprints(named: Iterable[tuple[str, Tensor]], with_values: bool = True) -> dict[str, Fingerprint]:
    return {name: Fingerprint.of(name, tensor, with_values) for name, tensor in named}


def _hash(base: Mapping[str, Fingerprint]) -> str:
    """Of each tensor's hash, in the order of the names, so that it does not matter how the model was put together."""
    return hashlib.sha256("".join(f"{name} {base[name].sha256}\n" for name in sorted(base)).encode()).hexdigest()


def _check(path: Path, info: DeltaInfo, model: nn.Module, strict: bool) -> None:
    """The delta must bring all that it should, and every other tensor must be as it was in training."""
    tensors = dict(model.named_parameters()) | dict(_buffers(model))
    own = _fingerprints(((n, t) for n, t in tensors.items() if n not in info.tensors), strict)
    own |= _fingerprints(((n, t) for n, t in tensors.items() if n in info.tensors), False)
    then, settings = {**info.base, **info.tensors}, _settings(model)
    both = [(name, then[name], own[name]) for name in then if name in own]
    alike = [(name, a, b) for name, a, b in both if a.shape == b.shape and name in info.base]
    problems = [f"{name} is not in this model" for name in then if name not in own]
    problems += [f"{name} is unknown to the delta" for name in own if name not in then]
    problems += [
        f"{name} is {list(a.shape)} there and {list(b.shape)} here" for name, a, b in both if a.shape != b.shape
    ]
    problems += [
        f"{name} is {value!r} there and {settings[name]!r} here"
        for name, value in info.settings.items()
        if settings.get(name, value) != value
    ]
    if strict:
        problems += [f"{name} is {a.dtype} there and {b.dtype} here" for name, a, b in alike if a.dtype != b.dtype]
        problems += [f"{n} has other values" for n, a, b in alike if a.dtype == b.dtype and a.sha256 != b.sha256]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if problems[1:] else ""
        here = {name: own[name] for name in own if name not in info.tensors}
        raise ValueError(
            f"{path} stands on another base, {info.base_title}"
            + (f", this model's base hash is {_hash(here)[:12]}" if strict else "")
            + f": {problems[0]}{more}; build the model and load the weights that the delta was trained from"
        )


def _put(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device, strict: bool) -> None:
    """Give ``model`` the delta's tensors as new parameters and buffers; nothing is written into."""
    parameters, buffers = dict(model.named_parameters()), dict(_buffers(model))
    own: dict[str, Tensor] = {**parameters, **buffers}

    def ready(name: str) -> Tensor:  # copied: what was read is a view of the file
        old = own[name]
        return tensors[name].to(device if old.is_meta else old.device, None if strict else old.dtype, copy=True)

    new: dict[int, nn.Parameter] = {}
    for name, parameter in parameters.items():
        parameter.requires_grad_(False)
        new[id(parameter)] = nn.Parameter(ready(name)) if name in tensors else parameter
    for module in model.modules():  # by identity, so that tied parameters stay tied
        module._parameters.update({n: new[id(p)] for n, p in module._parameters.items() if p is not None})
    for name in buffers:
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = ready(name)
