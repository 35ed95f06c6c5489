"""Unpacking archives from elsewhere: everything is looked at before anything is written."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tqdm import tqdm

from m3bsr.utils.foreign import check_growth, one_line


def unpack(archive: str | Path, folder: str | Path, progress: bool = False) -> None:
    """Unpack a tar file (compressed or not) or zip file into ``folder``; ``progress`` shows a bar.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such archive or a damaged one; a member outside ``folder``, a link, a device; a bomb; more than
            the disk has room for. Nothing is written then.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise FileNotFoundError(f"no such archive: {archive}")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                _check(_zip_members(packed), archive, folder)
                packed.extractall(folder, members=_shown(packed.infolist(), progress))
        else:
            with tarfile.open(archive) as packed_tar:
                _check(_tar_members(packed_tar), archive, folder)
                packed_tar.extractall(folder, members=_shown(packed_tar.getmembers(), progress), filter="data")
    except Exception as error:  # of tarfile, zipfile, zlib, lzma, struct, the system ...
        if isinstance(error, ValueError) and str(error).startswith(str(archive)):
            raise
        raise ValueError(f"cannot unpack {archive}: {one_line(error)}") from None


def _shown(members: list[Any], progress: bool) -> Any:
    return tqdm(members, desc="unpack", unit="file", leave=False, disable=not progress)


Member = tuple[str, int, bool]
"""Name, size in bytes, and whether it is a plain file or folder."""


def _zip_members(packed: zipfile.ZipFile) -> Iterator[Member]:
    for member in packed.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        yield member.filename, member.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR)


def _tar_members(packed: tarfile.TarFile) -> Iterator[Member]:
    for member in packed:
        yield member.name, member.size, member.isreg() or member.isdir()


def _check(members: Iterator[Member], archive: Path, folder: Path) -> None:
    size = archive.stat().st_size
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free, total = shutil.disk_usage(there).free, 0
    for name, num_bytes, plain in members:
        parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
        if os.path.isabs(name) or PureWindowsPath(name).anchor or ".." in parts or "\0" in name:
            raise ValueError(f"{archive}: {name!r} would be written outside {folder}: nothing was unpacked")
        if not plain:
            raise ValueError(f"{archive}: {name!r} is a link or a device: nothing was unpacked")
        total += num_bytes
        check_growth(size, total, str(archive))
        if total > free:
            raise ValueError(f"{archive}: needs more than the {free:,} bytes free in {there}: nothing was unpacked")
