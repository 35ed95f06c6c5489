"""The bench of the allocator setting: large blocks fault when they are returned, and not when they are kept."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from m3bsr.cli import bench_malloc

TOOL = Path(bench_malloc.__file__).parents[2] / "tools" / "bench_malloc.py"


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_kept_memory_is_not_mapped_again():
    # In a process of its own: the setting would stay. 6000 x 1536 floats are 37 MB, above the 32 MB of the trap.
    command = [sys.executable, str(TOOL), "--tokens", "6000", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {line[:12].strip(): line[12:].split() for line in done.stdout.splitlines()[2:]}
    assert set(rows) == {"dense MLP", "experts"}
    returned, kept = (int(number) for number in rows["dense MLP"][:2])
    assert returned > 1000 and kept < returned / 2


def test_other_systems_are_told(monkeypatch, capsys):
    monkeypatch.setattr(bench_malloc, "keep_freed_memory", lambda: False)
    assert bench_malloc.main([]) == 2
    assert "only the allocator of glibc" in capsys.readouterr().err
