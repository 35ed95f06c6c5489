#!/usr/bin/env python3
"""Make the small Cityscapes: from the archive of prepared arrays, or from the official packages.

    python datasets/cityscapes/prepare.py --archive cityscapes.zip
    python datasets/cityscapes/prepare.py --official CITYSCAPES   # holds leftImg8bit, gtFine, disparity, camera

Where to get either, and what is computed, stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

if str(Path(__file__).resolve().parent) not in sys.path:  # when a test loads this file by its path
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from cityscapes_convert import FOLDERS, Frame, convert, frames_of

from m3bsr.cli.common import one_line_errors
from m3bsr.cli.prepare import SET, check_and_place, file_hash, is_done, unpack_once, work_folder
from m3bsr.data import Cityscapes
from m3bsr.data.files import dataset_path

VERSION = 1  # raise it when the same input begins to give other files
PUBLISHED = (2975, 500)
SPLITS = ("train", "val")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 if the source is not what it should be."""
    parser = argparse.ArgumentParser(prog="prepare.py", description=(__doc__ or "").split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", type=Path, help="the prepared arrays, as tar or zip")
    source.add_argument("--official", type=Path, help="folder with leftImg8bit, gtFine, disparity and camera, unpacked")
    parser.add_argument("--tasks", nargs="+", choices=FOLDERS, default=list(FOLDERS), help="labels to make (official)")
    parser.add_argument("--size", nargs=2, type=int, default=(128, 256), metavar=("H", "W"), help="pixels (official)")
    parser.add_argument("--out", type=Path, default=Path("datasets/cityscapes/data"), help="folder to make")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--force", action="store_true", help="replace a folder that this script made before")
    parser.add_argument("--allow-faults", action="store_true", help="put it in place although files are faulty")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if min(args.size) < 1:
        raise ValueError(f"--size must be positive, got {args.size[0]} {args.size[1]}")
    out = dataset_path(args.out).resolve()  # a link to another disk stays a link
    frames: list[Frame] = []
    if args.archive:
        if not args.archive.is_file():
            raise FileNotFoundError(f"no such archive: {args.archive}; datasets/cityscapes/README.md says where it is")
        made_from: dict[str, Any] = {"archive_sha256": file_hash(args.archive, "sha256", quiet=False)}
    else:
        tasks = tuple(sorted(set(args.tasks)))
        frames = [frame for split in SPLITS for frame in frames_of(args.official, split, tasks)]
        names = [f"{frame.split} {frame.name}" for frame in frames]
        made_from = {"tasks": list(tasks), "size": list(args.size), "frames": names}
    manifest = {"made_by": "datasets/cityscapes/prepare.py", "version": VERSION, "arguments": made_from}
    if is_done(out, manifest, args.force):
        print(f"{out} is there already")
        return 0
    work = work_folder(out, manifest)
    if args.archive:
        root = unpack_once(args.archive, work, "train/image", "val/image")
    else:
        root = make(frames, work / SET, tuple(args.size), args.workers)
    check_and_place(root, work, out, ["--dataset", "cityscapes", "--workers", str(args.workers)], args.allow_faults)
    made = Cityscapes.tasks_in(out)
    sizes = tuple(len(Cityscapes(out, split, made, check=False)) for split in SPLITS)
    note = "" if sizes == PUBLISHED else "; the published set has {} and {}".format(*PUBLISHED)
    print(f"{out}: {sizes[0]} train, {sizes[1]} val samples{note}; tasks: {', '.join(made)}")
    return 0


def make(frames: list[Frame], root: Path, size: tuple[int, int], workers: int) -> Path:
    """Write all arrays below ``root``, with a progress bar; frames that are there already are kept."""
    for folder in {path.parent for frame in frames for path in frame.files(root).values()}:
        folder.mkdir(parents=True, exist_ok=True)
    for _ in tqdm(_convert_all(frames, root, size, workers), total=len(frames), unit="frame", desc="convert"):
        pass
    return root


def _convert_all(frames: list[Frame], root: Path, size: tuple[int, int], workers: int) -> Iterator[None]:
    work = partial(convert, root, size)
    if workers <= 1:
        yield from map(work, frames)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(work, frames, chunksize=4)


if __name__ == "__main__":
    sys.exit(main())
