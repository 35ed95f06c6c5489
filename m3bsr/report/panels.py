"""Pictures of what a model did with a photograph. Pure numpy: every function takes and gives uint8 `[H, W, 3]`.

Shapes: a grid of h x w patches, flattened row by row to P = h * w.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

GREY = 128.0


@dataclass(frozen=True)
class Sample:
    """One photograph, what the model made of it, and how it got there. Plain arrays."""

    name: str
    photo: np.ndarray
    predictions: Mapping[str, np.ndarray]
    """Coloured prediction of each task."""
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Coloured ground truth, where there is one."""
    grid: tuple[int, int] = (1, 1)
    kept: Mapping[str, Sequence[tuple[int, np.ndarray]]] = field(default_factory=dict)
    """Per task, for each drop: its block and a bool mask `[P]` of the patches that were kept."""
    experts: Mapping[str, Mapping[int, np.ndarray]] = field(default_factory=dict)
    """Per task and MoE block the first choice of every patch, int `[P]`; -1 where the patch had been dropped."""
    num_experts: int = 0
    answers: Mapping[str, str] = field(default_factory=dict)
    """In words what tasks with one answer per image say, and whether it is right."""


@dataclass(frozen=True)
class Picture:
    """A picture and its caption."""

    caption: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Group:
    """Pictures that belong side by side."""

    title: str
    pictures: tuple[Picture, ...]


def token_picture(photo: np.ndarray, kept_P: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The photo with dropped patches greyed out and outlined, kept ones as they are."""
    dropped = patch_pixels(~np.asarray(kept_P, dtype=bool), grid, photo.shape[:2])
    grey = photo.mean(axis=-1, keepdims=True) * 0.35 + GREY * 0.55
    picture = np.where(dropped[..., None], grey, photo.astype(np.float32))
    lines = dropped & grid_lines(grid, photo.shape[:2])
    picture[lines] = picture[lines] * 0.6 + 255 * 0.4
    return picture.round().astype(np.uint8)


def expert_picture(photo: np.ndarray, experts_P: np.ndarray, grid: tuple[int, int], num_experts: int) -> np.ndarray:
    """Each patch in the colour of its expert, over the photo in grey; patches with -1 stay grey."""
    chosen = patch_pixels(np.asarray(experts_P), grid, photo.shape[:2])
    colour = expert_palette(num_experts)[np.maximum(chosen, 0)]
    grey = np.repeat(photo.mean(axis=-1, keepdims=True), 3, axis=-1)
    blend = np.where(chosen[..., None] >= 0, 0.65 * colour + 0.35 * grey, 0.35 * grey + 0.55 * GREY)
    return blend.round().clip(0, 255).astype(np.uint8)


def expert_palette(num_experts: int) -> np.ndarray:
    """Distinct colours `[E, 3]` uint8: the hues in steps of the golden ratio, three brightnesses in turn."""
    colours = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1.0, (0.75, 0.55, 0.9)[i % 3], (0.95, 0.75, 0.6)[i % 3])
        for i in range(max(num_experts, 1))
    ]
    return np.round(np.array(colours) * 255).astype(np.uint8)


def patch_pixels(values_P: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """One value per patch as one value per pixel `[H, W]`; the image need not divide by the grid."""
    h, w = grid
    if values_P.shape != (h * w,):
        raise ValueError(f"expected one value for each of {h} x {w} patches, got shape {values_P.shape}")
    rows, columns = np.arange(size[0]) * h // size[0], np.arange(size[1]) * w // size[1]
    return values_P.reshape(h, w)[rows[:, None], columns[None, :]]


def grid_lines(grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """True on the first row and column of pixels of every patch `[H, W]`."""
    rows, columns = (np.arange(s) * g // s for s, g in zip(size, grid, strict=True))
    first_row, first_column = np.diff(rows, prepend=-1) > 0, np.diff(columns, prepend=-1) > 0
    return first_row[:, None] | first_column[None, :]


def heat_picture(values_RC: np.ndarray, top: float | None = None, cell: int = 16) -> np.ndarray:
    """A matrix as squares of `cell` pixels, white for 0 to dark blue for `top` (by default the largest value)."""
    share_RC = np.clip(values_RC / max(values_RC.max() if top is None else top, 1e-12), 0, 1)
    white, dark = np.array([255.0, 255.0, 255.0]), np.array([8.0, 48.0, 107.0])
    colours = (white + share_RC[..., None] * (dark - white)).round().astype(np.uint8)
    return np.repeat(np.repeat(colours, cell, axis=0), cell, axis=1)


def shrink(picture: np.ndarray, longest: int) -> np.ndarray:
    """The picture with its longer side at most `longest` pixels (every n-th pixel: labels must not blend)."""
    step = math.ceil(max(picture.shape[:2]) / longest)
    return picture[::step, ::step]


def task_group(sample: Sample) -> Group:
    """Photo, then each task: ground truth beside prediction."""
    answers = "".join(f", {task}: {answer}" for task, answer in sample.answers.items())
    pictures = [Picture(f"photo{answers}", sample.photo)]
    for task, prediction in sample.predictions.items():
        if task in sample.targets:
            pictures.append(Picture(f"{task}: ground truth", sample.targets[task]))
        pictures.append(Picture(f"{task}: prediction", prediction))
    return Group(sample.name, tuple(pictures))


def token_group(sample: Sample) -> Group:
    """Tokens kept at each drop; tasks that kept the same patches share a picture."""
    by_mask: dict[tuple[int, bytes], tuple[list[str], np.ndarray]] = {}
    for task, stages in sample.kept.items():
        for block, mask in stages:
            by_mask.setdefault((block, mask.tobytes()), ([], mask))[0].append(task)
    pictures = []
    for (block, _), (tasks, mask) in sorted(by_mask.items(), key=lambda item: item[0][0]):
        whose = "" if len(tasks) == len(sample.kept) else f", {', '.join(tasks)}"
        caption = f"block {block}{whose}: {int(mask.sum())} of {mask.size} patches"
        pictures.append(Picture(caption, token_picture(sample.photo, mask, sample.grid)))
    return Group(sample.name, tuple(pictures))


def expert_group(sample: Sample) -> Group:
    """First-choice expert of each patch, per task and MoE block."""
    pictures = [
        Picture(f"{task}, block {block}", expert_picture(sample.photo, experts_P, sample.grid, sample.num_experts))
        for task, blocks in sample.experts.items()
        for block, experts_P in blocks.items()
    ]
    return Group(sample.name, tuple(pictures))


def save_panel(sample: Sample, path: str | Path) -> None:
    """Write everything about a sample into one PNG: tasks, tokens dropped, experts chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {"": task_group(sample), "tokens kept": token_group(sample), "experts": expert_group(sample)}
    lines = [  # at most six pictures a line
        (title if start == 0 else "", row.pictures[start : start + 6])
        for title, row in rows.items()
        for start in range(0, len(row.pictures), 6)
    ]
    columns = max(len(pictures) for _, pictures in lines)
    height, width = sample.photo.shape[:2]
    cell = 2.6
    row_height = cell * height / width + 0.42
    figure = Figure(figsize=(cell * columns + 0.2, row_height * len(lines)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (title, pictures) in zip(axes, lines, strict=True):
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture.pixels, interpolation="nearest")
            axis.set_title(picture.caption, fontsize=7)
        if title:
            line[0].set_title(f"{title}\n{pictures[0].caption}", fontsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
