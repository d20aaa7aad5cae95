r"""Stored rows, and how far a row is from what closed-form denoisers make of it.

Distances depend on coordinates, and no one choice suits all tables. So stored rows are looked at in three, column by
column and monotone each:

    standard:   z_j, the standardised value;
    arsinh:     arsinh(z_j), which is z_j around the middle and its logarithm far out, for columns with long tails;
    rank:       Phi^-1(F_j(z_j)), the normal score of the rank among the stored values, where columns have one shape.

Ranks end with the stored values, and all that lies beyond would look like the greatest of them. So the third goes on
there: e deviations beyond the end it is log(1 + e) greater. That starts like the normal scores of a Gaussian column,
which are its standardised values, and ends like arsinh.

A model sees z with compressed tails (networks.tails); they are expanded here, up to 10^15 deviations.

In each of them two denoisers are asked (models.empirical): the kernel denoiser at the spacing h of the stored rows
(models.neighbors, equation 2), kept to the k = 50 nearest, whose residual is

    r(x) = |x - sum_i p_i x_i|,     p_i = softmax_i(-|x - x_i|^2 / 2 h^2),                               (1)

and the local-linear one, whose residual is what the 20 nearest rows, combined linearly with a ridge penalty, leave of
x (equation 4 there, with lambda = 0.3). (1) sees how far the next rows are; the second, whether x lies on the surface
that they lie on. These six numbers are put on one scale by the residuals of stored rows that were left out: each goes
through `tail_surprise`.

    a(x) = 1/6 sum_k u_k(r_k(x))                                                                      (2)

is the surprise at a row.

Pixels are no columns with shapes of their own. Images are looked at as they are, as histograms of their gradients, and
as those without their contrast (models.gradients): pixels see brightness and colour, gradients see what is drawn. Of
the 50 images nearest in the last of these the ten that match best when each place may move on its own are kept, and
compared again with places that move together (models.matching, equation 5). The root of the mean distance of the three
best is a seventh number r_7, and an eighth says whether that is much where the image lies: stored images are close to
one another in some places and far apart in others. With s_i the distance of stored image i to the next other one in the
last view, at least a tenth of its mean, and the mean over the ten,

    r_8(x) = r_7(x) / (1/10 sum_i s_i)^(1/2),                                                           (3)

half way between the distance and its ratio to that of neighbours (Breunig et al. 2000, doi:10.1145/342009.335388). The
views have half of the weight, for an image of another kind altogether may match well; r_7 and r_8 share the other half:

    a(x) = 1/4 u_8(r_8(x)) + 1/4 u_7(r_7(x)) + 1/2 1/6 sum_k u_k(r_k(x)).                                (4)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch.nn import functional as F

from anomalib_gen._runtime import row_blocks, scoring_dtype
from anomalib_gen.models._stored import Stored, even_choice, row_keys
from anomalib_gen.models.empirical import local_residual
from anomalib_gen.models.gradients import gradient_histograms, without_contrast
from anomalib_gen.models.matching import (
    STIFFNESS,
    matching_distances,
    pairs_per_block,
    shapes_of,
    unmatched,
)
from anomalib_gen.models.neighbors import nearest_rows, neighbor_scale, values_per_block
from anomalib_gen.models.tail import tail_surprise
from anomalib_gen.networks import TAIL_START, compress_tails, expand_tails

COORDINATES = ("standard", "arsinh", "rank")
KERNEL_NEIGHBORS, LINEAR_NEIGHBORS, SHRINKAGE = 50, 20, 0.3
CLOSEST, MATCHES = 10, 3
"""Images that match best: those that are compared again, and those whose distances are averaged."""
VIEW_SHARE = 0.5
"""Weight of all views of images together; the residuals of matching share the rest."""
IMAGE_RESIDUALS = 8
"""Of models that store images now."""
REFERENCE_ROWS = 2000
"""Stored rows whose left-out residuals say what is usual, at most."""
MAX_STORED_ROWS, MAX_STORED_VALUES = 1_000_000, 2**29
"""Rows kept, and numbers kept in all coordinates (two gigabytes); of more, an even choice."""
RANK_KNOTS = 1000
"""Values of a column that its ranks are kept for, at most; between them they are interpolated."""
EXTREME_KNOTS = 100
"""Of these the least and the greatest values, this many each, which are far apart where ranks differ most."""
FARTHEST = 1e15
"""Bound on standardised values, whose squares single precision still has room for."""
STORED_AT_ONCE = 1024
"""Images whose histograms are computed at once, at most."""
LEAST_SPACING = 0.1
"""Of a stored image, as a share of the mean: images that are almost copies are no denser than that."""
LEAST_VARIANCE = 1e-5
"""Keeps the local-linear solve defined where neighbours are equal."""


class Memory(Stored):
    """Stored rows in three coordinates.

    Rows are given and asked for as models see them, standardised and with compressed tails. It is empty until
    `remember` is called. Rows are stored in float32, whatever precision the module is moved to.

    Attributes
    ----------
    rows : Tensor of shape (3, N, D)
        The stored rows in each of the coordinates.
    knots, scores : Tensor of shape (D, K)
        Values of each column in rising order, and their normal scores.
    bandwidths : Tensor of shape (3,)
        h of equation 1.
    reference : Tensor of shape (6, n)
        Sorted residuals of stored rows that were left out: of equation 1 in each of the coordinates, then of the
        local-linear denoiser.
    ranks_end : bool
        Whether all values beyond the stored ones have the same rank, as they have in models that were saved without
        this attribute.
    """

    rows: torch.Tensor
    knots: torch.Tensor
    scores: torch.Tensor
    bandwidths: torch.Tensor
    reference: torch.Tensor
    ranks_end: bool = True

    def __init__(self, n_columns: int) -> None:
        super().__init__()
        self.ranks_end = False
        n = len(COORDINATES)
        self.register_buffer("rows", torch.zeros(n, 0, n_columns))
        self.register_buffer("knots", torch.zeros(n_columns, 0))
        self.register_buffer("scores", torch.zeros(n_columns, 0))
        self.register_buffer("bandwidths", torch.ones(n))
        self.register_buffer("reference", torch.zeros(2 * n, 0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = super().__deepcopy__(memo)
        other.ranks_end = self.ranks_end
        return other

    def __len__(self) -> int:
        return self.rows.shape[1]

    @property
    def views(self) -> Sequence[torch.Tensor]:
        """The stored rows in each of the coordinates, ``(N, D_v)``."""
        return list(self.rows)

    @property
    def weights(self) -> Sequence[float]:
        """Weight of each residual in the anomaly."""
        n = 2 * len(self.views)
        return [1 / n] * n

    @property
    def capacity(self) -> int:
        """Rows kept at most: a million, or fewer wide ones."""
        return max(2, min(MAX_STORED_ROWS, MAX_STORED_VALUES // sum(view.shape[1] for view in self.views)))

    @torch.no_grad()
    def remember(self, blocks: Iterable[torch.Tensor], *, keep: bool = False) -> None:
        """Store rows.

        Parameters
        ----------
        blocks : iterable of Tensor of shape (B, D)
            Rows, on the module's device. Of more than `capacity` an even choice is stored.
        keep : bool, default=False
            Whether the rows stored so far are kept.
        """
        parts = [block.float().clone() for block in blocks]
        if keep:
            parts.insert(0, compress_tails(self.rows[0].to(scoring_dtype(self.rows.device)))[0].float())
        rows = torch.cat(parts)
        if len(rows) > self.capacity:
            rows = rows[even_choice(len(rows), self.capacity, with_last=True).to(rows.device)]
        precise = scoring_dtype(rows.device)
        self._store(rows.to(precise))
        scales = [neighbor_scale(part.to(precise)) for part in self.views]
        self.bandwidths = torch.tensor(scales, dtype=precise, device=rows.device)
        positions = even_choice(len(rows), REFERENCE_ROWS).to(rows.device)
        self.reference = self.residuals(rows[positions].to(precise), exclude=positions).sort(dim=1).values

    def _store(self, rows: torch.Tensor) -> None:
        """Keep rows ``(N, D)`` in all coordinates."""
        self.knots, self.scores = _column_ranks(rows)
        self.rows = torch.stack(list(self.coordinates(rows))).float()

    def coordinates(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows ``(B, D)`` in all coordinates, each ``(B, D_v)``; the first is that of the data."""
        standard = self._standard(x)
        # The same beyond the range of floating-point numbers: arsinh(z) goes to log 2 z.
        beyond = x.sign() * (x.abs() - TAIL_START + math.log(2))
        arsinh = torch.where(standard.abs() < FARTHEST, standard.asinh(), beyond)
        ranks = self._normal_scores(x)
        if not self.ranks_end:
            least, greatest = self._standard(self.knots[:, [0, -1]].T.to(x))
            above, below = (standard - greatest).clamp(min=0), (least - standard).clamp(min=0)
            ranks = ranks + above.log1p() - below.log1p()
        return [standard, arsinh, ranks]

    @staticmethod
    def _standard(x: torch.Tensor) -> torch.Tensor:
        """Rows as the data have them, the first of the coordinates."""
        return expand_tails(x)[0].clamp(-FARTHEST, FARTHEST)

    def _normal_scores(self, x: torch.Tensor) -> torch.Tensor:
        knots, scores = self.knots.to(x), self.scores.to(x)
        values = x.T.contiguous()
        right = torch.searchsorted(knots, values).clamp(1, knots.shape[1] - 1)
        start, end = knots.gather(1, right - 1), knots.gather(1, right)
        width = end - start
        share = ((values - start) / torch.where(width > 0, width, 1.0)).clamp(0, 1)
        low = scores.gather(1, right - 1)
        return (low + share * (scores.gather(1, right) - low)).T

    def nearest(self, x: torch.Tensor, n_neighbors: int) -> torch.Tensor:
        """Distances ``(B, k)`` of rows ``(B, D)`` to the nearest stored ones, in deviations.

        Rows farther out than `FARTHEST` keep their order: what is beyond is counted on top, as a logarithm.
        """
        found = nearest_rows(self._standard(x), self.rows[0], min(n_neighbors, len(self)))
        limit = TAIL_START + math.log1p(FARTHEST - TAIL_START)
        beyond = (x.abs() - limit).clamp(min=0).sum(1, keepdim=True)
        return found.squared.sqrt() * (1 + beyond)

    @torch.no_grad()
    def residuals(self, x: torch.Tensor, *, exclude: torch.Tensor | None = None) -> torch.Tensor:
        """Residuals of both denoisers in all coordinates.

        Parameters
        ----------
        x : Tensor of shape (B, D)
            Rows.
        exclude : Tensor of int64 of shape (B,), optional
            Position of the stored row that each row must not see (leave-one-out).

        Returns
        -------
        Tensor of shape (6, B)
            In float64, where the device has it; of images eight, or fewer (`ImageMemory`).
        """
        seen = len(self) - (exclude is not None)
        x = x.to(scoring_dtype(x.device))
        if seen == 0:  # the only stored row cannot be compared with itself
            return x.new_zeros(len(self.weights), len(x))
        k = min(KERNEL_NEIGHBORS, seen)
        kernel, linear = (x.new_empty(len(self.views), len(x)) for _ in range(2))
        for v, (y, rows) in enumerate(zip(self.coordinates(x), self.views, strict=True)):
            size = y.shape[1]
            found = nearest_rows(y, rows, k, exclude=exclude)
            precision = 0.5 / self.bandwidths[v].to(y).square()
            for block in row_blocks(len(y), max(1, values_per_block(x.device) // (k * size))):
                near = rows[found.positions[block]].to(y.dtype)
                weights = (-precision * found.squared[block]).softmax(1)
                mean = (weights.unsqueeze(1) @ near).squeeze(1)
                kernel[v, block] = (y[block] - mean).norm(dim=1)
                some = near[:, :LINEAR_NEIGHBORS]
                share = torch.full_like(some[..., 0], 1 / some.shape[1])
                variance = y.new_full((len(some),), LEAST_VARIANCE)
                squares = local_residual(y[block], some, share, SHRINKAGE, variance)[1]
                linear[v, block] = squares.sqrt()
        return torch.cat([kernel, linear, self._further_residuals(x, found.positions)])

    def _further_residuals(self, x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """Residuals ``(n, B)`` of another kind, given the stored rows ``(B, k)`` nearest in the last view."""
        return x.new_empty(0, len(x))

    def surprise(self, x: torch.Tensor) -> torch.Tensor:
        """Surprise at the residuals of rows ``(B, D)`` among those of stored rows, as `residuals`, in nats."""
        return tail_surprise(self.residuals(x), self.reference)

    def anomaly(self, x: torch.Tensor) -> torch.Tensor:
        """Anomaly of rows ``(B, D)``, as ``(B,)``: the weighted mean of their surprises (equations 2 and 4)."""
        weights = torch.tensor(self.weights, dtype=scoring_dtype(x.device), device=x.device)
        return (weights.unsqueeze(1) * self.surprise(x)).sum(0)


class ImageMemory(Memory):
    """Stored images: their pixels, histograms of their gradients, and those without contrast; and what they match.

    Parameters
    ----------
    event_shape : tuple of int
        ``(channels, height, width)``. Rows are flattened images.

    Attributes
    ----------
    rows : Tensor of shape (1, N, D)
        The stored images.
    gradients : Tensor of shape (2, N, D_2)
        Their histograms, with and without contrast.
    spacings : Tensor of shape (N,)
        Distance of each stored image to the nearest other one in the last view.
    bandwidths, reference
        As of `Memory`; the seventh and the eighth residual are those of matching. Models that were saved before places
        moved together have seven (each place moves on its own), and those saved before images were matched six: they go
        on as they were.
    view_share : float
        Weight of all views together, `VIEW_SHARE` or what it was when the model was made.
    """

    gradients: torch.Tensor
    spacings: torch.Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(math.prod(event_shape))
        self.event_shape = tuple(event_shape)
        self.view_share = VIEW_SHARE
        size = gradient_histograms(torch.zeros(1, *self.event_shape)).numel()
        self.rows = self.rows[:1]
        self.reference = torch.zeros(IMAGE_RESIDUALS, 0)
        self.register_buffer("gradients", torch.zeros(2, 0, size))
        self.register_buffer("spacings", torch.zeros(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = super().__deepcopy__(memo)
        other.event_shape, other.view_share = self.event_shape, self.view_share
        return other

    @property
    def views(self) -> Sequence[torch.Tensor]:
        """The stored images in each of the coordinates."""
        return [*self.rows, *self.gradients]

    @property
    def weights(self) -> Sequence[float]:
        """Weight of each residual in the anomaly (equation 4)."""
        n = self._n_further
        if not n:
            return super().weights
        share = self.view_share if n > 1 else 0.5  # as it was when places moved on their own
        return [*(share * weight for weight in super().weights), *[(1 - share) / n] * n]

    @property
    def _n_further(self) -> int:
        """How many residuals there are of matching."""
        return len(self.reference) - 2 * len(self.views)

    def _further_residuals(self, x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        found = x.new_empty(self._n_further, len(x))
        if not len(found):
            return found
        for block, shapes, stored in self._candidates(x, near):
            distances, best = self._matches(shapes, stored)
            found[0, block] = distances[:, :MATCHES].mean(1).to(x.dtype).sqrt()
            if len(found) > 1:
                spacings = self.spacings[near[block].gather(1, best)].to(x.dtype)
                found[1, block] = found[0, block] / spacings.mean(1).sqrt()
        return found

    @property
    def _stiffness(self) -> float:
        return STIFFNESS if self._n_further > 1 else 0.0

    def _matches(self, shapes: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances of images ``(b, 2, h, w)`` to the best of ``(b, k, 2, h, w)``, in order, and which these are."""
        distances, best = matching_distances(shapes, stored).sort(dim=1, stable=True)
        if not self._stiffness:
            return distances, best
        # Places that move together never match better than places that move on their own, and take five times as long.
        best = best[:, :CLOSEST]
        closest = stored[torch.arange(len(stored), device=stored.device).unsqueeze(1), best]
        distances, order = matching_distances(shapes, closest, stiffness=self._stiffness).sort(
            dim=1, stable=True
        )
        return distances, best.gather(1, order)

    @torch.no_grad()
    def unmatched_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """What images ``(B, D)`` have and their best matches have not, or the reverse, at each pixel ``(B, H, W)``.

        The mean of both directions of equation 5 of `models.matching` over the matches. What only a stored image has
        stands where it has it.
        """
        out = x.new_empty(len(x), *self.event_shape[1:])
        # As in `residuals`: the matches of a map are those of the anomaly.
        x = x.to(scoring_dtype(x.device))
        y, rows = self.coordinates(x)[-1], self.views[-1]
        near = nearest_rows(y, rows, min(KERNEL_NEIGHBORS, len(self))).positions
        for block, shapes, stored in self._candidates(x, near):
            best = self._matches(shapes, stored)[1][:, :MATCHES]
            closest = stored[torch.arange(len(shapes), device=x.device).unsqueeze(1), best]
            maps = torch.cat(
                [
                    torch.stack(
                        [self._map(shapes[part], closest[part, k]) for k in range(best.shape[1])]
                    ).mean(0)
                    for part in row_blocks(len(shapes), pairs_per_block(shapes, self._stiffness))
                ]
            )
            maps = F.interpolate(maps.unsqueeze(1), out.shape[1:], mode="bilinear").squeeze(1)
            out[block] = maps.to(out.dtype)
        return out

    def _map(self, shapes: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return torch.stack(unmatched(shapes, stored, stiffness=self._stiffness)).mean(0)

    def _candidates(
        self, x: torch.Tensor, near: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Shapes ``(b, 2, h, w)`` of images ``(B, D)`` and ``(b, k, 2, h, w)`` of stored ones, block by block."""
        for block in row_blocks(len(x), max(1, values_per_block(x.device) // (near.shape[1] * x.shape[1]))):
            stored = self._shapes(self.rows[0][near[block]].flatten(0, 1))
            yield block, self._shapes(self._standard(x[block])), stored.unflatten(0, near[block].shape)

    def _shapes(self, pixels: torch.Tensor) -> torch.Tensor:
        # Of stored images and others alike in the precision in which they are stored: an image matches itself.
        return shapes_of(pixels.float().unflatten(1, self.event_shape))

    def _store(self, rows: torch.Tensor) -> None:
        pixels = self.rows.new_empty((1, *rows.shape))
        gradients = self.gradients.new_empty((2, len(rows), self.gradients.shape[2]))
        # In blocks: histograms in double precision take several times what is kept of them.
        at_once = max(1, min(STORED_AT_ONCE, values_per_block(rows.device) // rows.shape[1]))
        for block in row_blocks(len(rows), at_once):
            for kept, found in zip([*pixels, *gradients], self.coordinates(rows[block]), strict=True):
                kept[block] = found
        self.rows, self.gradients = pixels, gradients
        if self._n_further > 1:
            self.spacings = self._spacings(at_once)

    def _spacings(self, at_once: int) -> torch.Tensor:
        """Distances ``(N,)`` to the nearest other image, of all with all: time grows with the square of N."""
        view = self.views[-1]
        keys = torch.cat([row_keys(view[block]) for block in row_blocks(len(view), at_once)])
        unique, which = torch.unique(keys, return_inverse=True)
        if len(unique) == 1:
            return view.new_ones(len(view))
        distinct = view
        if len(unique) < len(view):  # copies of an image count once
            first = torch.empty_like(unique)
            distinct = view[first.scatter_(0, which, torch.arange(len(view), device=view.device))]
        else:
            which = torch.arange(len(view), device=view.device)
        positions = torch.arange(len(distinct), device=view.device)
        precise = scoring_dtype(view.device)
        found = [
            nearest_rows(distinct[block].to(precise), distinct, 1, exclude=positions[block]).squared[:, 0]
            for block in row_blocks(len(distinct), at_once)
        ]
        spacings = torch.cat(found).sqrt()
        return spacings.clamp(min=LEAST_SPACING * spacings.mean()).float()[which]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if "spacings" not in self._buffers:  # read from a folder that has none
            self.register_buffer("spacings", self.rows.new_zeros(0))
        if len(state_dict.get(prefix + "reference", ())) < IMAGE_RESIDUALS:
            state_dict.setdefault(prefix + "spacings", self.spacings[:0])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def coordinates(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Flattened images ``(B, D)`` in all coordinates."""
        pixels = self._standard(x)
        histograms = gradient_histograms(pixels.unflatten(1, self.event_shape))
        return [pixels, histograms.flatten(1), without_contrast(histograms).flatten(1)]


def make_memory(event_shape: Sequence[int]) -> Memory:
    """Make what holds rows, or images, of a shape."""
    return ImageMemory(event_shape) if len(event_shape) == 3 else Memory(math.prod(event_shape))


def _column_ranks(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of each column ``(D, K)`` in rising order, and normal scores of their midranks ``(D, K)``.

    One cell of the grid beyond the ends lie the scores of a value that none of n stored ones surpasses.
    """
    n = len(rows)
    columns = []
    for column in rows.T:
        values, counts = torch.unique(column, return_counts=True)
        midranks = counts.cumsum(0).float() - 0.5 * counts.float()
        gap = values.diff().median() if len(values) > 1 else values.new_ones(())
        if len(values) > RANK_KNOTS - 2:
            last = len(values) - 1
            extreme = torch.arange(EXTREME_KNOTS, device=rows.device)
            n_between = RANK_KNOTS - 2 - 2 * EXTREME_KNOTS
            between = torch.linspace(0, last, n_between, dtype=torch.float32, device=rows.device)
            chosen = torch.cat([extreme, between.round().long(), last - extreme]).unique()
            values, midranks = values[chosen], midranks[chosen]
        values = torch.cat([values[:1] - gap, values, values[-1:] + gap])
        midranks = torch.cat([midranks.new_zeros(1), midranks, midranks.new_full((1,), n)])
        columns.append((values, torch.special.ndtri((midranks + 0.5) / (n + 1))))
    width = max(len(values) for values, _ in columns)

    def padded(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.cat([part, part[-1:].expand(width - len(part))]) for part in parts])

    return padded([values for values, _ in columns]), padded([scores for _, scores in columns])
