"""A tiny run that ends itself by a signal at steps 2 and 5, each once; started anew it goes on. For test_restarts.py.

python tests/engine/restarted_run.py FOLDER SIGNAL SIGNAL
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import tiny_run

from m3bsr.engine.rng import seed_everything


def main(folder: Path, signals: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(0)
    parts = tiny_run.make_parts()

    def on_step(step: int) -> None:
        for at, name in zip((2, 5), signals, strict=True):
            done = folder / f"died-at-{at}"
            if step == at and not done.exists():
                done.touch()
                os.kill(os.getpid(), getattr(signal, name))

    parts[0].on_step = on_step
    _, result = tiny_run.run(folder, parts=parts, resume=True, save_every=1)
    return 128 + result.stopped_by if result.stopped_by else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
