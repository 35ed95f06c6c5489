"""One-to-one matching of predicted and true boundary pixels within a distance.

The boundary benchmark (Martin, Fowlkes and Malik 2004; BSDS500) corresponds two boundary maps by a minimum-cost
assignment: a pair no further apart than ``max_dist`` costs its distance, an unmatched pixel costs 100 times
``max_dist``. Leaving a pixel out is thus so dear that the optimum matches as many pixels as can be matched (only an
alternating path of more than a hundred pixels could tip the balance), and the number of matched pixels, all that one
annotation needs, is the size of a maximum matching. :func:`max_matching_size` computes that;
:func:`min_cost_matching` solves the assignment itself, which decides *which* pixels are matched when several
annotations share a prediction.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching

OUTLIER_COST = 100.0
"""Cost of an unmatched pixel in units of the distance limit, as in the benchmark."""


def disc_offsets(radius: float) -> np.ndarray:
    """``[K, 2]`` integer (dy, dx) with ``dy^2 + dx^2 <= radius^2``."""
    reach = int(radius)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    # The slack keeps a distance that equals the radius but for rounding.
    inside = dy**2 + dx**2 <= radius**2 * (1 + 1e-12)
    return np.stack([dy[inside], dx[inside]], axis=1)


def max_matching_size(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> int:
    """Size of a maximum matching of the bipartite graph with edges ``(rows[i], columns[i])``; rows sorted."""
    if len(rows) == 0:
        return 0
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))]).astype(np.int32)
    graph = sparse.csr_matrix((np.ones(len(rows), dtype=np.int8), columns.astype(np.int32), starts), shape=shape)
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def min_cost_matching(
    rows: np.ndarray, columns: np.ndarray, distances: np.ndarray, max_dist: float
) -> tuple[np.ndarray, np.ndarray]:
    """Matched ``(rows, columns)`` of the minimum-cost assignment with outliers.

    The graph is doubled so that a perfect matching always exists: row ``i`` may take its own outlier column, column
    ``j`` its own outlier row, and the outliers of a matched pair take each other for nothing.
    """
    if len(rows) == 0:
        return rows, columns
    row_ids, r = np.unique(rows, return_inverse=True)
    column_ids, c = np.unique(columns, return_inverse=True)
    n, m = len(row_ids), len(column_ids)
    outlier = OUTLIER_COST * max(max_dist, 1e-6)
    own_rows, own_columns = np.arange(n), np.arange(m)
    i = np.concatenate([r, own_rows, n + own_columns, n + c])
    j = np.concatenate([c, m + own_rows, own_columns, m + r])
    cost = np.concatenate([distances, np.full(n + m, outlier), np.zeros(len(r))])
    # The sparse solver takes a stored zero for a missing edge; every perfect matching has n + m edges, so a constant
    # added to all of them changes no decision.
    graph = sparse.csr_matrix((cost + 1.0, (i, j)), shape=(n + m, m + n))
    left, right = min_weight_full_bipartite_matching(graph)
    real = (left < n) & (right < m)
    return row_ids[left[real]], column_ids[right[real]]
