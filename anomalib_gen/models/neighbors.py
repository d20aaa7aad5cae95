r"""Exact nearest neighbours among stored rows, in blocks, on whichever device holds them.

All squared distances between a block of queries x and a block of rows y come from one matrix product,

    |x - y|^2 = |x|^2 - 2 x^T y + |y|^2,                                                             (1)

which is fast, and rounds: its error is up to a few D eps (|x| + |y|)^2 and depends on the rows that share the block. So
(1) only proposes. The k + `SPARE` rows nearest by (1) get their distances from direct differences, and the k nearest of
these are proven to be the k nearest of all rows if the last one beats the farthest proposal by more than that error
bound. Queries without the proof (rows at equal distances, as on grids; rows far from all others) are searched again by
direct differences alone, several times slower. In both ways a distance is a function of its two rows alone, and equal
distances go by the order of the rows: what is found never depends on the other queries.

Work is in float64 (float32 on a device without it), whatever the rows are stored in. Memory: both sides are cut so that
no buffer has more than `VALUES_PER_BLOCK` values (8 MB; eight times that off the CPU), and fewer than ten are alive at
a time, whatever the numbers of rows and queries. (One query with all its candidates is the smallest unit.)

The spacing of the rows, the leave-one-out distance r_i of row i to the nearest other row, sets the bandwidth of a
kernel on them by the rule

    h^2 = mean_i r_i^2 / D,                                                                          (2)

so that noise of level h moves a row about as far as the next row is: E|h e|^2 = mean_i r_i^2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from anomalib_gen._runtime import row_blocks, scoring_dtype

VALUES_PER_BLOCK = 2**20
"""Values of a buffer on a CPU; eight times as many elsewhere."""
ROWS_PER_BLOCK = 2**15
"""Stored rows looked at at once, at most."""
GROUP = 32
"""Columns whose minimum stands for them while the smallest of many distances are looked for."""
SPARE = 16
"""Rows proposed beyond those asked for."""
SCALE_ROWS = 5000
"""Rows whose neighbours `neighbor_scale` looks up, at most."""


class Neighbors(NamedTuple):
    """The stored rows nearest to each query, nearest first.

    Attributes
    ----------
    squared : Tensor of shape (B, k)
        Squared Euclidean distances, float64 (float32 on MPS).
    positions : Tensor of shape (B, k)
        Places of the rows among the stored ones.
    """

    squared: torch.Tensor
    positions: torch.Tensor


def values_per_block(device: torch.device) -> int:
    """Values of the largest buffer that neighbour searches make on a device."""
    return VALUES_PER_BLOCK * (1 if device.type == "cpu" else 8)


def squared_distances(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Squared distances ``(..., B, R)`` of ``(..., B, D)`` and ``(..., R, D)`` by direct differences."""
    return torch.cdist(x, rows, compute_mode="donot_use_mm_for_euclid_dist").square()


@torch.no_grad()
def nearest_rows(
    x: torch.Tensor, rows: torch.Tensor, n_neighbors: int, *, exclude: torch.Tensor | None = None
) -> Neighbors:
    """Find the stored rows nearest to each query, exactly.

    Parameters
    ----------
    x : Tensor of shape (B, *E)
        Queries.
    rows : Tensor of shape (N, *E)
        Stored rows, on the device of `x`, in any floating-point type.
    n_neighbors : int
        How many to find for each query.
    exclude : Tensor of int64 of shape (B,), optional
        For each query the position of a stored row that it must not see: leave-one-out, if the queries are stored rows
        themselves. Copies of that row at other positions are seen.

    Returns
    -------
    Neighbors
        In order of distance; rows at equal distances in order of position.

    Raises
    ------
    ValueError
        If fewer rows are there than asked for, or `exclude` does not name one row a query.
    """
    check_excluded(exclude, len(x), len(rows))
    left_out = exclude is not None
    if not 1 <= n_neighbors <= len(rows) - left_out:
        raise ValueError(
            f"n_neighbors={n_neighbors} is not between 1 and the {len(rows) - left_out} rows that can be seen."
        )
    q, flat = x.flatten(1).to(scoring_dtype(x.device)), rows.flatten(1)
    # With one row left out, the nearest are among one more of all.
    wanted = n_neighbors + left_out
    n_candidates = min(wanted + SPARE, len(flat))
    budget = values_per_block(x.device)
    step = min(len(flat), ROWS_PER_BLOCK, max(1, budget // flat.shape[1]))
    queries = max(1, budget // max(n_candidates, flat.shape[1]))
    squared = q.new_empty((len(q), n_neighbors))
    index = torch.empty((len(q), n_neighbors), dtype=torch.int64, device=q.device)
    for block in row_blocks(len(q), queries):
        found = _search(q[block], flat, wanted, n_candidates, step)
        if exclude is not None:
            found = _leave_out(found, exclude[block])
        squared[block], index[block] = found
    return Neighbors(squared, index)


def check_excluded(exclude: torch.Tensor | None, n_queries: int, n_rows: int) -> None:
    """Refuse positions to leave out that are not one stored row a query."""
    if exclude is None or n_queries == 0:
        return
    if exclude.shape != (n_queries,) or exclude.is_floating_point() or exclude.dtype == torch.bool:
        raise ValueError(
            f"exclude must hold one position for each of the {n_queries} rows, got {exclude.dtype} of shape "
            f"{tuple(exclude.shape)}."
        )
    if int(exclude.min()) < 0 or int(exclude.max()) >= n_rows:
        raise ValueError(f"exclude must hold positions from 0 to {n_rows - 1}.")


def _search(q: torch.Tensor, rows: torch.Tensor, k: int, n_candidates: int, step: int) -> Neighbors:
    """Search for the k nearest rows of a block of queries ``(b, D)``, `step` rows at a time."""
    if 4 * n_candidates >= len(rows):
        return _search_directly(q, rows, k, step)
    proposed, index, longest = _propose(q, rows, n_candidates, step)
    at_once = max(1, values_per_block(q.device) // (n_candidates * q.shape[1]))
    squared = [
        squared_distances(q[block].unsqueeze(1), rows[index[block]].to(q.dtype)).squeeze(1)
        for block in row_blocks(len(q), at_once)
    ]
    found = _in_order(torch.cat(squared), index, k)
    # Rows that were not proposed are at least as far as the farthest one that was, but for rounding.
    length = q.square().sum(1).sqrt()
    error = 8 * (q.shape[1] + 8) * torch.finfo(q.dtype).eps * (length + longest).square()
    unproven = (found.squared[:, -1] >= proposed.amax(1) - error).nonzero().squeeze(1)
    if len(unproven):
        again = _search_directly(q[unproven], rows, k, step)
        found.squared[unproven], found.positions[unproven] = again
    return found


def _propose(
    q: torch.Tensor, rows: torch.Tensor, n: int, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the n nearest rows by equation 1: squared distances, positions, and the length of the longest row."""
    longest = q.new_zeros(())
    best = q.new_full((len(q), n), torch.inf)
    index = torch.zeros((len(q), n), dtype=torch.int64, device=q.device)
    at_once = max(1, values_per_block(q.device) // max(step, n * GROUP))
    # All queries meet a block of rows before the next one is converted.
    for block in row_blocks(len(rows), step):
        y = rows[block].to(q.dtype)
        lengths = y.square().sum(1)
        longest = torch.maximum(longest, lengths.max())
        for some in row_blocks(len(q), at_once):
            values, columns = _smallest(torch.addmm(lengths, q[some], y.t(), alpha=-2), min(n, len(y)))
            best[some], kept = torch.cat([best[some], values], dim=1).topk(
                n, dim=1, largest=False, sorted=False
            )
            index[some] = torch.cat([index[some], columns + block.start], dim=1).gather(1, kept)
    return best + q.square().sum(1, keepdim=True), index, longest.sqrt()


def _smallest(values: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the n smallest of each row ``(b, R)``: values and columns.

    They lie in the n groups of columns with the smallest minima. Minima are much cheaper than a selection.
    """
    n_groups = values.shape[1] // GROUP
    if n_groups < 2 * n:
        found = values.topk(n, dim=1, largest=False, sorted=False)
        return found.values, found.indices
    grouped = values[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))
    groups = grouped.amin(1).topk(n, dim=1, largest=False, sorted=False).indices
    members = n_groups * torch.arange(GROUP, device=values.device)
    columns = (groups.unsqueeze(1) + members.unsqueeze(1)).flatten(1)
    rest = torch.arange(n_groups * GROUP, values.shape[1], device=values.device)
    columns = torch.cat([columns, rest.expand(len(values), -1)], dim=1)
    found = values.gather(1, columns).topk(n, dim=1, largest=False, sorted=False)
    return found.values, columns.gather(1, found.indices)


def _search_directly(q: torch.Tensor, rows: torch.Tensor, k: int, step: int) -> Neighbors:
    """Search for the k nearest rows by direct differences alone."""
    at_once = max(1, values_per_block(q.device) // max(step, k))
    found = [_search_block(q[some], rows, k, step) for some in row_blocks(len(q), at_once)]
    return Neighbors(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _search_block(q: torch.Tensor, rows: torch.Tensor, k: int, step: int) -> Neighbors:
    """`_search_directly` of so few queries that their distances to `step` rows fit into a buffer."""
    squared = q.new_empty((len(q), 0))
    index = torch.empty((len(q), 0), dtype=torch.int64, device=q.device)
    # Positions, ranks and masks go beside each distance here.
    for block in row_blocks(len(rows), max(1, step // 4)):
        positions = torch.arange(block.start, block.stop, device=q.device).expand(len(q), -1)
        squared = torch.cat([squared, squared_distances(q, rows[block].to(q.dtype))], dim=1)
        index = torch.cat([index, positions], dim=1)
        if squared.shape[1] > k:
            # All below the k-th distance, and of those at it the first by position.
            last = squared.topk(k, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
            rank = index.masked_fill(squared < last, -1).masked_fill(squared > last, len(rows))
            kept = rank.topk(k, dim=1, largest=False, sorted=False).indices
            squared, index = squared.gather(1, kept), index.gather(1, kept)
    return _in_order(squared, index, k)


def _in_order(squared: torch.Tensor, index: torch.Tensor, k: int) -> Neighbors:
    """Order by distance and then by position, and take the first k."""
    index, by_position = index.sort(dim=1)
    squared, by_distance = squared.gather(1, by_position).sort(dim=1, stable=True)
    return Neighbors(squared[:, :k], index.gather(1, by_distance[:, :k]))


def _leave_out(found: Neighbors, exclude: torch.Tensor) -> Neighbors:
    """Drop the excluded row where it was found, else the last one."""
    keep = found.positions != exclude.unsqueeze(1)
    keep[:, -1] &= ~keep.all(1)
    shape = (len(keep), keep.shape[1] - 1)
    return Neighbors(found.squared[keep].reshape(shape), found.positions[keep].reshape(shape))


def neighbor_scale(rows: torch.Tensor) -> float:
    """Bandwidth that the spacing of rows suggests (equation 2): the sparse parts, and a few far rows, count most.

    Parameters
    ----------
    rows : Tensor of shape (N, *E)
        Rows. Copies of a row count once: they say nothing about the spacing, and would pull it to zero. The neighbours
        of at most `SCALE_ROWS` rows, evenly spread over the distinct rows in lexicographic order, are looked up among
        all.

    Returns
    -------
    float
        h, in the units of the rows; 1 if all rows are equal, where any bandwidth does.
    """
    distinct = torch.unique(rows.flatten(1), dim=0)
    n, n_columns = distinct.shape
    variance = 0.0
    if n > 1:
        some = min(n, SCALE_ROWS)
        positions = torch.arange(some, device=rows.device) * n // some
        squared = nearest_rows(distinct[positions], distinct, 1, exclude=positions).squared
        variance = float(squared.mean()) / n_columns
    return variance**0.5 if variance > 0 else 1.0
