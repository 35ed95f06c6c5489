"""The tasks by name. A new task is one file with a :class:`Task` and one line in ``TASKS``."""

from __future__ import annotations

from m3bsr.tasks.base import Task
from m3bsr.tasks.classification import Classification
from m3bsr.tasks.depth import Depth
from m3bsr.tasks.edge import Edge
from m3bsr.tasks.human_parts import HumanParts
from m3bsr.tasks.normals import Normals
from m3bsr.tasks.saliency import Saliency
from m3bsr.tasks.semseg import SemSeg

TASKS: dict[str, type[Task]] = {
    "semseg": SemSeg,
    "depth": Depth,
    "normals": Normals,
    "edge": Edge,
    "saliency": Saliency,
    "human_parts": HumanParts,
    "classification": Classification,
}

__all__ = ["TASKS", "Task"]
