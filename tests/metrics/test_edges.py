"""Edge scores against brute force on small images, and on cases that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import maximum_bipartite_matching
from skimage.morphology import thin

from m3bsr.metrics import thinning
from m3bsr.metrics.edges import EdgeScores, average_precision, best_f, edge_counts, f_measure, precision_recall
from m3bsr.metrics.matching import disc_offsets, max_matching_sizes, min_cost_matching
from m3bsr.metrics.thinning import pack_thresholds, thin_words

THRESHOLDS = np.arange(1, 100) / 100


def logit(probability):
    p = torch.as_tensor(probability, dtype=torch.float64)
    return torch.log(p / (1 - p))


def smooth_noise(shape, seed):
    field = np.random.default_rng(seed).random(shape)
    for axis in (0, 1):
        field = sum(np.roll(field, k, axis) for k in range(-2, 3)) / 5
    return (field - field.min()) / (field.max() - field.min())


@pytest.mark.parametrize("seed", range(3))
def test_thinning_equals_scikit_image_at_every_threshold(seed):
    probability = smooth_noise((37, 45), seed)
    words = [thin_words(word) for word in pack_thresholds(probability, THRESHOLDS)]
    for k, threshold in enumerate(THRESHOLDS):
        mine = (words[k // 64] >> np.uint64(k % 64)) & np.uint64(1)
        assert np.array_equal(mine.astype(bool), thin(probability >= threshold)), threshold


@pytest.mark.parametrize("few", [0, thinning.FEW, 2])
def test_thinning_of_any_pattern_whether_all_words_are_looked_at_or_only_those_listed(few, monkeypatch):
    """Speckle, blobs and large areas; ``few`` moves the point where the one way gives over to the other."""
    monkeypatch.setattr(thinning, "FEW", few)
    rng = np.random.default_rng(0)
    for shape, block in (((23, 31), 1), ((33, 20), 5), ((1, 9), 1), ((8, 2), 1), ((40, 40), 13)):
        share = np.linspace(0.1, 0.95, 12)[:, None, None]
        coarse = rng.random((12, *(-(-side // block) for side in shape))) < share
        planes = np.kron(coarse, np.ones((1, block, block), bool))[:, : shape[0], : shape[1]]
        words = (planes.astype(np.uint64) << np.arange(12, dtype=np.uint64)[:, None, None]).sum(0, dtype=np.uint64)
        found = thin_words(words) >> np.arange(12, dtype=np.uint64)[:, None, None] & np.uint64(1)
        assert np.array_equal(found.astype(bool), np.stack([thin(plane) for plane in planes])), shape


def test_nan_is_below_every_threshold():
    assert pack_thresholds(np.array([[np.nan, 1.0, 0.0]]), THRESHOLDS)[0].tolist() == [[0, 2**64 - 1, 0]]


def random_graph(rng, num_rows, num_columns, density):
    return np.argwhere(rng.random((num_rows, num_columns)) < density)


def test_matching_sizes_of_many_graphs_at_once_equal_scipy():
    rng = np.random.default_rng(0)
    graphs = [random_graph(rng, 30, n, d) for n, d in itertools.product((5, 30, 60), (0.0, 0.02, 0.05, 0.1, 0.4))]
    # A path needs its one augmentation to run along its whole length.
    path = np.array([(i, i + k) for i in range(29) for k in (0, 1)] + [(29, 0)])
    graphs.append(path)
    block = np.concatenate([np.full(len(g), k) for k, g in enumerate(graphs)])
    edges = np.concatenate([g.reshape(-1, 2) + (30 * k, 60 * k) for k, g in enumerate(graphs)])
    sizes = max_matching_sizes(edges[:, 0], edges[:, 1], block, len(graphs))
    for graph, size in zip(graphs, sizes, strict=True):
        matrix = sparse.csr_matrix((np.ones(len(graph)), tuple(graph.T)), shape=(30, 60))
        assert size == (maximum_bipartite_matching(matrix) >= 0).sum()


def brute_force_assignment(predicted, annotated, radius):
    """Minimum-cost assignment with outliers on the full dense matrix; matched flags of predictions and annotations."""
    n, m = len(predicted), len(annotated)
    distance = np.linalg.norm(predicted[:, None] - annotated[None], axis=-1)
    outlier = 100 * radius
    cost = np.full((n + m, n + m), 1e9)
    cost[:n, :m] = np.where(distance <= radius * (1 + 1e-12), distance, 1e9)
    cost[np.arange(n), m + np.arange(n)] = outlier
    cost[n + np.arange(m), np.arange(m)] = outlier
    cost[n:, m:] = 0
    rows, columns = linear_sum_assignment(cost)
    real = (rows < n) & (columns < m)
    return rows[real], columns[real], cost[rows, columns].sum()


@pytest.mark.parametrize("seed", range(6))
def test_counts_against_brute_force(seed):
    shape, max_dist = (20, 26), 0.07
    probability = smooth_noise(shape, seed)
    annotation = thin(smooth_noise(shape, seed + 100) > 0.6)
    thresholds = np.array([0.2, 0.4, 0.6, 0.8])
    counts = edge_counts(probability, annotation[None], thresholds, max_dist)
    radius = max_dist * np.hypot(*shape)
    for k, threshold in enumerate(thresholds):
        predicted = np.argwhere(thin(probability >= threshold))
        rows, _, _ = brute_force_assignment(predicted, np.argwhere(annotation), radius)
        assert counts.predicted[k] == len(predicted) and counts.annotated[k] == annotation.sum()
        assert counts.hit_predicted[k] == counts.hit_annotated[k] == len(rows)


def benchmark_by_brute_force(pairs, thresholds, max_dist):
    """The procedure of the benchmark, image by image, threshold by threshold, annotator by annotator.

    Returns the counts of every image ``[images, 4, T]`` and (ods_f, ois_f, ap) from them.
    """
    counts = np.zeros((len(pairs), 4, len(thresholds)), dtype=np.int64)
    for i, (probability, drawn) in enumerate(pairs):
        radius = max_dist * np.hypot(*probability.shape)
        for k, threshold in enumerate(thresholds):
            predicted = np.argwhere(thin(probability >= threshold))
            hit = np.zeros(len(predicted), dtype=bool)
            for annotation in drawn:
                rows, columns, _ = brute_force_assignment(predicted, np.argwhere(annotation), radius)
                hit[rows] = True
                counts[i, 2:, k] += len(columns), annotation.sum()
            counts[i, :2, k] = hit.sum(), len(predicted)

    def curve(c):
        return c[0] / np.maximum(c[1], 1), c[2] / np.maximum(c[3], 1)

    def f(p, r):
        return 2 * p * r / np.maximum(p + r, 1e-12)

    precision, recall = curve(counts.sum(0))
    ods = max(
        float(f((1 - a) * p0 + a * p1, (1 - a) * r0 + a * r1))
        for p0, p1, r0, r1 in zip(precision, precision[1:], recall, recall[1:], strict=False)
        for a in np.linspace(0, 1, 100)
    )
    ois = float(f(*curve(sum(c[:, f(*curve(c)).argmax()] for c in counts))))
    unique, first = np.unique(recall, return_index=True)
    ap = np.interp(np.arange(101) / 100, unique, precision[first], left=0, right=0).sum() / 100
    return counts, (ods, ois, ap)


@pytest.mark.parametrize("num_annotators", [1, 3])
def test_the_whole_benchmark_against_brute_force(num_annotators):
    """All counts and scores. Of equally cheap assignments any may be taken, so with several annotators the pixels that
    anyone matched may differ by a few."""
    shape, max_dist, num_thresholds = (20, 26), 0.07, 9
    metric, pairs = EdgeScores(max_dist=max_dist, thresholds=num_thresholds), []
    for seed in (0, 1):
        drawn = [thin(smooth_noise(shape, 10 * seed + a + 100) > 0.6) for a in range(num_annotators)]
        pairs.append((smooth_noise(shape, seed), np.stack(drawn)))
        metric.update_probability(pairs[-1][0], pairs[-1][1].astype(float))
    counts, expected = benchmark_by_brute_force(pairs, metric.thresholds, max_dist)
    found = metric.state()
    for name, values in zip(("hit_predicted", "predicted", "hit_annotated", "annotated"), counts.sum(0), strict=True):
        slack = 0.03 * values.max() if name == "hit_predicted" and num_annotators > 1 else 0
        assert np.abs(found[name].numpy() - values).max() <= slack, name
    scores = metric.compute()
    close = 1e-9 if num_annotators == 1 else 0.02
    assert [scores[name] for name in ("ods_f", "ois_f", "ap")] == pytest.approx(expected, abs=close)


@pytest.mark.parametrize("seed", range(4))
def test_min_cost_matching_is_optimal(seed):
    rng = np.random.default_rng(seed)
    points = [np.unique(rng.integers(0, 14, (40, 2)), axis=0) for _ in range(2)]
    radius = 2.3
    distance = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    r, c = np.nonzero(distance <= radius)
    rows, columns = min_cost_matching(r, c, distance[r, c], radius)
    assert len(set(rows)) == len(rows) and len(set(columns)) == len(columns)
    unmatched = len(points[0]) + len(points[1]) - 2 * len(rows)
    total = distance[rows, columns].sum() + 100 * radius * unmatched
    assert total == pytest.approx(brute_force_assignment(*points, radius)[2])


def lines(shape=(41, 51)):
    """Two separate straight lines, which thinning leaves alone."""
    target = np.zeros(shape)
    target[10, 5:45] = 1
    target[30, 5:45] = 1
    return target


def score(probability, target, **kwargs):
    metric = EdgeScores(**{"max_dist": 1.5 / np.hypot(*target.shape[-2:]), **kwargs})
    target = torch.as_tensor(target, dtype=torch.float32)
    metric.update(logit(probability)[None, None], target.view(1, -1, *target.shape[-2:]))
    return metric.compute()


def test_perfect_prediction_scores_one():
    scores = score(lines() * 0.99 + 0.005, lines())
    assert scores["ods_f"] == scores["ois_f"] == 1 and scores["ap"] == pytest.approx(1)


def test_shift_within_and_beyond_the_tolerance():
    assert score(np.roll(lines(), 1, axis=0) * 0.9 + 0.005, lines())["ods_f"] == 1
    assert score(np.roll(lines(), 2, axis=0) * 0.9 + 0.005, lines())["ods_f"] == 0


def test_duplicates_are_matched_once():
    """Three lines near one annotated line: one of them counts, so precision is a third."""
    target = np.zeros((41, 51))
    target[20, 5:45] = 1
    probability = np.full((41, 51), 0.005)
    for row in (18, 20, 22):
        probability[row, 5:45] = 0.9
    scores = score(probability, target, max_dist=3 / np.hypot(41, 51))
    precision, recall = 1 / 3, 1.0
    assert scores["ods_f"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-3)


def test_empty_prediction_scores_zero_and_empty_target_too():
    assert score(np.full((41, 51), 0.001), lines())["ods_f"] == 0
    assert score(lines() * 0.9 + 0.005, np.zeros((41, 51)))["ods_f"] == 0


def test_thick_prediction_is_thinned():
    thick = np.maximum.reduce([np.roll(lines(), k, axis=0) for k in (-1, 0, 1)])
    assert score(thick * 0.9 + 0.005, lines())["ods_f"] > 0.97


def test_ois_picks_a_threshold_for_each_image():
    """One image is right at high thresholds only, the other at low ones only: ods must compromise, ois need not."""
    noisy = np.where(lines() > 0, 0.95, 0.005)
    noisy[20, 5:45] = 0.6
    faint = np.where(lines() > 0, 0.3, 0.005)
    metric = EdgeScores(max_dist=1.5 / np.hypot(41, 51))
    for probability in (noisy, faint):
        metric.update_probability(probability, lines()[None])
    scores = metric.compute()
    assert scores["ois_f"] == 1 and scores["ods_f"] < 0.95
    expected = f_measure(np.array(4 / 5), np.array(1.0))  # low threshold: 160 of 200 predicted are right, all found
    assert scores["ods_f"] == pytest.approx(float(expected), abs=0.01)


def test_several_annotators():
    """Precision counts a pixel that anyone drew; recall counts everything that anyone drew."""
    both = lines()
    first, second = both.copy(), both.copy()
    first[30], second[10] = 0, 0
    missing = np.full_like(both, 255)
    counts = edge_counts(both * 0.9, np.stack([first, second]) > 0, np.array([0.5]), 1.5 / np.hypot(41, 51))
    assert [int(c[0]) for c in counts] == [80, 80, 80, 80]
    counts = edge_counts(first * 0.9, np.stack([first, second, both]) > 0, np.array([0.5]), 1.5 / np.hypot(41, 51))
    assert [int(c[0]) for c in counts] == [40, 40, 80, 160]
    assert score(both * 0.9 + 0.005, np.stack([first, second, missing]))["ods_f"] == 1


def test_invalid_region_takes_no_part():
    target, probability = lines(), lines() * 0.9 + 0.005
    probability[36:, 5:45] = 0.95
    assert score(probability, target)["ods_f"] < 1
    target[34:] = 255
    assert score(probability, target)["ods_f"] == 1


def test_thin_target_undoes_nearest_enlargement():
    target = np.kron(lines(), np.ones((2, 2)))
    probability = np.where(target > 0, 0.9, 0.005)
    assert score(probability, target)["ods_f"] < 0.8
    assert score(probability, target, thin_target=True)["ods_f"] == 1


def test_curve_formulas():
    precision, recall = np.array([0.5, 1.0]), np.array([1.0, 0.5])
    # Halfway between the two thresholds precision = recall = .75, better than either end (2/3).
    assert best_f(precision, recall) == pytest.approx(0.75, abs=1e-4)
    assert average_precision(precision, recall) == pytest.approx(sum(1.5 - r for r in np.arange(50, 101) / 100) / 100)
    assert average_precision(np.ones(5), np.ones(5)) == 1
    empty = precision_recall(np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2))
    assert best_f(*empty) == 0 and (f_measure(*empty) == 0).all()


def test_disc_includes_its_rim():
    assert len(disc_offsets(1.0)) == 5 and len(disc_offsets(0.0)) == 1
    assert len(disc_offsets(np.sqrt(2.0))) == 9
    assert (np.diff((disc_offsets(4.3) ** 2).sum(1)) >= 0).all()


def test_wrong_shapes_and_arguments():
    with pytest.raises(ValueError, match=r"expected logits \[B, 1, H, W\]"):
        EdgeScores().update(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"expected logits \[B, 1, H, W\]"):
        EdgeScores().update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="an image without an annotator"):
        EdgeScores().update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 0, 4, 4))
    with pytest.raises(ValueError, match="at least one threshold"):
        EdgeScores(thresholds=0)
    with pytest.raises(ValueError, match="max_dist"):
        EdgeScores(max_dist=-1)
