#!/usr/bin/env python3
"""Unpack PASCAL_MT.tgz, the packaging of ASTMT, check every file of it, and put it where the loader looks.

    python datasets/pascal/prepare.py --archive PASCAL_MT.tgz

Where to get the archive stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from m3bsr.cli.common import one_line_errors
from m3bsr.cli.prepare import check_and_place, file_hash, is_done, unpack_once, work_folder
from m3bsr.data import PascalContext
from m3bsr.data.files import dataset_path

VERSION = 1  # raise it when the same archive begins to give another folder
PUBLISHED = (4998, 5105)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 if the archive is not what it should be."""
    parser = argparse.ArgumentParser(prog="prepare.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--archive", type=Path, required=True, help="PASCAL_MT.tgz (or any tar or zip of that folder)")
    parser.add_argument("--out", type=Path, default=Path("datasets/pascal/PASCAL_MT"), help="folder to make")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that check files")
    parser.add_argument("--force", action="store_true", help="replace a folder that this script made before")
    parser.add_argument("--allow-faults", action="store_true", help="put it in place although files are faulty")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not args.archive.is_file():
        raise FileNotFoundError(f"no such archive: {args.archive}; datasets/pascal/README.md says where to get it")
    out = dataset_path(args.out).resolve()  # a link to another disk stays a link
    source = {"archive_sha256": file_hash(args.archive, "sha256", quiet=False)}
    manifest = {"made_by": "datasets/pascal/prepare.py", "version": VERSION, "arguments": source}
    if is_done(out, manifest, args.force):
        print(f"{out} is there already")
        return 0
    work = work_folder(out, manifest)
    root = unpack_once(args.archive, work, "JPEGImages", "ImageSets/Context")
    check_and_place(root, work, out, ["--dataset", "pascal", "--workers", str(args.workers)], args.allow_faults)
    tasks = PascalContext.tasks_in(out)
    sizes = tuple(len(PascalContext(out, split, tasks, check=False)) for split in ("train", "val"))
    note = "" if sizes == PUBLISHED else "; the published set has {} and {}".format(*PUBLISHED)
    print(f"{out}: {sizes[0]} train, {sizes[1]} val pictures{note}; tasks: {', '.join(tasks)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
