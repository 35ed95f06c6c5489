"""From the tokens of a ViT to one class per image: what timm does behind the last block."""

from __future__ import annotations

import copy

import torch
from timm.layers import global_pool_nlc
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# Parts of a timm ViT behind its last block that belong to the classifier and come with its weights.
FINAL_PARTS = ("norm", "attn_pool", "fc_norm")


class ClassifierHead(nn.Module):
    """Final norm, pooling and a linear layer: ``forward(x_BND) -> logits [B, num_classes]``.

    Norms and pooling (class token, mean, attention) are copies of those of ``vit``; a model with a distillation token
    classifies by the mean of both tokens. The linear layer starts at small random weights.

    Args:
        vit: a timm model that still has its final layers; without a final norm the head gets a fresh one.
    """

    def __init__(self, vit: VisionTransformer, num_classes: int) -> None:
        super().__init__()
        self.norm = copy.deepcopy(vit.norm)
        self.attn_pool = copy.deepcopy(getattr(vit, "attn_pool", None))
        self.fc_norm = copy.deepcopy(vit.fc_norm)
        if isinstance(self.norm, nn.Identity) and isinstance(self.fc_norm, nn.Identity):
            self.norm = nn.LayerNorm(vit.embed_dim, eps=1e-6)
        self.pool, self.num_prefix = vit.global_pool, vit.num_prefix_tokens
        self.pools_prefix = vit.pool_include_prefix
        self.num_class_tokens = 2 if hasattr(vit, "head_dist") else 1
        self.logits = nn.Linear(vit.embed_dim, num_classes)
        nn.init.trunc_normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of the tokens that are left behind the last block, prefix tokens first."""
        x_BND = self.norm(x_BND)
        if self.attn_pool is not None:
            x_BD = self.attn_pool(x_BND if self.pools_prefix else x_BND[:, self.num_prefix :])
        elif self.pool == "token":
            x_BD = x_BND[:, : self.num_class_tokens].mean(1)
        else:
            x_BD = global_pool_nlc(
                x_BND,
                pool_type=self.pool,
                num_prefix_tokens=self.num_prefix,
                reduce_include_prefix=self.pools_prefix,
            )
        return self.logits(self.fc_norm(x_BD))

    def load_final(self, state: dict[str, Tensor]) -> None:
        """Take the final norm and pooling from a ViT's state dict; what is not in it stays as it is."""
        own = self.state_dict()
        fits = {k: v for k, v in state.items() if k in own and k.startswith(FINAL_PARTS) and v.shape == own[k].shape}
        with torch.no_grad():
            self.load_state_dict({**own, **fits})
