"""``tools/predict.py RUN IMAGES...``: what a trained run sees in photographs of any size, as one picture a photo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from m3bsr.build import build_tasks, transform_of
from m3bsr.cli.common import one_line_errors, open_run, pick_device
from m3bsr.config import Config
from m3bsr.data.files import FORMATS, read_image
from m3bsr.data.image_transforms import OnImage, middle
from m3bsr.engine.precision import autocast
from m3bsr.report.collect import collect
from m3bsr.report.panels import Sample, save_panel
from m3bsr.tasks.base import Task
from m3bsr.utils.lookup import lookup

LONGEST_SIDE = 1024
EXIF_ORIENTATION = 0x0112
TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Write a panel per photo and print its path; exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/predict.py", description="Predict on photographs with a trained run.")
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint folder in one")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--out", type=Path, help="folder for the pictures, RUN/predictions by default")
    parser.add_argument("--checkpoint", default="last", choices=("last", "best", "previous"), help="which one")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these; only their path is computed")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    for path in args.images:  # complain before the model is built
        if not path.is_file():
            raise FileNotFoundError(f"missing file: {path}")
    device = pick_device(args.device)
    config, model, _ = open_run(args.run, args.checkpoint)
    tasks = build_tasks(config)
    if args.tasks:
        tasks = {name: lookup(tasks, name, f"task of {args.run}") for name in args.tasks}
    model = model.to(device).eval()
    out = args.out or args.run / "predictions"
    taken: set[Path] = set()
    for path in args.images:
        target = _free_name(out / f"{path.stem}.png", taken)
        save_panel(predict(model, tasks, config, path), target)
        print(target)
    return 0


def predict(model: nn.Module, tasks: Mapping[str, Task], config: Config, path: str | Path) -> Sample:
    """Predictions, dropped tokens and experts for the photo at `path`; predictions have the photo's own shape.

    The network sees the photo resized to the config's image size (where images have one class each its middle, and so
    does the picture); pictures have at most 1024 pixels a side.

    Raises:
        FileNotFoundError, ValueError: missing, no image, or truncated.
    """
    photo = upright(Path(path))
    transform = transform_of(config, train=False)
    image: Tensor = transform({"image": tv_tensors.Image(photo.transpose(2, 0, 1).copy())})["image"]
    image = image.as_subclass(Tensor)
    if any(isinstance(step, OnImage) for step in transform.steps):  # images with one class each are cropped
        photo = middle(photo, config.data.image_size)
    device = next(model.parameters()).device
    collected = collect(
        model,
        tasks,
        image[None],
        photos=[photo],
        names=[Path(path).name],
        size=(photo.shape[0], photo.shape[1]),
        autocast=autocast(device, config.train.precision),
        longest=LONGEST_SIDE,
    )
    return collected.samples[0]


def upright(path: Path) -> np.ndarray:
    """The photo as uint8 `[H, W, 3]`, turned as its camera says, with at most 1024 pixels a side."""
    picture = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    with Image.open(path, formats=FORMATS) as image:
        try:
            turn = TURN.get(image.getexif().get(EXIF_ORIENTATION, 1))
        except Exception:  # a damaged EXIF block fails in many ways; the picture itself is whole
            turn = None
    if turn is not None:
        picture = picture.transpose(turn)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return np.array(picture)


def _free_name(path: Path, taken: set[Path]) -> Path:
    """Photos of one name from two folders must not overwrite each other."""
    free, count = path, 2
    while free in taken:
        free, count = path.with_stem(f"{path.stem}-{count}"), count + 1
    taken.add(free)
    return free
