"""A moving average of the weights that train, which scores better than the last ones and is what is kept of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Exponential moving average of the parameters that train and of floating-point buffers; what is frozen needs none.

    The decay of update ``n`` (from 0) is ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow's
    ``ExponentialMovingAverage``: a short run is not averaged with its start.

    Args:
        model: on its device already; its tensors are read where they are.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        saved = model.state_dict()
        buffers = {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}
        # Not out of state_dict, whose experts are stacked copies of what trains.
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.raw: dict[str, Tensor] = {name: tensor.detach() for name, tensor in {**trained, **buffers}.items()}
        self.average = {name: tensor.clone() for name, tensor in self.raw.items()}
        self._aside: dict[str, Tensor] = {}

    def update(self) -> None:
        """Move the average towards the weights, after a step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(self.raw.values()), self.num_updates)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, to the bit."""
        self._aside = {name: tensor.clone() for name, tensor in self.raw.items()}
        try:
            _copy(self.average, self.raw)
            yield
        finally:
            _copy(self._aside, self.raw)
            self._aside = {}

    def keep(self) -> None:
        """Give the model the averaged weights for good."""
        _copy(self.average, self.raw)

    def state_dict(self) -> dict[str, Any]:
        """The model's own weights and the number of updates: the average lies in the model's file, saved while it is
        :meth:`applied`."""
        return {"num_updates": self.num_updates, "raw": dict(self._aside or self.raw)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the model's present weights as the average, and put its own back.

        Raises:
            KeyError: other weights trained then.
        """
        raw = {name: state["raw"][name] for name in self.raw}
        _copy(self.raw, self.average)
        _copy(raw, self.raw)
        self.num_updates = state["num_updates"]


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
