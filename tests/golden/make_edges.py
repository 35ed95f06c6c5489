"""Make ``edges.npz``: generated pictures, and their pixel counts by the C++ code of the Berkeley benchmark.

python tests/golden/make_edges.py    (needs pip install 'm3bsr[bsds]'; half a minute)

``probability [3, H, W]`` uint8 (255 p); ``annotations [3, A, H, W]`` packed bits; ``counts_1``, ``counts_3``
``[runs, 3 images, 4, 99]``: against the first annotator and against all; the code differs from run to run.
"""

from pathlib import Path

import numpy as np

from m3bsr.cli.score_edges import picture
from m3bsr.metrics.bsds import bsds_counts

SIZE, ANNOTATORS, MAX_DIST, RUNS = (120, 160), 3, 0.0125, 3
THRESHOLDS = np.arange(1, 100) / 100


def main() -> None:
    pairs = [picture(ANNOTATORS, seed, SIZE) for seed in range(3)]
    stored = [np.floor(255 * probability).astype(np.uint8) for probability, _ in pairs]
    counts = {
        f"counts_{people}": np.array(
            [
                [
                    bsds_counts(p / 255, drawn[:people], THRESHOLDS, MAX_DIST)
                    for p, (_, drawn) in zip(stored, pairs, strict=True)
                ]
                for _ in range(RUNS)
            ],
            dtype=np.int32,
        )
        for people in (1, ANNOTATORS)
    }
    np.savez_compressed(
        Path(__file__).with_name("edges.npz"),
        probability=np.stack(stored),
        annotations=np.packbits(np.stack([drawn for _, drawn in pairs]), axis=-1),
        max_dist=MAX_DIST,
        **counts,
    )


if __name__ == "__main__":
    main()
