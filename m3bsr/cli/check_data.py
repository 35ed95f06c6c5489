"""``tools/check_data.py ROOT``: every file of a data set is read, and what is wrong is listed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m3bsr.cli.common import one_line_errors
from m3bsr.data import DATASETS
from m3bsr.data.dense import DenseImages
from m3bsr.data.files import resolve_root
from m3bsr.utils.lookup import lookup

FAULTY = 1
# What each layout has and the others have not.
MARKS = {"pascal": "JPEGImages", "nyud": "gt_sets", "cityscapes": "train/label_7", "folder": "images"}
MARKS |= {"image_folder": "train"}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 if a file is faulty, 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="tools/check_data.py",
        description="Read every file of a data set, and list those that are missing, truncated, of another size than "
        "their image, or out of range.",
    )
    parser.add_argument("root", type=Path, help="folder of the data")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)}; found out by default")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only their labels; all that are there by default")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", default=["train", "val"])
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores; 0: this one)"
    )
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.workers < 0:
        raise ValueError(f"--workers must not be negative, got {args.workers}")
    root = resolve_root(args.root)
    name = args.dataset or guess(root)
    dataset = lookup(DATASETS, name, "--dataset")
    dense = issubclass(dataset, DenseImages)
    tasks = tuple(args.tasks or (dataset.tasks_in(root) if dense else dataset.known_tasks))
    print(f"{root}: {name}, {', '.join(tasks) or 'no labels'}")
    num_faults, names = 0, dict[str, dict[Path, str]]()
    for split in args.splits:
        num_samples = 0
        try:
            samples = dataset(root, split, tasks, check=False) if dense else dataset(root, split, tasks)
            num_samples = len(samples)
            names[split] = {samples.image_file(name): name for name in samples.names} if dense else {}
            found = faults(samples, args.workers, split)
        except (ValueError, OSError) as error:  # of the split as a whole
            found = iter([str(error)])
        in_split = 0
        for line in found:
            in_split += 1
            tqdm.write(f"  {line}")
        print(f"{split}: {num_samples} samples, {_count(in_split)}")
        num_faults += in_split
    for warning in overlaps(names):
        print(f"warning: {warning}")
    return FAULTY if num_faults else 0


def guess(root: Path) -> str:
    """The data set whose layout a folder has.

    Raises:
        ValueError: none of them.
    """
    for name, mark in MARKS.items():
        if (root / mark).is_dir():
            return name
    raise ValueError(f"{root} has none of {', '.join(MARKS.values())}: say what it is with --dataset")


def faults(samples: Any, workers: int, title: str) -> Iterator[str]:
    """What is wrong, a line each, in the order of the samples; a progress bar on stderr.

    A file that kills its reader (a damaged MATLAB file can, in scipy) is a fault like others, unless ``workers`` is 0.
    """
    seen: set[str] = set()
    with tqdm(total=len(samples), desc=title, unit="sample", leave=False) as bar:
        for lines in _all_faults(samples, workers):
            bar.update()
            new = [line for line in lines if line not in seen]  # one file may serve two tasks
            seen.update(new)
            yield from new


def _all_faults(samples: Any, workers: int) -> Iterator[list[str]]:
    if workers == 0 or len(samples) < 2:
        yield from (faults_of(samples, index) for index in range(len(samples)))
        return
    done = 0
    while done < len(samples):
        size = max(1, min(16, (len(samples) - done) // (4 * workers)))
        try:
            with ProcessPoolExecutor(workers, initializer=_keep, initargs=(samples,)) as pool:
                for lines in pool.map(_faults_of_kept, range(done, len(samples)), chunksize=size):
                    yield lines
                    done += 1
        except BrokenProcessPool:  # some process is gone, and took others' results along: the next sample by itself
            yield _alone(samples, done)
            done += 1


def _alone(samples: Any, index: int) -> list[str]:
    try:
        with ProcessPoolExecutor(1, initializer=_keep, initargs=(samples,)) as pool:
            return pool.submit(_faults_of_kept, index).result()
    except BrokenProcessPool:
        names = getattr(samples, "names", None)
        return [
            f"{samples.root}: reading {names[index] if names else f'sample {index}'} ended the process: damaged file?"
        ]


_kept: Any = None


def _keep(samples: Any) -> None:
    """In a worker: the samples, sent once."""
    global _kept
    _kept = samples


def _faults_of_kept(index: int) -> list[str]:
    return faults_of(_kept, index)


def faults_of(samples: Any, index: int) -> list[str]:
    """What is wrong with the files of one sample."""
    if isinstance(samples, DenseImages):
        return samples.faults(index)
    try:
        samples[index]
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def overlaps(names: Mapping[str, Mapping[Path, str]]) -> Iterator[str]:
    """Samples that two splits share: scores on them would flatter. ``names[split][image file]``: where each split has
    a folder of its own, equal names are different samples."""
    splits = list(names)
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            if both := [name for file, name in names[first].items() if file in names[second]]:
                yield f"{len(both)} samples are in {first} and in {second}: {', '.join(sorted(both)[:5])}"


def _count(number: int) -> str:
    return {0: "nothing wrong", 1: "1 fault"}.get(number, f"{number} faults")
