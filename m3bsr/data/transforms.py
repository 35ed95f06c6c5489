"""Joint transforms of an image and its dense labels, on torchvision's v2 tensors.

Geometry means something to some labels: a camera that zooms in by s sees depth / s (and inverse depth * s), a mirrored
world has normals with the other x, a turned one has turned normals. The label types below carry that knowledge;
everything that is moved in from outside the image is ``IGNORE``. Random numbers come from torch alone, so seeding torch
reproduces a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode

from m3bsr.utils.constants import IGNORE
from m3bsr.utils.lookup import lookup

Sample = dict[str, Any]


class Labels(tv_tensors.Mask):
    """Class per pixel ``[1, H, W]``, uint8 or int64."""


class Edge(tv_tensors.Mask):
    """Edge or not ``[1, H, W]``, float."""


class Depth(tv_tensors.Mask):
    """Metres along the optical axis ``[1, H, W]``, float."""


class InverseDepth(tv_tensors.Mask):
    """One over depth, or disparity, in any unit ``[1, H, W]``, float."""


class Normals(tv_tensors.Mask):
    """Unit vectors ``[3, H, W]`` in camera axes: x right, y down, z forward or back (only x and y are turned)."""


class RandomFlip:
    """Mirror left and right; normals get the other x."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, sample: Sample) -> Sample:
        return flip(sample) if torch.rand(()) < self.p else sample


class RandomZoom:
    """Zoom in on a random part by a factor from ``scale`` (1 or more) and resize it to ``size``: one resampling."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]) -> None:
        assert scale[0] >= 1
        self.size, self.scale = size, scale

    def __call__(self, sample: Sample) -> Sample:
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * torch.rand(()).item()
        height, width = sample["image"].shape[-2:]
        inner = max(1, round(height / factor)), max(1, round(width / factor))
        top, left = (int(torch.randint(full - part + 1, ())) for full, part in zip((height, width), inner, strict=True))
        cropped = {key: F.crop(value, top, left, *inner) for key, value in sample.items()}
        return resize(cropped, self.size, zoom=width / inner[1])


class RandomScaleRotate:
    """Zoom by a factor from ``scale`` and turn by an angle from ``degrees``, keeping the size of the picture."""

    def __init__(self, scale: tuple[float, float] = (1.0, 1.0), degrees: float = 0.0) -> None:
        self.scale, self.degrees = scale, degrees

    def __call__(self, sample: Sample) -> Sample:
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        angle = self.degrees * (2 * torch.rand(()).item() - 1)
        return scale_rotate(sample, factor, angle)


class RandomScaleCrop:
    """Resize by a factor from ``scale``, then crop to ``size`` where no class covers more than ``max_share``.

    The factor counts from the scale at which the picture has as many pixels as ``size``: that is what validation sees,
    so an object of one apparent size has one depth in both, however large the files are.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float] = (0.5, 2.0), max_share: float = 0.75) -> None:
        self.size, self.scale, self.max_share = size, scale, max_share

    def __call__(self, sample: Sample) -> Sample:
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * torch.rand(()).item()
        height, width = sample["image"].shape[-2:]
        factor *= (base := math.sqrt(self.size[0] * self.size[1] / (height * width)))
        scaled = max(1, round(height * factor)), max(1, round(width * factor))
        sample = resize(sample, scaled, zoom=scaled[1] / (width * base))
        sample = pad_to(sample, self.size)
        height, width = sample["image"].shape[-2:]
        for _ in range(10):
            top = int(torch.randint(height - self.size[0] + 1, ()))
            left = int(torch.randint(width - self.size[1] + 1, ()))
            cropped = {key: F.crop(value, top, left, *self.size) for key, value in sample.items()}
            if _largest_share(cropped.get("semseg")) <= self.max_share:
                break
        return cropped


def flip(sample: Mapping[str, Any]) -> Sample:
    """Mirror every entry; normals as seen in the mirror."""
    flipped = {key: F.horizontal_flip(value) for key, value in sample.items()}
    return {k: _turned(v, -1, 0, 0, 1) if isinstance(v, Normals) else v for k, v in flipped.items()}


def scale_rotate(sample: Mapping[str, Any], factor: float, angle: float) -> Sample:
    """Zoom by ``factor`` and turn by ``angle`` degrees (counter-clockwise) about the centre, same size."""
    if factor == 1 and angle == 0:
        return dict(sample)
    # torchvision turns clockwise in image axes for positive angles; y points down, so x, y turn the same way.
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    moved = {}
    for key, value in sample.items():
        picture = isinstance(value, tv_tensors.Image)
        moved[key] = F.affine(
            value,
            angle=-angle,
            translate=[0, 0],
            scale=factor,
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR if picture else InterpolationMode.NEAREST,
            fill=[float(c) * 255 for c in IMAGENET_DEFAULT_MEAN] if picture else IGNORE,
        )
        if isinstance(value, Normals):
            moved[key] = _turned(moved[key], cos, sin, -sin, cos)
        elif isinstance(value, Depth | InverseDepth):
            moved[key] = _zoomed(moved[key], factor)
    return moved


def resize(sample: Mapping[str, Any], size: tuple[int, int], zoom: float = 1.0) -> Sample:
    """Resize to ``size``: labels by nearest pixel. ``zoom`` is what it means for the camera: depth is divided by it."""
    resized = {}
    for key, value in sample.items():
        if isinstance(value, tv_tensors.Image):
            resized[key] = F.resize(value, list(size), InterpolationMode.BILINEAR, antialias=True)
        else:
            # Not F.resize: it takes plain NEAREST for masks in some versions, half a pixel off where the size shrinks.
            nearest = F.resize_image(value.as_subclass(Tensor), list(size), InterpolationMode.NEAREST_EXACT)
            resized[key] = nearest.as_subclass(type(value))
        if isinstance(value, Depth | InverseDepth) and zoom != 1:
            resized[key] = _zoomed(resized[key], zoom)
    return resized


def pad_to(sample: Mapping[str, Any], size: tuple[int, int]) -> Sample:
    """Pad on the right and below to at least ``size``: mean colour, ``IGNORE`` in labels."""
    height, width = sample["image"].shape[-2:]
    bottom, right = max(0, size[0] - height), max(0, size[1] - width)
    if not bottom and not right:
        return dict(sample)

    def fill(value: Tensor) -> Any:
        return [round(c * 255) for c in IMAGENET_DEFAULT_MEAN] if isinstance(value, tv_tensors.Image) else IGNORE

    return {key: F.pad(value, [0, 0, right, bottom], fill=fill(value)) for key, value in sample.items()}


def _turned(normals: Tensor, xx: float, xy: float, yx: float, yy: float) -> Normals:
    """Normals with (x, y) -> (xx x + xy y, yx x + yy y); invalid ones stay marked."""
    x, y, z = normals.as_subclass(Tensor)
    turned = torch.stack([xx * x + xy * y, yx * x + yy * y, z])
    invalid = normals.as_subclass(Tensor)[:1] == IGNORE
    return Normals(torch.where(invalid, float(IGNORE), turned))


def _zoomed(depth: Depth | InverseDepth, factor: float) -> Depth | InverseDepth:
    raw = depth.as_subclass(Tensor)
    nearer = raw * factor if isinstance(depth, InverseDepth) else raw / factor
    return torch.where(raw == IGNORE, raw, nearer).as_subclass(type(depth))


def _largest_share(labels: Tensor | None) -> float:
    """Share of the most frequent class among the labelled pixels."""
    if labels is None:
        return 0.0
    valid = labels[labels != IGNORE]
    return 0.0 if valid.numel() == 0 else float(valid.bincount().max()) / valid.numel()


class Photometric:
    """Jitter brightness, contrast and saturation of the image (hue costs more than all of them and helps little)."""

    def __init__(self, strength: float = 1.0) -> None:
        self.jitter = v2.ColorJitter(0.25 * strength, 0.25 * strength, 0.25 * strength)

    def __call__(self, sample: Sample) -> Sample:
        # In floats: half the time, as torchvision would round to bytes after each of the three.
        return {**sample, "image": self.jitter(F.to_dtype(sample["image"], torch.float32, scale=True))}


def _none(size: tuple[int, int]) -> list[Callable[[Sample], Sample]]:
    return [partial(resize, size=size)]


def _astmt(size: tuple[int, int]) -> list[Callable[[Sample], Sample]]:
    return [RandomFlip(), RandomZoom(size, (1.0, 1.5)), Photometric()]


def _astmt_rotate(size: tuple[int, int]) -> list[Callable[[Sample], Sample]]:
    # Turning comes before the resize, which may change the proportions: in a squeezed picture a turn is no turn.
    return [RandomFlip(), RandomScaleRotate((0.75, 1.25), 20.0), partial(resize, size=size), Photometric()]


def _atrc(size: tuple[int, int]) -> list[Callable[[Sample], Sample]]:
    return [RandomScaleCrop(size), RandomFlip(), Photometric(2.0)]


# Training recipes by name; each gives the steps for an image size. Validation always uses "none".
RECIPES: dict[str, Callable[[tuple[int, int]], list[Callable[[Sample], Sample]]]] = {
    "none": _none,
    "astmt": _astmt,  # NYUD in the ASTMT family: flip, zoom 1-1.5
    "astmt_rotate": _astmt_rotate,  # PASCAL-Context in the ASTMT family: zoom .75-1.25, turns up to 20 degrees
    "atrc": _atrc,  # flip, zoom .5-2, crop, photometric
}


class Pipeline:
    """The steps of a recipe, then float32 and normalisation. Takes and gives a dict of tv_tensors."""

    def __init__(
        self, steps: Sequence[Callable[[Sample], Sample]], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.steps, self.mean, self.std = list(steps), list(mean), list(std)

    @property
    def normalisation(self) -> dict[str, list[float]]:
        """Mean and standard deviation of the channels, to undo it."""
        return {"mean": self.mean, "std": self.std}

    def __call__(self, sample: Sample) -> Sample:
        for step in self.steps:
            sample = step(sample)
        image = F.to_dtype(sample["image"], torch.float32, scale=True)
        return {**sample, "image": F.normalize(image, self.mean, self.std)}


def build_transform(
    recipe: str,
    image_size: tuple[int, int],
    *,
    train: bool,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    recipes: Mapping[str, Callable[[tuple[int, int]], list[Callable[[Sample], Sample]]]] = RECIPES,
) -> Pipeline:
    """The transform of a recipe; with ``train=False`` always that of ``none``: only resize and normalise.

    Args:
        recipes: the recipes of the kind of data (``IMAGE_RECIPES`` for images with one class each).

    Raises:
        ValueError: unknown recipe.
    """
    steps = lookup(recipes, recipe, "data.augment")
    return Pipeline((steps if train else recipes["none"])(image_size), mean, std)
