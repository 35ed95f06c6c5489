"""Pictures of where tokens go: kept patches, patches within fused or merged tokens, patches that are lost.

Shapes: a grid of h x w patches, P = h * w; F fused tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize

from m3bsr.bsr import DropStage, token_sources
from m3bsr.report.panels import grid_lines, patch_pixels

# Colour of a fused patch from weightless to heaviest: one hue that photographs seldom have.
COLOURS = ("#101014", "#5c0f52", "#c01387", "#ff4fb4")
DPI = 110
FORMATS = (".png", ".jpg", ".pdf", ".svg")


@dataclass(frozen=True)
class TokensLeft:
    """What one drop left of one photograph."""

    block: int
    num_tokens: int
    """Prefix and fused tokens included."""
    kept_P: np.ndarray
    """True for patches that are still tokens of their own."""
    fused_FP: np.ndarray
    """Share of every patch in every fused token; rows sum to 1, no patch is in two."""
    merged_P: np.ndarray
    """Share of every patch in the kept one that it was merged into, as part of the largest there; 0 for others."""

    @property
    def num_kept(self) -> int:
        return int(self.kept_P.sum())

    @property
    def num_fused(self) -> int:
        """Fused tokens."""
        return len(self.fused_FP)

    @property
    def num_lost(self) -> int:
        """Patches that are neither kept nor in a fused or merged token."""
        return len(self.kept_P) - self.num_kept - self.num_merged - int((self.fused_FP > 0).any(axis=0).sum())

    @property
    def num_merged(self) -> int:
        """Patches that went into a kept one."""
        return int((self.merged_P > 0).sum())

    @property
    def caption(self) -> str:
        fused = f" + {self.num_fused} fused" if self.num_fused else ""
        merged = f", {self.num_merged} merged into them" if self.num_merged else ""
        return f"block {self.block}: {self.num_kept} of {len(self.kept_P)} patches{fused}{merged}"


@dataclass(frozen=True)
class TokenRow:
    """A photograph as the network saw it (uint8 `[H, W, 3]`) and what each drop left of it."""

    name: str
    photo: np.ndarray
    grid: tuple[int, int]
    steps: tuple[TokensLeft, ...]


def tokens_left(stages: Sequence[DropStage], index: int) -> tuple[TokensLeft, ...]:
    """What each drop left of image number `index` of the batch, from the stages of a forward pass."""
    steps = []
    one = [stage.map(lambda t: t[index : index + 1].cpu()) for stage in stages]
    for i, stage in enumerate(one):
        sources_NP = token_sources(one[: i + 1], one[0].patch_BM.shape[1])[0]
        patch_N = stage.patch_after_BN[0]
        is_fused_N = patch_N < 0
        fused_FP = sources_NP[is_fused_N]
        fused_FP = fused_FP / fused_FP.sum(1, keepdim=True).clamp_min(1e-12)
        own_NP = sources_NP[~is_fused_N]
        kept_P = torch.zeros(sources_NP.shape[1], dtype=torch.bool)
        kept_P[patch_N[~is_fused_N]] = True
        others_NP = own_NP.masked_fill(kept_P, 0)
        merged_P = (others_NP / others_NP.amax(1, keepdim=True).clamp_min(1e-12)).sum(0)
        num_tokens = stage.num_prefix + len(sources_NP)
        steps.append(TokensLeft(stage.block, num_tokens, kept_P.numpy(), fused_FP.numpy(), merged_P.numpy()))
    return tuple(steps)


def relative_weight(fused_FP: np.ndarray) -> np.ndarray:
    """Weight `[P]` of each patch as a share of the heaviest one of its fused token; 0 in no fused token."""
    return (fused_FP / np.maximum(fused_FP.max(axis=1, keepdims=True), 1e-12)).max(axis=0, initial=0.0)


def tokens_picture(photo: np.ndarray, step: TokensLeft, grid: tuple[int, int]) -> np.ndarray:
    """The photo with kept patches as they are, outlined; the others dark, fused ones in the colour of their weight."""
    size = photo.shape[:2]
    kept = patch_pixels(step.kept_P, grid, size)
    light = photo.mean(axis=-1, keepdims=True) / 255
    tint = _ramp()(patch_pixels(np.maximum(relative_weight(step.fused_FP), step.merged_P), grid, size))[..., :3]
    dark = np.where(grid_lines(grid, size)[..., None], 0.6, 1.0) * (255 * tint * (0.6 + 0.4 * light) + 45 * light)
    picture = np.where(kept[..., None], photo, dark)
    picture[outlines(kept)] = 255
    return picture.round().clip(0, 255).astype(np.uint8)


def _ramp() -> Colormap:
    return LinearSegmentedColormap.from_list("weight", COLOURS)


def outlines(mask: np.ndarray) -> np.ndarray:
    """True on the pixels of `mask [H, W]` that touch one outside of it, the border of the picture not counted."""
    inside = np.pad(mask, 1, mode="edge")
    around = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return mask & ~around


def save_tokens(rows: Sequence[TokenRow], path: str | Path) -> None:
    """Write one picture, a row per photograph: the photo, then a panel per drop. Its name ends in one of `FORMATS`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    columns = 1 + max(len(row.steps) for row in rows)
    cell = min(max(2.5, max(row.photo.shape[1] for row in rows) / DPI), 4.0)
    heights = [cell * row.photo.shape[0] / row.photo.shape[1] + 0.3 for row in rows]
    has_fused = any(len(step.fused_FP) or step.num_merged for row in rows for step in row.steps)
    figure = Figure(figsize=(cell * columns, sum(heights) + 0.6 * has_fused), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, row in zip(axes, rows, strict=True):
        pictures = [(row.name, row.photo)]
        pictures += [(step.caption, tokens_picture(row.photo, step, row.grid)) for step in row.steps]
        for axis in line:
            axis.axis("off")
        for axis, (caption, pixels) in zip(line, pictures, strict=False):
            axis.imshow(pixels)
            axis.set_title(caption, fontsize=8)
    if has_fused:
        scale = ScalarMappable(Normalize(0, 1), _ramp())
        bar = figure.colorbar(scale, ax=axes, location="bottom", fraction=0.03, aspect=60, shrink=0.5)
        bar.set_label("weight of a fused patch, heaviest of its token = 1", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
