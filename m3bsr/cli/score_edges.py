"""``tools/score_edges.py PREDICTIONS TRUTH``: odsF, oisF and AP of saved pictures, as the Berkeley benchmark."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from skimage.filters import gaussian
from skimage.morphology import thin
from tqdm import tqdm

from m3bsr.cli.common import metrics_table, one_line_errors, write_json
from m3bsr.data.boundaries import read_boundaries, truth_files
from m3bsr.engine.predictions import check_brightest, read_saved
from m3bsr.metrics.bsds import bsds_counts
from m3bsr.metrics.edges import edge_counts
from m3bsr.metrics.thinning import pack_thresholds, thin_words
from m3bsr.tasks.edge import Edge
from m3bsr.tasks.scoring import Scorer

BSDS_SIZE = (321, 481)
MAX_FAULTS = 20


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores, write them to ``PREDICTIONS/edge-scores.json``; exit code 0, or 2 for faulty files."""
    parser = argparse.ArgumentParser(
        prog="tools/score_edges.py",
        description="Boundary scores of pictures PREDICTIONS/{name}.png (255 p) against one annotator or several.",
    )
    parser.add_argument("predictions", type=Path, nargs="?")
    parser.add_argument(
        "truth", type=Path, nargs="?", help="{name}.png|npy, {annotator}/{name}.png|npy, or {name}.mat of BSDS"
    )
    parser.add_argument("--max-dist", type=float, default=0.0075, help="of the diagonal; .0075 BSDS, PASCAL; .011 NYUD")
    parser.add_argument("--thresholds", type=int, default=99)
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--bsds", action="store_true", help="score by the benchmark's own C++ code, too (slow; m3bsr[bsds])"
    )
    parser.add_argument("--bench", action="store_true", help="print the speed on generated pictures of 321x481 instead")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.bench:
        for annotators in (1, 5):
            print(speed(annotators, args.thresholds, with_bsds=args.bsds))
        return 0
    if args.predictions is None or args.truth is None:
        raise ValueError("give the folder of predictions and that of annotations, or --bench")
    if not args.predictions.is_dir():
        raise FileNotFoundError(f"no such folder of predictions: {args.predictions}")
    report, faults = score(
        args.predictions, args.truth, args.max_dist, args.thresholds, args.num_workers, with_bsds=args.bsds
    )
    for fault in faults[:MAX_FAULTS]:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        raise ValueError(f"{len(faults)} images cannot be scored; the first are above")
    write_json(args.out or args.predictions / "edge-scores.json", report)
    print(f"{report['num_images']} images, {report['num_annotations']} annotations")
    protocol = f"max_dist {args.max_dist:g}, {args.thresholds} thresholds"
    print(metrics_table({"edge": report["metrics"]}, protocol))
    if args.bsds:
        differences = {name: report["metrics"][name] - value for name, value in report["metrics_bsds"].items()}
        print(metrics_table({"benchmark's code": report["metrics_bsds"]}, protocol))
        print(metrics_table({"difference": differences}, protocol))
    return 0


def score(
    predictions: Path,
    truth: Path,
    max_dist: float,
    thresholds: int = 99,
    num_workers: int = 0,
    progress: bool = True,
    with_bsds: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Scores of all images that are annotated (``with_bsds``: also by the benchmark's code), and a line for each fault.

    Raises:
        FileNotFoundError, ValueError: no annotations at all, wrong settings, pyEdgeEval is not installed.
    """
    counters = {"metrics": edge_counts} | ({"metrics_bsds": bsds_counts} if with_bsds else {})
    tasks = {key: Edge(max_dist=max_dist, thresholds=thresholds, counter=counter) for key, counter in counters.items()}
    metrics = {key: task.metric() for key, task in tasks.items()}
    faults, num, brightest = [], 0, 0
    files = truth_files(truth)
    with Scorer(num_workers) as scorer:
        for name, paths in tqdm(files.items(), desc="score", unit="image", leave=False, disable=not progress):
            path = predictions / f"{name}.png"
            try:
                target, saved = read_boundaries(paths), read_saved(tasks["metrics"], path)
                if saved.shape[-2:] != target.shape[-2:]:
                    sizes = ["{}x{}".format(*x.shape[-2:]) for x in (saved, target)]
                    raise ValueError(f"{path} is {sizes[0]} pixels, its annotation {sizes[1]}")
            except (ValueError, OSError) as error:
                faults.append(str(error))
                continue
            num += len(target)
            brightest = max(brightest, int(saved.max()))
            for key, task in tasks.items():
                scorer.add(task, metrics[key], saved[None], target[None], saved=True)
        scorer.finish()
    check_brightest(brightest, predictions)
    about = {"predictions": str(predictions), "truth": str(truth), "max_dist": max_dist, "thresholds": thresholds}
    scores = {key: metric.compute() for key, metric in metrics.items()}
    return {**about, "num_images": len(files), "num_annotations": num, **scores}, faults


def speed(annotators: int, thresholds: int, num_images: int = 2, with_bsds: bool = False) -> str:
    """A line with images a second of processor time, what they are spent on, and that of the benchmark's code."""
    levels = np.arange(1, thresholds + 1) / (thresholds + 1)
    times = []
    if with_bsds:
        bsds_counts(*picture(annotators, 0), levels[-1:], 0.0075)  # compiled code loads
    for seed in range(num_images):
        probability, annotations = picture(annotators, seed)
        began = time.process_time()
        for words in pack_thresholds(probability, levels):
            thin_words(words)
        thinned = time.process_time()
        edge_counts(probability, annotations, levels, 0.0075)
        counted = time.process_time()
        if with_bsds:
            bsds_counts(probability, annotations, levels, 0.0075)
        times.append((thinned - began, counted - thinned, time.process_time() - counted))
    thinning, whole, bsds = (sum(column) / num_images for column in zip(*times, strict=True))
    people, size = f"{annotators} annotator{'s' if annotators > 1 else ''}", "{}x{}".format(*BSDS_SIZE)
    return (
        f"{people}, {thresholds} thresholds, {size}: "
        f"{1 / whole:.2f} images a second and core; thinning {100 * thinning / whole:.0f} %, the rest is matching"
        + (f"; the benchmark's code takes {bsds / whole:.0f} times as long" if with_bsds else "")
    )


def picture(annotators: int, seed: int, size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A blurred, noisy probability ``[H, W]`` and annotations ``[A, H, W]`` of 20 regions, some 2,500 pixels each."""
    rng = np.random.default_rng(seed)
    height, width = size = size or BSDS_SIZE
    points = rng.random((20, 2)) * size
    y, x = np.mgrid[:height, :width]
    region = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    edge = np.zeros(size, bool)
    edge[:, :-1] |= region[:, :-1] != region[:, 1:]
    edge[:-1] |= region[:-1] != region[1:]
    drawn = np.stack([np.roll(thin(edge), tuple(shift), (0, 1)) for shift in rng.integers(-2, 3, (annotators, 2))])
    soft, noise = gaussian(edge.astype(float), 2), gaussian(rng.random(size), 2)
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return np.clip(0.7 * soft / soft.max() + 0.5 * noise**2, 0, 1), drawn
