"""One-to-one matching of predicted and true boundary pixels within a distance.

The boundary benchmark (Martin, Fowlkes and Malik 2004; BSDS500) corresponds two boundary maps by a minimum-cost
assignment: a pair no further apart than ``max_dist`` costs its distance, an unmatched pixel costs 100 times
``max_dist``. Leaving a pixel out is thus so dear that the optimum matches as many pixels as can be matched (only an
alternating path of more than a hundred pixels could tip the balance), and the number of matched pixels, all that one
annotation needs, is the size of a maximum matching: :func:`max_matching_sizes`, for many thresholds at once.
:func:`min_cost_matching` solves the assignment itself, which decides *which* pixels are matched when several
annotations share a prediction.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

OUTLIER_COST = 100.0
"""Cost of an unmatched pixel in units of the distance limit, as in the benchmark."""


def disc_offsets(radius: float) -> np.ndarray:
    """``[K, 2]`` integer (dy, dx) with ``dy^2 + dx^2 <= radius^2``, nearest first."""
    reach = int(radius)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    # The slack keeps a distance that equals the radius but for rounding.
    inside = dy**2 + dx**2 <= radius**2 * (1 + 1e-12)
    offsets = np.stack([dy[inside], dx[inside]], axis=1)
    return offsets[np.argsort((offsets**2).sum(axis=1), kind="stable")]


def max_matching_sizes(rows: np.ndarray, columns: np.ndarray, blocks: np.ndarray, num_blocks: int) -> np.ndarray:
    """Sizes ``[num_blocks]`` of maximum matchings of separate bipartite graphs given as one list of edges.

    Edge ``i`` joins ``rows[i]`` and ``columns[i]`` and belongs to graph ``blocks[i]``; vertex numbers are unique over
    all graphs, and edges come sorted by row. A greedy matching is augmented along alternating paths, found by
    breadth-first search from all free rows at once. The search trees do not overlap, so one path of each tree can be
    flipped (Azad, Buluc and Pothen 2017); when a graph gains nothing in a round its matching is maximum.
    SciPy's ``maximum_bipartite_matching`` gives the same sizes but takes up to a hundred times longer on such graphs.
    """
    sizes = np.zeros(num_blocks, dtype=np.int64)
    if len(rows) == 0:
        return sizes
    num_rows, num_columns = int(rows[-1]) + 1, int(columns.max()) + 1
    graph = _Graph(rows, columns, np.bincount(rows, minlength=num_rows))
    block_of_row = np.zeros(num_rows, dtype=np.int64)
    block_of_row[rows] = blocks
    row_mate, column_mate = _greedy(rows, columns, num_rows, num_columns)
    parent = np.full(num_columns, -1)
    free = np.flatnonzero((row_mate < 0) & (graph.degree > 0))
    while len(free):
        ends, seen = _search(free, graph, column_mate, parent)
        gained = np.zeros(num_blocks, dtype=bool)
        gained[block_of_row[parent[ends]]] = True
        _flip(ends, parent, row_mate, column_mate)
        parent[seen] = -1
        free = free[(row_mate[free] < 0) & gained[block_of_row[free]]]
    return np.bincount(block_of_row[row_mate >= 0], minlength=num_blocks)


class _Graph:
    """Edges sorted by row, and where those of each row are."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray, degree: np.ndarray) -> None:
        self.rows, self.columns, self.degree = rows, columns, degree
        self.starts = np.cumsum(degree) - degree

    def edges_of(self, frontier: np.ndarray) -> np.ndarray:
        """Numbers of all edges that leave the ``frontier`` rows."""
        degree = self.degree.take(frontier)
        edges = np.repeat(self.starts.take(frontier) - np.cumsum(degree) + degree, degree)
        edges += np.arange(len(edges))
        return edges


def _greedy(rows: np.ndarray, columns: np.ndarray, num_rows: int, num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds of proposals: each free row to its first free column. Returns mates of rows and columns, -1 = free."""
    row_mate, column_mate = np.full(num_rows, -1), np.full(num_columns, -1)
    while len(rows):
        first = np.ones(len(rows), dtype=bool)
        first[1:] = rows[1:] != rows[:-1]
        r, c = rows[first], columns[first]
        column_mate[c] = r  # of several proposals one stays
        won = column_mate[c] == r
        row_mate[r[won]] = c[won]
        open_edges = (row_mate[rows] < 0) & (column_mate[columns] < 0)
        rows, columns = rows[open_edges], columns[open_edges]
    return row_mate, column_mate


def _search(
    roots: np.ndarray, graph: _Graph, column_mate: np.ndarray, parent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Alternating trees from free rows: the free columns reached, at most one a tree, and all columns seen.

    ``parent [columns]``, -1 everywhere, gets the row that each column was reached from. ``take`` and numbers instead of
    masks save a fifth of the time.
    """
    root_of = np.full(len(graph.degree), -1)
    root_of[roots] = roots
    done = np.zeros(len(graph.degree), dtype=bool)
    ends, seen = [roots[:0]], [roots[:0]]
    frontier = roots
    while len(frontier):
        edges = graph.edges_of(frontier)
        edges = edges.take(np.flatnonzero(parent.take(graph.columns.take(edges)) < 0))
        source, near = graph.rows.take(edges), graph.columns.take(edges)
        parent[near] = source  # of several claims one stays
        won = np.flatnonzero(parent.take(near) == source)
        source, near = source.take(won), near.take(won)
        seen.append(near)
        mate, root = column_mate.take(near), root_of.take(source)
        free = np.flatnonzero(mate < 0)
        reached, first = np.unique(root.take(free), return_index=True)
        ends.append(near.take(free.take(first)))
        done[reached] = True
        onward = np.flatnonzero((mate >= 0) & ~done.take(root))
        frontier = mate.take(onward)
        root_of[frontier] = root.take(onward)
    return np.concatenate(ends), np.concatenate(seen)


def _flip(ends: np.ndarray, parent: np.ndarray, row_mate: np.ndarray, column_mate: np.ndarray) -> None:
    """Exchange matched and unmatched edges along the paths that end at the columns ``ends``; they share no vertex."""
    while len(ends):
        row = parent[ends]
        before = row_mate[row]
        row_mate[row], column_mate[ends] = ends, row
        ends = before[before >= 0]


def min_cost_matching(
    rows: np.ndarray, columns: np.ndarray, distances: np.ndarray, max_dist: float
) -> tuple[np.ndarray, np.ndarray]:
    """Matched ``(rows, columns)`` of the minimum-cost assignment with outliers, exact (SciPy's sparse LAPJV).

    Of n rows and m columns with edges, each row may take one of its columns or a place of its own. That costs as much
    as a free row and a free column, which come together, so the sum differs from that of all pixels by a constant only.
    (The benchmark's code matches its free places, too, and counts one outlier less for each pair: half the price, with
    the same matches as long as an alternating path is shorter than a hundred pixels.) The smaller side takes the part
    of the rows: fewer of them stay free, and one that does is searched for through all that it can reach.
    """
    if len(rows) == 0:
        return rows, columns
    row_ids, r = np.unique(rows, return_inverse=True)
    column_ids, c = np.unique(columns, return_inverse=True)
    n, m = len(row_ids), len(column_ids)
    if n > m:
        matched_columns, matched_rows = min_cost_matching(columns, rows, distances, max_dist)
        return matched_rows, matched_columns
    apart = np.full(n, 2 * OUTLIER_COST * max(max_dist, 1e-6))
    # A weight of zero would be no edge; one more on each of the n edges of a full matching changes nothing.
    weights = np.concatenate([distances, apart]) + 1
    places = np.concatenate([r, np.arange(n)]), np.concatenate([c, m + np.arange(n)])
    left, right = min_weight_full_bipartite_matching(sparse.csr_matrix((weights, places), shape=(n, m + n)))
    matched = right < m
    return row_ids[left[matched]], column_ids[right[matched]]
