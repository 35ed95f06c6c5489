#!/usr/bin/env python3
"""Download a classification benchmark through torchvision, which checks the archives' MD5 sums.

python datasets/classification/prepare.py cifar10 pets --root datasets/classification/data
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torchvision.datasets.utils

from m3bsr.cli.common import one_line_errors
from m3bsr.data import DATASETS
from m3bsr.data.archives import unpack
from m3bsr.data.files import dataset_path
from m3bsr.data.torchvision_sets import TorchvisionImages

SETS = {
    name: kind for name, kind in DATASETS.items() if issubclass(kind, TorchvisionImages) and name != "cars"
}  # Stanford Cars can no longer be downloaded


def _unpack(from_path: str, to_path: str | None = None, remove_finished: bool = False) -> str:
    folder = to_path or str(Path(from_path).parent)
    unpack(from_path, folder)
    return folder


# torchvision follows any path in an archive, and not every benchmark has a checksum.
torchvision.datasets.utils.extract_archive = _unpack


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 when something could not be downloaded."""
    parser = argparse.ArgumentParser(prog="prepare.py", description="Download classification benchmarks.")
    parser.add_argument("names", nargs="+", choices=SETS, metavar="NAME", help=", ".join(SETS))
    parser.add_argument("--root", type=Path, default=Path("datasets/classification/data"))
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    root = dataset_path(args.root)
    root.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        download(SETS[name], root)
        sizes = {split: len(SETS[name](root, split)) for split in ("train", "val", "test")}
        print(f"{name}: " + ", ".join(f"{number} {split}" for split, number in sizes.items()) + f" images in {root}")
    return 0


def download(kind: type[TorchvisionImages], root: Path) -> None:
    """Fetch every split; what is there already is not fetched again.

    Raises:
        OSError: no connection, or an archive that is not what it should be.
    """
    for arguments in kind.arguments.values():
        try:
            kind.reader(root, download=True, **arguments)
        except RuntimeError as error:
            raise OSError(f"{kind.__name__}: {error}; run the command again, finished archives are kept") from None


if __name__ == "__main__":
    sys.exit(main())
