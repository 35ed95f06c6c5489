"""The allocator helper, in a process of its own: it cannot be switched off again."""

from __future__ import annotations

import platform
import subprocess
import sys

from m3bsr.utils import malloc

# Run by path: importing the package would import much more than the helper needs.
SCRIPT = """
import resource, runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size  # 48 MB: over glibc's largest mmap threshold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
size = 48_000_000
mapped = min(faults() for _ in range(3))
applied = keep_freed_memory()
faults()
print(mapped, applied, min(faults() for _ in range(3)))
"""


def test_large_blocks_are_not_mapped_again() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, malloc.__file__], capture_output=True, text=True, check=True)
    mapped, applied, kept = done.stdout.split()
    if platform.libc_ver()[0] == "glibc":
        assert applied == "True" and int(mapped) > 1000 and int(kept) < 100
    else:
        assert applied == "False"


def test_other_systems_are_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(malloc.platform, "system", lambda: "Darwin")
    assert malloc.keep_freed_memory() is False
