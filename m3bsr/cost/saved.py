"""Bytes that autograd stores between forward and backward: the activations that training has to keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class SavedBytes:
    """Add up what a forward pass stores: `with SavedBytes(model, inputs) as saved: loss = ...; saved.bytes`.

    A storage counts once, however many views of it are saved, and in full: a saved view keeps its whole storage.
    Parameters and buffers of `model` and the tensors of `inputs` are there anyway and do not count. Tensors that a
    custom `autograd.Function` hangs on its `ctx` by hand (the index tables of a MoE dispatch) are not seen; they are
    some 16 bytes a token and choice. Under checkpointing the inputs of the recomputed part count, its inside does not.
    """

    def __init__(self, model: nn.Module | None = None, inputs: Iterable[Tensor] = ()) -> None:
        self._ignored = {_key(p) for p in (*model.parameters(), *model.buffers())} if model is not None else set()
        self._ignored |= {_key(x) for x in inputs}
        self._seen: dict[int, StorageWeakRef] = {}
        self.bytes = 0
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key in self._ignored:
            return tensor
        known = self._seen.get(key)
        if known is None or known.expired():  # an address may be used again after its storage was freed
            storage = tensor.untyped_storage()
            self._seen[key] = StorageWeakRef(storage)
            self.bytes += storage.nbytes()
        return tensor


def _key(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata
