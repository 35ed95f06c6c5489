"""The work on one picture, in a module of its own so that worker processes can import it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scene_layouts import LAYOUTS


@dataclass(frozen=True)
class Job:
    """One picture to make; `index` numbers the scene, `name` the files."""

    layout: str
    seed: int
    domain: str
    index: int
    size: tuple[int, int]
    split: str
    name: str


def make_one(root: str, job: Job) -> tuple[str, dict | None]:
    """Render and write one picture; returns its name and what the layout wants to remember of it."""
    layout = LAYOUTS[job.layout]
    sample = layout.render(job.seed, job.domain, job.index, *job.size)
    return job.name, layout.write(Path(root), job.name, sample)
