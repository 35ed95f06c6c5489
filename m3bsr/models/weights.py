"""Start a whole model from the weights of another run: adapting to a new domain, or adding a task."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from m3bsr.models.multitask import MultiTaskModel

# Parts that a model may have and the run that it starts from not: they begin fresh.
MAY_BE_NEW = ("heads.", "refinement.", ".mlp.gates.", ".bsr_adapters.", ".lora_", ".ls2.adapter.")
# Parts without which the rest of a run's weights is not what was trained.
MAY_NOT_BE_LOST = (".lora_", ".ls2.adapter.")


def is_model_state(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of a whole :class:`MultiTaskModel`, not of a backbone."""
    return any(key.startswith("backbone.") for key in state)


def load_model_weights(model: MultiTaskModel, state: Mapping[str, Tensor], name: str) -> tuple[str, ...]:
    """Load the weights of another run into ``model``; heads and gates of tasks that it lacks stay fresh.

    Returns:
        The modules that stay fresh.

    Raises:
        ValueError: a shape that differs, or a part of the backbone that is missing (names the key).
    """
    own = model.state_dict()
    for key, tensor in state.items():
        if key in own and own[key].shape != tensor.shape:
            raise ValueError(
                f"model.weights: {name}: {key} has shape {tuple(tensor.shape)}, the model needs "
                f"{tuple(own[key].shape)}; use the model and data settings that these weights were trained with"
            )
    extra = [key for key in state if key not in own and any(part in key for part in MAY_NOT_BE_LOST)]
    if extra:
        raise ValueError(
            f"model.weights: {name} was trained with {extra[0]}, which this model lacks; "
            "use the model.method of that run"
        )
    missing = [key for key in own if key not in state]
    lost = [key for key in missing if not any(part in key for part in MAY_BE_NEW)]
    if lost:
        raise ValueError(f"model.weights: {name} lacks {lost[0]}" + (f" and {len(lost) - 1} more" if lost[1:] else ""))
    model.load_state_dict({key: state.get(key, value) for key, value in own.items()})
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in missing))
