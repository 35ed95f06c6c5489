#!/usr/bin/env python3
"""Bring the official files of NYU Depth v2 into the layout of NYUD_MT.

    python datasets/nyud/prepare.py --mat nyu_depth_v2_labeled.mat --splits splits.mat \\
        --class-mapping classMapping40.mat

Where to get the files, and what is computed from them, stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

if str(Path(__file__).resolve().parent) not in sys.path:  # when a test loads this file by its path
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from nyud_convert import Frame, Source, convert, open_mat

from m3bsr.cli.prepare import MANIFEST, file_hash, is_done, put_in_place
from m3bsr.data.files import dataset_path
from m3bsr.data.nyud import NYUD

VERSION = 1  # raise it when the same input begins to give other files
FOLDERS = ("images", "segmentation", "depth", "normals", "edge", "gt_sets")
MAX_VALUES = 2_000_000_000  # labels40 of all 1,449 frames has 445 million
KNOWN_MD5 = "520609c519fba3ba5ac58c8fefcc3530"  # of nyu_depth_v2_labeled.mat, 2,972,037,809 bytes


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        made = prepare(
            args.mat,
            args.splits,
            dataset_path(args.out),
            class_mapping=args.class_mapping,
            labels40=args.labels40,
            depth=args.depth,
            checksum=args.checksum,
            workers=args.workers,
            force=args.force,
            quiet=args.quiet,
        )
    except (ValueError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{dataset_path(args.out)}: {made} frames" if made else f"{dataset_path(args.out)} is there already")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mat", type=Path, required=True, help="nyu_depth_v2_labeled.mat")
    parser.add_argument("--splits", type=Path, required=True, help="splits.mat")
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--class-mapping", type=Path, help="classMapping40.mat: from the 894 raw labels to 40 classes")
    classes.add_argument("--labels40", type=Path, help="labels40.mat: the 40 classes themselves")
    parser.add_argument("--out", type=Path, default=Path("datasets/nyud/NYUD_MT"), help="folder to make")
    parser.add_argument("--depth", choices=("inpainted", "raw"), default="inpainted", help="raw has holes")
    parser.add_argument(
        "--checksum", default="known", metavar="known|none|md5:HEX|sha256:HEX", help="what --mat is checked against"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--force", action="store_true", help="replace a folder that this script made before")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def prepare(
    mat: Path,
    splits: Path,
    out: Path,
    *,
    class_mapping: Path | None = None,
    labels40: Path | None = None,
    depth: str = "inpainted",
    checksum: str = "known",
    workers: int = 1,
    force: bool = False,
    quiet: bool = False,
) -> int:
    """Write the data set into ``out``, whole or not at all; returns the number of frames, 0 if it was there already.

    Raises:
        FileNotFoundError, ValueError: a file missing, damaged, or other than expected; ``out`` holds something else.
    """
    out = out.resolve()  # a link to another disk stays a link
    classes = class_mapping or labels40
    assert classes is not None and (class_mapping is None) != (labels40 is None)
    for path in (mat, splits, classes):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}; datasets/nyud/README.md says where to get it")
    arguments = {
        "mat_bytes": mat.stat().st_size,
        "splits_sha256": file_hash(splits, "sha256", quiet=True),
        "classes_sha256": file_hash(classes, "sha256", quiet=True),
        "classes_from": "labels40" if labels40 else "class_mapping",
        "depth": depth,
    }
    manifest = {"made_by": "prepare.py", "version": VERSION, "arguments": arguments}
    if is_done(out, manifest, force):
        return 0
    manifest["mat_checksum"] = check(mat, checksum, quiet)
    num_frames, size = check_mat(mat, needs_raw=depth == "raw")
    indices = read_splits(splits, num_frames)
    table = read_mapping(class_mapping) if class_mapping else None
    stack = read_labels40(labels40, num_frames, size) if labels40 else None
    frames = [
        Frame(i, None if stack is None else stack[i]) for i in sorted(i for part in indices.values() for i in part)
    ]
    _check_space(out, len(frames), size)
    source = Source(str(mat), None if table is None else table.tobytes(), depth)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes folders for their owner alone
        for folder in FOLDERS:
            (temporary / folder).mkdir()
        done = _convert_all(str(temporary), source, frames, workers)
        for _ in tqdm(done, total=len(frames), unit="frame", desc="converting", disable=quiet):
            pass
        _finish(temporary, indices, manifest)
        put_in_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return len(frames)


def _convert_all(root: str, source: Source, frames: list[Frame], workers: int) -> Iterator[str]:
    work = partial(convert, root, source)
    if workers <= 1:
        try:
            yield from map(work, frames)
        finally:
            open_mat.cache_clear()
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(work, frames, chunksize=4)


def _finish(root: Path, indices: dict[str, list[int]], manifest: dict[str, Any]) -> None:
    for split, part in indices.items():
        names = [Frame(i).name for i in part]
        (root / "gt_sets" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        NYUD(root.absolute(), split, NYUD.known_tasks)[0]  # what was written can be read
    (root / "class_names.txt").write_text("".join(f"{name}\n" for name in NYUD.class_names["semseg"]))
    (root / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def check(mat: Path, checksum: str, quiet: bool) -> str:
    """Compare the file with ``checksum``; returns what it was found to be, for the manifest.

    Raises:
        ValueError: another file, most often a download that broke off.
    """
    if checksum == "none":
        return "not checked"
    algorithm, _, wanted = (f"md5:{KNOWN_MD5}" if checksum == "known" else checksum).partition(":")
    length = {"md5": 32, "sha256": 64}.get(algorithm)
    if length is None or len(wanted) != length:
        raise ValueError(f"--checksum {checksum!r}: write known, none, md5:32 hex digits or sha256:64 hex digits")
    found = file_hash(mat, algorithm, quiet)
    if found != wanted.lower():
        raise ValueError(
            f"{mat} ({mat.stat().st_size:,} bytes) has {algorithm} {found}, expected {wanted}: "
            "download it again, or name its checksum with --checksum"
        )
    return f"{algorithm}:{found}"


def check_mat(path: Path, needs_raw: bool) -> tuple[int, tuple[int, int]]:
    """Number of frames and (height, width) of the labelled data.

    Raises:
        ValueError: no HDF5 file, an array missing or of another shape; h5py not installed.
    """
    try:
        import h5py
    except ImportError:
        raise ValueError("MATLAB 7.3 files need h5py: pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            shapes = {key: value.shape for key, value in file.items() if isinstance(value, h5py.Dataset)}
    except Exception as error:  # a damaged file fails in many ways: OSError, KeyError, RuntimeError
        raise ValueError(f"{path} is no MATLAB 7.3 (HDF5) file: {error}") from None
    needed = ("images", "labels", "depths", *(("rawDepths",) if needs_raw else ()))
    missing = [key for key in needed if key not in shapes]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it holds {', '.join(shapes) or 'nothing'}")
    num, width, height = shapes["labels"] if len(shapes["labels"]) == 3 else (0, 0, 0)
    for key in (*needed, *(k for k in ("rawDepths", "instances") if k in shapes)):
        wanted = (num, 3, width, height) if key == "images" else (num, width, height)
        if shapes[key] != wanted or not num:
            raise ValueError(f"{path}: {key} has shape {shapes[key]}, expected {wanted} ([N, W, H], as labels)")
    return num, (height, width)


def read_splits(path: Path, num_frames: int) -> dict[str, list[int]]:
    """``train`` and ``val``: indices from 0."""
    found = {}
    for split, key in (("train", "trainNdxs"), ("val", "testNdxs")):
        numbers = _variable(path, key).ravel().astype(np.int64)
        wrong = numbers[(numbers < 1) | (numbers > num_frames)]
        if not len(numbers) or len(wrong):
            what = f"number {wrong[0]}, but there are {num_frames} frames" if len(wrong) else "no frames"
            raise ValueError(f"{path}: {key} names {what}")
        found[split] = sorted({int(n) - 1 for n in numbers})
    both = set(found["train"]) & set(found["val"])
    if both:
        raise ValueError(f"{path}: frame {min(both) + 1} is in trainNdxs and in testNdxs")
    return found


def read_mapping(path: Path) -> np.ndarray:
    """Table from raw label (0 to 894) to class (0 void, 1 to 40), uint8."""
    classes = _variable(path, "mapClass").ravel()
    wrong = classes[(classes < 0) | (classes > 40)]
    if len(wrong):
        raise ValueError(f"{path}: mapClass holds {wrong[0]}, classes are 1 to 40")
    return np.concatenate([[0], classes]).astype(np.uint8)


def read_labels40(path: Path, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    """The classes of every frame, uint8 ``[N, H, W]``."""
    stack = _variable(path, "labels40")
    stack = stack.transpose(2, 0, 1) if stack.ndim == 3 else stack
    if stack.shape != (num_frames, *size):
        raise ValueError(
            f"{path}: labels40 holds {stack.shape} (frames, height, width), expected {(num_frames, *size)}"
        )
    if stack.min() < 0 or stack.max() > 40:
        raise ValueError(
            f"{path}: labels40 holds {stack.max() if stack.max() > 40 else stack.min()}, classes are 1 to 40"
        )
    return stack.astype(np.uint8)


def _variable(path: Path, name: str) -> np.ndarray:
    """A numeric array of a MATLAB file of either format, in MATLAB's order of axes."""
    import scipy.io

    try:
        try:
            shapes = {key: shape for key, shape, _ in scipy.io.whosmat(path)}
            _check_size(name, shapes.get(name, ()))
            content: Any = shapes if name not in shapes else scipy.io.loadmat(path, variable_names=[name])
        except NotImplementedError:  # MATLAB 7.3
            import h5py

            with h5py.File(path, "r") as file:
                content = {k: v for k, v in file.items() if isinstance(v, h5py.Dataset)}
                if name in content:
                    _check_size(name, content[name].shape)
                    content = {name: np.array(content[name]).T}
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"cannot read {path} as a MATLAB file: {error}") from error
    if name not in content:
        there = ", ".join(key for key in content if not key.startswith("_")) or "nothing"
        raise ValueError(f"{path} has no {name}; it holds {there}")
    array = np.asarray(content[name])
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {name} holds {array.dtype} values, numbers are expected")
    return array


def _check_size(name: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) > MAX_VALUES:
        raise ValueError(f"{name} of shape {shape} is more than the {MAX_VALUES:,} values allowed")


def _check_space(out: Path, num_frames: int, size: tuple[int, int]) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    needed, free = num_frames * size[0] * size[1] * 18, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free, {num_frames} frames need about {needed / 1e9:.1f} GB")


if __name__ == "__main__":
    sys.exit(main())
