"""LoRA: low-rank updates of the attention's Linears (Hu et al., ICLR 2022), through Hugging Face's peft.

``qkv`` and ``proj`` of every block get ``W + 2 B A`` of rank 8 (``lora:RANK`` for another), ``B`` zero at the start.
MLPs and experts stay as they are, so dense and MoE blocks are adapted alike. In a state dict the frozen weight keeps
its name, ``blocks.3.attn.qkv.weight``; beside it stand ``.lora_A.weight`` and ``.lora_B.weight``.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from m3bsr.methods.base import FROZEN, Method, positive, short_names
from m3bsr.models import MultiTaskModel

RANK, SCALE = 8, 2
LAYERS = ("attn.qkv", "attn.proj")


def _change(model: MultiTaskModel, value: str) -> None:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"model.method lora needs peft: pip install 'm3bsr[lora]' ({error})") from None
    blocks: Any = model.backbone.blocks
    paths = [f"{i}.{path}" for i in range(len(blocks)) for path in LAYERS if _is_linear(blocks[i], path)]
    if not paths:
        raise ValueError(f"model.method lora: no block of this backbone has {' or '.join(LAYERS)}")
    rank = positive(value, RANK)
    heads_train = [p.requires_grad for p in model.heads.parameters()]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=paths), blocks)
    assert heads_train == [p.requires_grad for p in model.heads.parameters()]
    for path in paths:
        short_names(blocks.get_submodule(path), _short)


def _is_linear(block: nn.Module, path: str) -> bool:
    outer, _, inner = path.partition(".")
    return isinstance(getattr(getattr(block, outer, None), inner, None), nn.Linear)


def _short(name: str) -> str:
    return re.sub(r"^(lora_[AB])\.default\.", r"\1.", name.removeprefix("base_layer."))


LORA = Method(
    "low-rank updates of qkv and proj in every block, and the heads",
    lambda plan, depth, value: FROZEN,
    _change,
    value="a rank",
    check_value=lambda value: positive(value, RANK),
    lr_scale=5.0,
)
