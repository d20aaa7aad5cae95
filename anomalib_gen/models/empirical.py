r"""Closed-form denoisers: the optimum of denoising score matching on a finite sample, without training.

The objective of a denoiser, the mean of |D(x_i + s e, s) - x_i|^2 over N stored rows x_i and noise, is least at the
posterior mean under the noised empirical distribution (Karras et al. 2022, arXiv:2206.00364, appendix B.3)

    D(x, s) = sum_i p_i x_i,     p_i = softmax_i(-|x - x_i|^2 / 2 s^2),                              (1)

and what it is the denoiser of is the kernel density estimate (Vincent 2011, doi:10.1162/NECO_a_00142)

    log p_s(x) = log 1/N sum_i N(x; x_i, s^2 I),     grad log p_s(x) = (D(x, s) - x) / s^2.          (2)

(1) takes back all of x that is not a stored row, also along directions in which the data are dense. The local-linear
form keeps these. With m the mean of the k rows nearest to x, Z (k x D) the rows (x_i - m) / sqrt(k), so that
C = Z^T Z is their covariance, and C' = C + l I with l = lambda tr(C) / D, it is the posterior mean under N(m, C').
With v = x - m and c = l + s^2,

    D(x, s) = m + C' (C' + s^2 I)^-1 v = x - s^2 / c q,     q = c (C + c I)^-1 v,                    (3)

where, by Woodbury's identity, q = v - Z^T w for w = (Z Z^T + c I)^-1 Z v: a k x k solve. Now Z q = c w, hence

    v^T q = |q|^2 + c |w|^2 = |v|^2 - (Z v)^T (Z Z^T + c I)^-1 (Z v) = min_w |v - Z^T w|^2 + c |w|^2.    (4)

The root of (4), `LocalLinearDenoiser.distance`, is sqrt(c) times the Mahalanobis distance of x to N(m, C' + s^2 I), and
says how far x is from the affine combinations of its neighbours if large weights cost (the weights are those of locally
linear embedding, Roweis and Saul 2000, doi:10.1126/science.290.5500.2323). It is what the denoiser leaves, seen along
v: v^T (x - D) = s^2 / c v^T q, and for lambda = 0 it is just v^T (x - D). It is finite for s -> 0, where D -> x if
lambda > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from anomalib_gen._runtime import row_blocks, scoring_dtype
from anomalib_gen.models.denoiser import Denoiser
from anomalib_gen.models.neighbors import (
    ROWS_PER_BLOCK,
    check_excluded,
    nearest_rows,
    squared_distances,
    values_per_block,
)
from anomalib_gen.paths import Path


class _EmpiricalDenoiser(Denoiser):
    """What denoisers made of stored rows share."""

    rows: torch.Tensor

    def __init__(self, rows: torch.Tensor, path: Path, n_neighbors: int | None, dtype: torch.dtype) -> None:
        super().__init__(path, rows.shape[1:])
        if rows.ndim < 2 or rows.numel() == 0:
            raise ValueError(f"rows must have the shape (N, *E) with N >= 1, got {tuple(rows.shape)}.")
        if n_neighbors is not None and n_neighbors < 1:
            raise ValueError(f"n_neighbors must be at least 1, got {n_neighbors}.")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}.")
        self.n_neighbors = n_neighbors
        self.register_buffer("rows", rows.detach().to(dtype, copy=True))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        # A change of the model's precision leaves the rows as compact as they are; only their device follows.
        rows = self.rows
        super()._apply(fn, recurse)
        self.rows = rows.to(self.rows.device)
        return self

    def _seen(self, exclude: torch.Tensor | None) -> int:
        """Count the rows that a query sees."""
        n = len(self.rows) - (exclude is not None)
        if n == 0:
            raise ValueError("The only stored row cannot be left out.")
        return n

    def _blocks(self, x: torch.Tensor, values_per_row: int) -> Iterator[slice]:
        """Cut queries into blocks of bounded memory."""
        return row_blocks(len(x), max(1, values_per_block(x.device) // values_per_row))


class KernelDenoiser(_EmpiricalDenoiser):
    """Posterior mean under the noised empirical distribution (equation 1).

    Parameters
    ----------
    rows : Tensor of shape (N, *E)
        Clean rows. They are copied.
    path : Path
        The process that the denoiser belongs to.
    n_neighbors : int, optional
        Keep the sum to the nearest k rows; all rows if None, the default, which is exact at every level. The weight
        that is left out is at most (N - k) exp(-(r_k^2 - r_1^2) / 2 s^2), for distances r_1 and r_k to the nearest and
        the k-th row: little at small levels, where a search among a million rows then pays, and nearly all where
        noise is wider than the neighbourhood.
    dtype : torch.dtype, default=torch.float32
        What rows are stored in, also when the module is moved to another precision. Computation is in float64, where
        the device has it.

    Attributes
    ----------
    rows : Tensor of shape (N, *E)
        Buffer of the clean rows.

    Notes
    -----
    One query costs N distances. Memory beside the rows is bounded as in `models.neighbors` while gradients are off.

    References
    ----------
    Vincent, P. (2011). A connection between score matching and denoising autoencoders. Neural Computation 23(7).
    doi:10.1162/NECO_a_00142.

    Karras, T., Aittala, M., Aila, T., Laine, S. (2022). Elucidating the design space of diffusion-based generative
    models. NeurIPS. arXiv:2206.00364.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        path: Path,
        *,
        n_neighbors: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rows, path, n_neighbors, dtype)

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, *, exclude: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of the clean rows behind noisy ones (equation 1).

        Parameters
        ----------
        x : Tensor of shape (B, *E)
            Rows with noise added, not scaled.
        level : Tensor of shape (B,)
            Deviation of the noise.
        exclude : Tensor of int64 of shape (B,), optional
            Position of the stored row that each row must not see (leave-one-out).

        Returns
        -------
        Tensor of shape (B, *E)

        Raises
        ------
        ValueError
            If `exclude` does not name one stored row for each row, or nothing is left without it.
        """
        return self._posterior(x, level, exclude)[0].to(x.dtype).reshape(x.shape)

    def log_density(
        self, x: torch.Tensor, level: torch.Tensor, *, exclude: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Kernel density estimate (equation 2), whose gradient is `score`.

        Parameters
        ----------
        x : Tensor of shape (B, *E)
            Rows with noise added, not scaled.
        level : Tensor of shape (B,)
            Deviation of the noise, the bandwidth.
        exclude : Tensor of int64 of shape (B,), optional
            Position of the stored row that each row must not see (leave-one-out).

        Returns
        -------
        Tensor of shape (B,)
            In nats. With `n_neighbors` the rows that are left out count as infinitely far.

        Raises
        ------
        ValueError
            If `exclude` does not name one stored row for each row, or nothing is left without it.
        """
        log_sum = self._posterior(x, level, exclude)[1]
        size = math.prod(x.shape[1:])
        constant = math.log(self._seen(exclude)) + 0.5 * size * math.log(2 * math.pi)
        return (log_sum - size * level.to(log_sum).log() - constant).to(x.dtype)

    def _posterior(
        self, x: torch.Tensor, level: torch.Tensor, exclude: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean ``(B, D)``, and log of the sum of exp(-|x - x_i|^2 / 2 s^2) ``(B,)``."""
        check_excluded(exclude, len(x), len(self.rows))
        q = x.flatten(1).to(scoring_dtype(x.device))
        precision = 0.5 / level.to(q).square()
        rows = self.rows.flatten(1)
        n_seen = self._seen(exclude)
        whole = self.n_neighbors is None or self.n_neighbors >= n_seen
        k = n_seen if self.n_neighbors is None else min(self.n_neighbors, n_seen)
        step = min(len(rows), ROWS_PER_BLOCK, max(1, values_per_block(x.device) // q.shape[1]))
        found = None if whole else nearest_rows(q, rows, k, exclude=exclude)
        means, log_sums = [q[:0]], [precision[:0]]
        for block in self._blocks(q, step if found is None else k * q.shape[1]):
            if found is None:
                left_out = None if exclude is None else exclude[block]
                mean, log_sum = _sum_over_all(q[block], precision[block], rows, step, left_out)
            else:
                near = rows[found.positions[block]].to(q.dtype)
                # Anew, for gradients.
                squared = squared_distances(q[block].unsqueeze(1), near).squeeze(1)
                logits = -squared * precision[block].unsqueeze(1)
                mean = (logits.softmax(1).unsqueeze(1) @ near).squeeze(1)
                log_sum = logits.logsumexp(1)
            means.append(mean)
            log_sums.append(log_sum)
        return torch.cat(means), torch.cat(log_sums)


def _sum_over_all(
    q: torch.Tensor, precision: torch.Tensor, rows: torch.Tensor, step: int, exclude: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`KernelDenoiser._posterior` of a block of queries, summed over blocks of rows relative to the largest term."""
    largest = q.new_full((len(q),), torch.finfo(q.dtype).min)
    total, weighted = torch.zeros_like(precision), torch.zeros_like(q)
    for block in row_blocks(len(rows), step):
        y = rows[block].to(q.dtype)
        logits = -squared_distances(q, y) * precision.unsqueeze(1)
        if exclude is not None:
            positions = torch.arange(block.start, block.stop, device=q.device)
            logits = logits.masked_fill(positions == exclude.unsqueeze(1), -math.inf)
        new = torch.maximum(largest, logits.detach().amax(1))
        shrink, weights = (largest - new).exp(), (logits - new.unsqueeze(1)).exp()
        total = shrink * total + weights.sum(1)
        weighted = shrink.unsqueeze(1) * weighted + weights @ y
        largest = new
    return weighted / total.unsqueeze(1), largest + total.log()


class LocalLinearDenoiser(_EmpiricalDenoiser):
    """Posterior mean under a Gaussian of the nearest rows (equation 3).

    Parameters
    ----------
    rows : Tensor of shape (N, *E)
        Clean rows. They are copied.
    path : Path
        The process that the denoiser belongs to.
    n_neighbors : int, default=20
        Rows k of a neighbourhood; all rows if fewer are there. Many make it wide, few leave directions unseen.
    shrinkage : float, default=0.3
        lambda, the variance that each direction is given beyond that of the neighbours, as a share of their mean
        variance. With 0 the denoiser knows the span of the neighbours alone.
    dtype : torch.dtype, default=torch.float32
        What rows are stored in, also when the module is moved to another precision. Computation is in float64, where
        the device has it.

    Attributes
    ----------
    rows : Tensor of shape (N, *E)
        Buffer of the clean rows.

    Raises
    ------
    ValueError
        If `rows` are empty, `n_neighbors` is below 1 or `shrinkage` is negative.

    Notes
    -----
    One query costs N distances, and a solve of the size of k or D, whichever is less. As noise grows, D goes to the
    mean of the *nearest* rows: at levels above the width of the neighbourhood this is no posterior mean of the data.
    """

    n_neighbors: int

    def __init__(
        self,
        rows: torch.Tensor,
        path: Path,
        *,
        n_neighbors: int = 20,
        shrinkage: float = 0.3,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rows, path, n_neighbors, dtype)
        if shrinkage < 0:
            raise ValueError(f"shrinkage must not be negative, got {shrinkage}.")
        self.shrinkage = shrinkage

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, *, exclude: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Posterior mean of the clean rows behind noisy ones (equation 3).

        Parameters
        ----------
        x : Tensor of shape (B, *E)
            Rows with noise added, not scaled.
        level : Tensor of shape (B,)
            Deviation of the noise.
        exclude : Tensor of int64 of shape (B,), optional
            Position of the stored row that each row must not see (leave-one-out).

        Returns
        -------
        Tensor of shape (B, *E)

        Raises
        ------
        ValueError
            If `exclude` does not name one stored row for each row, or nothing is left without it.
        """
        return self._solve(x, level, exclude)[0].to(x.dtype).reshape(x.shape)

    def distance(
        self, x: torch.Tensor, level: torch.Tensor, *, exclude: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Distance from the neighbours' mean less what their Gaussian explains, the root of equation 4.

        Parameters
        ----------
        x : Tensor of shape (B, *E)
            Rows.
        level : Tensor of shape (B,)
            Deviation of the noise; here it only needs to be positive, and keeps the solve defined.
        exclude : Tensor of int64 of shape (B,), optional
            Position of the stored row that each row must not see (leave-one-out).

        Returns
        -------
        Tensor of shape (B,)
            In the units of the rows, between 0 and the distance from the mean.

        Raises
        ------
        ValueError
            If `exclude` does not name one stored row for each row, or nothing is left without it.
        """
        return self._solve(x, level, exclude)[1].sqrt().to(x.dtype)

    def _solve(
        self, x: torch.Tensor, level: torch.Tensor, exclude: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """D ``(B, D)`` of equation 3, and equation 4 ``(B,)``."""
        check_excluded(exclude, len(x), len(self.rows))
        q = x.flatten(1).to(scoring_dtype(x.device))
        variance = level.to(q).square()
        rows, k = self.rows.flatten(1), min(self.n_neighbors, self._seen(exclude))
        size = q.shape[1]
        clean, squares = [q[:0]], [variance[:0]]
        found = nearest_rows(q, rows, k, exclude=exclude)
        for block in self._blocks(q, k * size + min(k, size) ** 2):
            y = rows[found.positions[block]].to(q.dtype)
            share = torch.full_like(y[..., 0], 1 / k)
            left, square, ridge = local_residual(q[block], y, share, self.shrinkage, variance[block])
            clean.append(q[block] - (variance[block] / ridge).unsqueeze(1) * left)
            squares.append(square)
        return torch.cat(clean), torch.cat(squares)


def local_residual(
    x: torch.Tensor, near: torch.Tensor, share: torch.Tensor, shrinkage: float, variance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a Gaussian of neighbours leaves of rows (equations 3 and 4).

    Parameters
    ----------
    x : Tensor of shape (B, D)
        Rows.
    near : Tensor of shape (B, k, D)
        Their neighbours.
    share : Tensor of shape (B, k)
        Weights of these, of sum one.
    shrinkage : float
        lambda.
    variance : Tensor of shape (B,)
        s^2.

    Returns
    -------
    left : Tensor of shape (B, D)
        q of equation 3.
    squares : Tensor of shape (B,)
        Equation 4.
    ridge : Tensor of shape (B,)
        c = l + s^2.
    """
    mean = (share.unsqueeze(1) @ near).squeeze(1)
    Z = share.sqrt().unsqueeze(2) * (near - mean.unsqueeze(1))
    v = x - mean
    trace = Z.square().sum((1, 2))
    ridge = shrinkage * trace / x.shape[1] + variance
    # Not below what rounding of the products takes from their smallest eigenvalue.
    c = torch.maximum(ridge, near.shape[1] * torch.finfo(x.dtype).eps * trace)
    left, w = _regress(v, Z, c)
    return left, left.square().sum(1) + c * w.square().sum(1), ridge


def _regress(v: torch.Tensor, Z: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of v ``(b, D)`` on Z ``(b, k, D)``: what it leaves ``(b, D)``, and its weights ``(b, k)``."""
    k, size = Z.shape[1:]
    small = Z.mT @ Z if size <= k else Z @ Z.mT
    factor = torch.linalg.cholesky_ex(small + torch.diag_embed(c.unsqueeze(1).expand(small.shape[:2])))[0]
    if size <= k:
        q = c.unsqueeze(1) * torch.cholesky_solve(v.unsqueeze(2), factor).squeeze(2)
        return q, (Z @ q.unsqueeze(2)).squeeze(2) / c.unsqueeze(1)
    w = torch.cholesky_solve(Z @ v.unsqueeze(2), factor)
    return v - (Z.mT @ w).squeeze(2), w.squeeze(2)
