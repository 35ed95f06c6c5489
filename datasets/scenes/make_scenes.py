#!/usr/bin/env python3
"""Make a data set of ray-cast pictures with exact labels, in the layout of NYUD_MT or PASCAL_MT.

    python datasets/scenes/make_scenes.py --out DIR --train 200 --val 50 --domain source --size 120x160 --seed 0

Picture number i of a split depends on seed, domain, layout, size and i only: not on how many are made, nor on the
number of workers. See README.md beside this file for the layout and the axes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

if str(Path(__file__).resolve().parent) not in sys.path:  # when a test loads this file by its path
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from scene_figures import render_figures
from scene_layouts import LAYOUTS
from scene_rooms import DOMAINS, render_scene
from scene_work import Job, make_one

__all__ = ["main", "make_scenes", "render_figures", "render_scene"]

VERSION = 1  # raise it when the same arguments begin to give other files
VAL_OFFSET = 1_000_000_000  # validation pictures are numbered from here, so neither split depends on the other's size
MANIFEST = "manifest.json"


def parse_size(text: str) -> tuple[int, int]:
    """`HxW` as a pair; both from 16 to 4096."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(16 <= int(side) <= 4096 for side in match.groups()):
        raise ValueError(f"--size {text!r}: write height x width, both from 16 to 4096, such as 120x160")
    return int(match[1]), int(match[2])


def read_manifest(out: Path) -> dict | None:
    """The arguments that a folder was made with; None where there is no readable manifest."""
    try:
        return json.loads((out / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def is_done(out: Path, manifest: dict, force: bool) -> bool:
    """True if `out` already holds exactly this set; an error if it holds something else that may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    there = read_manifest(out)
    if there == manifest and not force:
        return True
    if there is None:
        raise ValueError(f"--out {out} is not empty and was not made by make_scenes.py: choose another folder")
    if not force:
        wanted = manifest["arguments"]
        other = [k for k, v in wanted.items() if there.get("arguments", {}).get(k) != v] or ["version"]
        raise ValueError(f"--out {out} holds scenes made with another {', '.join(other)}: add --force to replace them")
    return False


def _results(jobs: list[Job], root: Path, workers: int) -> Iterator[tuple[str, dict | None]]:
    work = partial(make_one, str(root))
    if workers <= 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(work, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))


def _fill(root: Path, jobs: list[Job], layout_name: str, workers: int, quiet: bool) -> None:
    """Render and write everything below `root`, with a progress bar."""
    from tqdm import tqdm

    layout = LAYOUTS[layout_name]
    for folder in layout.folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    facts = {}
    bar = tqdm(_results(jobs, root, workers), total=len(jobs), unit="img", desc="scenes", disable=quiet)
    for name, fact in bar:
        facts[name] = fact or {}
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for job in jobs:
        splits[job.split].append(job.name)
    layout.finish(root, splits, facts)


def make_scenes(
    out: str | Path,
    train: int = 200,
    val: int = 50,
    domain: str = "source",
    size: tuple[int, int] = (120, 160),
    seed: int = 0,
    layout: str = "NYUD_MT",
    workers: int = 1,
    force: bool = False,
    quiet: bool = False,
) -> float:
    """Write a data set into `out`, whole or not at all (it grows in `out`.tmp and is renamed at the end).

    Returns the pictures made per second, 0 if `out` held the same set already. Raises ValueError for a bad argument
    and for an `out` that holds anything else (`force` replaces a set that this function made, nothing more).
    """
    if domain not in DOMAINS or layout not in LAYOUTS:
        raise ValueError(f"domain {domain!r}, layout {layout!r}: known are {DOMAINS} and {tuple(LAYOUTS)}")
    if min(train, val, seed) < 0 or train + val == 0:
        raise ValueError(f"train {train}, val {val}, seed {seed}: none may be negative, one picture is the least")
    out = Path(out).expanduser().absolute()
    arguments = {"train": train, "val": val, "domain": domain, "size": list(size), "seed": seed, "layout": layout}
    manifest = {"made_by": "make_scenes.py", "version": VERSION, "arguments": arguments}
    if is_done(out, manifest, force):
        return 0.0
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    counts = {"train": (train, 0), "val": (val, VAL_OFFSET)}
    jobs = [
        Job(layout, seed, domain, offset + i, (size[0], size[1]), split, f"{domain}_{split}_{i:05d}")
        for split, (count, offset) in counts.items()
        for i in range(count)
    ]
    start = time.perf_counter()
    try:
        _fill(temporary, jobs, layout, workers, quiet)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return len(jobs) / (time.perf_counter() - start)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder to make")
    parser.add_argument("--train", type=int, default=200, help="number of training pictures")
    parser.add_argument("--val", type=int, default=50, help="number of validation pictures")
    parser.add_argument("--domain", choices=DOMAINS, default="source")
    parser.add_argument("--size", default="120x160", help="height x width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="NYUD_MT")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--force", action="store_true", help="replace a set that this script made before")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--benchmark", action="store_true", help="measure pictures a second on one core, write nothing")
    return parser


def benchmark(domain: str, layout: str, size: tuple[int, int], seed: int, count: int = 60) -> tuple[float, float]:
    """Pictures a second on one core, rendered and written to a folder that is removed afterwards: by the clock, and by
    the processor time used, which other programs on the machine disturb less."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make_scenes(Path(folder) / "warm", 2, 0, domain, size, seed, layout, quiet=True)
        start = time.process_time()
        rate = make_scenes(Path(folder) / "set", count, 0, domain, size, seed, layout, quiet=True)
        return rate, count / (time.process_time() - start)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        size = parse_size(args.size)
        if args.benchmark:
            rate, busy = benchmark(args.domain, args.layout, size, args.seed)
            what = f"{args.layout}, {args.domain}, {args.size}"
            print(f"{rate:.1f} pictures a second on one core, {busy:.1f} a second of processor time ({what})")
            return 0
        if args.out is None:
            raise ValueError("--out is missing: name the folder to make")
        options = (args.train, args.val, args.domain, size, args.seed, args.layout, args.workers, args.force)
        rate = make_scenes(args.out, *options, quiet=args.quiet)
    except (ValueError, OSError) as error:
        print(f"make_scenes.py: error: {error}", file=sys.stderr)
        return 2
    total = f"{args.train} + {args.val} pictures ({args.layout}, {args.domain}, {args.size})"
    if rate == 0.0:
        print(f"{args.out} already holds these {total}: nothing to do")
    else:
        print(f"{args.out}: {total}, {rate:.1f} a second with {args.workers} worker(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
