"""What the preparation scripts in ``datasets/`` share: a data set is there whole or not at all.

It grows in ``OUT.partial``, where a run that was stopped goes on, is read there by the check of
``tools/check_data.py``, and is renamed to ``OUT`` at the end. Its ``manifest.json`` says what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m3bsr.cli import check_data
from m3bsr.data.archives import unpack

MANIFEST = "manifest.json"
SET = "set"


def file_hash(path: Path, algorithm: str, quiet: bool) -> str:
    """Hash of a file in hex, with a progress bar unless ``quiet``."""
    digest = hashlib.new(algorithm)
    with (
        open(path, "rb") as file,
        tqdm(
            total=path.stat().st_size, unit="B", unit_scale=True, desc=f"{algorithm} of {path.name}", disable=quiet
        ) as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def is_done(out: Path, manifest: dict[str, Any], force: bool) -> bool:
    """True if ``out`` holds exactly this set.

    Raises:
        ValueError: it holds something that may not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    there = _manifest_of(out)
    if there.get("made_by") != manifest["made_by"]:
        raise ValueError(f"--out {out} is not empty and was not made by prepare.py: choose another folder")
    same = _same(there, manifest)
    if not same and not force:
        raise ValueError(f"--out {out} was made from other files or settings: add --force to replace it")
    return same and not force


def work_folder(out: Path, manifest: dict[str, Any]) -> Path:
    """``OUT.partial``: with what an earlier run of the same manifest left there, or empty.

    Raises:
        ValueError: there is such a folder, and no script made it.
    """
    work = out.with_name(f"{out.name}.partial")
    if work.exists():
        there = _manifest_of(work)
        if _same(there, manifest):
            return work
        if there.get("made_by") != manifest["made_by"]:
            raise ValueError(f"{work} is in the way and was not made by prepare.py: move it")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return work


def unpack_once(archive: Path, work: Path, *marks: str) -> Path:
    """Unpack into the work folder unless an earlier run did; returns the folder inside that has all of ``marks``.

    Raises:
        FileNotFoundError, ValueError: see :func:`m3bsr.data.archives.unpack`; no folder has them.
    """
    folder, unfinished = work / SET, work / "unpacking"
    if not folder.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        unpack(archive, unfinished, progress=True)
        unfinished.rename(folder)
    for candidate in (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))):
        if all((candidate / mark).is_dir() for mark in marks):
            return candidate
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise ValueError(f"{archive} has no folder with {' and '.join(marks)}; it holds {found}")


def check_and_place(root: Path, work: Path, out: Path, check: list[str], allow_faults: bool) -> None:
    """Read all of ``root``, which lies in ``work``, with ``tools/check_data.py``; then make it ``out``.

    Raises:
        ValueError: faulty files; they are printed, and nothing is placed unless ``allow_faults``.
    """
    status = check_data.main([str(root.absolute()), *check])
    if status not in (0, check_data.FAULTY) or (status == check_data.FAULTY and not allow_faults):
        raise ValueError(
            f"faulty files, listed above; {root} stays as it is, and {out} was not made: mend the source and run this "
            "again, or accept the faults with --allow-faults"
        )
    shutil.copy(work / MANIFEST, root / MANIFEST)
    put_in_place(root, out)
    shutil.rmtree(work)


def put_in_place(temporary: Path, out: Path) -> None:
    """Rename; what lies there goes only when the new set is in its place."""
    old = out.with_name(f"{out.name}.old.tmp")
    if out.exists():
        if old.exists():  # a run was ended after its set was in place
            shutil.rmtree(old)
        out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)


def _manifest_of(folder: Path) -> dict[str, Any]:
    """What made a folder, or nothing."""
    try:
        there = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return there if isinstance(there, dict) else {}


def _same(there: dict[str, Any], manifest: dict[str, Any]) -> bool:
    return all(there.get(key) == manifest[key] for key in ("made_by", "version", "arguments"))
