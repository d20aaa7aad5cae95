r"""Denoisers made of stored rows, and of stored rows and a network.

Were the data the stored rows x_i, each with a cloud of the spacing h of the rows around it (models.neighbors, equation
2), p = 1/N sum_i N(x_i, h^2 I), the mean of the clean rows behind a row with noise of level s would be

    K(x, s) = x + s^2 / (s^2 + h^2) (m - x),                                                         (1)
    m = sum_i p_i x_i,     p_i = softmax_i(-|x - x_i|^2 / 2 (s^2 + h^2)),

a denoiser without training, whose density is the kernel density estimate (models.empirical). It knows each row, and
nothing of what lies between them. A network learns that, as what (1) leaves:

    D(x, s) = K(x, s) + c(s) F(x / sqrt(s^2 + d^2), (m - x) / sqrt(s^2 + h^2), s),                            (2)

for data of deviation d. c(s) is what K leaves of stored rows under noise, root mean square over columns, measured
without the row itself: so F has to give a number of unit variance at every level, as in Karras et al. 2022
(arXiv:2206.00364, table 1), whose preconditioning (2) is where K is the best *linear* denoiser.

In training, too, K must not see the row that the noisy one was made of, or F would learn that nothing is left:
`HybridDenoiser.without` leaves out of (1) all stored rows that equal the clean one. F starts at zero. So where rows
are few and early stopping ends training soon, D is the closed form, and the more rows there are, the more of it is
learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from anomalib_gen._runtime import check_shape, expand_as_rows, normal_like, row_blocks, scoring_dtype
from anomalib_gen.models._stored import Stored, even_choice, row_keys
from anomalib_gen.models.denoiser import NETWORK_BOUND, Denoiser, embed_levels, output_shape
from anomalib_gen.models.memory import make_memory
from anomalib_gen.models.neighbors import neighbor_scale, values_per_block
from anomalib_gen.paths import Path, Prediction

KERNEL_ROWS = 2048
"""Stored rows that equation 1 sums over at most, each second, third, ... of all: it is evaluated at every step."""
PROFILE_LEVELS, PROFILE_ROWS = 24, 512
"""Levels at which c(s) is measured, and rows it is measured on."""


class KernelRows(Stored):
    """The rows that equation 1 sums over.

    Attributes
    ----------
    rows : Tensor of shape (N, D)
        In float32.
    keys : Tensor of int64 of shape (N,)
        What `row_keys` gives for them.
    bandwidth : Tensor of shape ()
        h, by the spacing of these rows.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    bandwidth: torch.Tensor

    def __init__(self, n_columns: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, n_columns))
        self.register_buffer("keys", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("bandwidth", torch.ones((), dtype=torch.float64))

    def set(self, rows: torch.Tensor) -> None:
        """Store rows ``(N, D)``, or an even choice of them."""
        rows = rows[:: -(-len(rows) // KERNEL_ROWS)].float()
        self.rows, self.keys = rows, row_keys(rows)
        self.bandwidth = torch.tensor(
            neighbor_scale(rows), dtype=scoring_dtype(rows.device), device=rows.device
        )


class ClosedFormDenoiser(Denoiser):
    """The denoiser of a kernel density estimate on stored rows (equation 1).

    It knows nothing until `remember` is called.

    Parameters
    ----------
    path : Path
        The process that the denoiser belongs to.
    event_shape : tuple of int
        Shape E of a row.
    grain : Tensor of shape E
        Deviation of the dequantisation noise of each column.

    Attributes
    ----------
    memory : Memory
        The stored rows.
    kernel : KernelRows
        Those that the denoiser is made of.
    """

    grain: torch.Tensor
    spread: torch.Tensor

    event_shape: tuple[int, ...]

    def __init__(self, path: Path, event_shape: Sequence[int], grain: torch.Tensor) -> None:
        super().__init__(path, event_shape)
        self.memory = make_memory(event_shape)
        self.kernel = KernelRows(math.prod(event_shape))
        self.register_buffer("grain", grain)
        self.register_buffer("spread", (1 + grain.square()).sqrt())

    def remember(
        self, blocks: Iterable[torch.Tensor], generator: torch.Generator, *, keep: bool = False
    ) -> None:
        """Store clean rows from blocks ``(B, *E)``, beside those stored so far if they are to be kept."""
        rows = torch.cat([block.flatten(1) for block in blocks])
        self.memory.remember([rows], keep=keep)
        self.kernel.set(torch.cat([self.kernel.rows, rows]) if keep else rows)

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, *, unlike: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of the clean rows behind noisy ones.

        Parameters
        ----------
        x : Tensor of shape (B, *E)
            Rows with noise added, not scaled.
        level : Tensor of shape (B,)
            Deviation of the noise.
        unlike : Tensor of shape (B,), optional
            Keys of clean rows (`row_keys`): stored rows that have the key are not seen.

        Returns
        -------
        Tensor of shape (B, *E)
        """
        return self._closed_form(x, level, unlike)[0]

    def without(self, x: torch.Tensor) -> LeaveOut:
        """Return this denoiser for noisy rows that were made of clean rows `x` ``(B, *E)``, which it must not see."""
        return LeaveOut(self, row_keys(x))

    def _closed_form(
        self, x: torch.Tensor, level: torch.Tensor, unlike: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K of equation 1 and (m - x) / sqrt(s^2 + h^2), both ``(B, *E)``."""
        rows, keys = self.kernel.rows.to(x.dtype), self.kernel.keys
        if len(rows) == 0:
            raise RuntimeError(f"{type(self).__name__} has no stored rows yet: call remember.")
        q, half_squares = x.flatten(1), -0.5 * rows.square().sum(1)
        variance = level.square() + self.kernel.bandwidth.to(x).square()
        means = [q[:0]]
        for block in row_blocks(len(q), max(1, values_per_block(x.device) // len(rows))):
            # (|x|^2 is the same for all stored rows.)
            logits = torch.addmm(half_squares, q[block], rows.T).div_(variance[block].unsqueeze(1))
            if unlike is not None:
                # Not minus infinity: if all stored rows are equal there is nothing else to be seen.
                logits.masked_fill_(keys == unlike[block].unsqueeze(1), -1e30)
            means.append(logits.softmax(1) @ rows)
        pull = torch.cat(means).reshape(x.shape) - x
        share = expand_as_rows(level.square() / variance, x)
        return x + share * pull, pull / expand_as_rows(variance.sqrt(), x)


class HybridDenoiser(ClosedFormDenoiser):
    """A network that learns what the closed form leaves (equation 2).

    Parameters
    ----------
    network : module
        ``forward(y: (B, 2 E_1, ...), context: (B, LEVEL_FEATURES)) -> (B, *E)``, or ``(B, 2 E_1, ...)`` with
        `learned_variance`. It sees the scaled row and the pull of the stored rows, one after the other along the
        first dimension of a row.
    path : Path
    event_shape : tuple of int
    grain : Tensor of shape E
    learned_variance : bool, default=False
        As in `NetworkDenoiser`.
    """

    profile: torch.Tensor
    recordable = False
    """Leaving rows out depends on which rows a batch has."""

    def __init__(
        self,
        network: nn.Module,
        path: Path,
        event_shape: Sequence[int],
        grain: torch.Tensor,
        *,
        learned_variance: bool = False,
    ) -> None:
        super().__init__(path, event_shape, grain)
        self.network = network
        self.learned_variance = learned_variance
        self.register_buffer("profile", torch.ones(PROFILE_LEVELS))

    @torch.no_grad()
    def remember(
        self, blocks: Iterable[torch.Tensor], generator: torch.Generator, *, keep: bool = False
    ) -> None:
        """Store clean rows from blocks ``(B, *E)``, and measure what the closed form leaves of them."""
        super().remember(blocks, generator, keep=keep)
        stored = self.kernel.rows
        clean = stored[even_choice(len(stored), PROFILE_ROWS).to(stored.device)]
        clean = clean.reshape(-1, *self.event_shape)
        # Few rows are taken several times, with other noise.
        clean = clean.repeat(-(-PROFILE_ROWS // len(clean)), *[1] * len(self.event_shape))
        keys = row_keys(clean)
        clean = clean.to(self.grain.dtype) + self.grain * normal_like(clean.to(self.grain.dtype), generator)
        left = []
        for level in self._profile_levels().exp():
            noised = clean + level * normal_like(clean, generator)
            error = self._closed_form(noised, level.expand(len(clean)).to(clean), keys)[0] - clean
            # What noise leaves of a row is no less than a small part of it, whatever luck these rows had.
            left.append(error.square().mean().sqrt().clamp(min=1e-2 * float(level) / (1 + float(level))))
        self.profile = torch.stack(left).to(self.profile)

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, *, unlike: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of the clean rows behind noisy ones (equation 2); see `ClosedFormDenoiser.denoise`."""
        return self.denoise_and_variance(x, level, unlike=unlike)[0]

    def denoise_and_variance(
        self, x: torch.Tensor, level: torch.Tensor, *, unlike: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`denoise`, and where the variance of a reverse step lies: 0 lower bound, 1 upper; None if not learned."""
        clean, pull = self._closed_form(x, level, unlike)
        y = x / (expand_as_rows(level, x).square() + self.spread.square()).sqrt()
        seen = torch.cat([y, pull], dim=1).clamp(-NETWORK_BOUND, NETWORK_BOUND)
        out = self.network(seen, embed_levels(level, *self.noise_levels))
        check_shape(out, output_shape(x, self.learned_variance), "The network")
        share = None
        if self.learned_variance:
            out, share = out.chunk(2, dim=1)
            share = 0.5 * (share + 1)
        return clean + expand_as_rows(self._left(level), x) * out, share

    def _profile_levels(self) -> torch.Tensor:
        """Logarithms of the levels at which c(s) is known."""
        low, high = (math.log(level) for level in self.noise_levels)
        return torch.linspace(low, high, PROFILE_LEVELS, dtype=torch.float64)

    def _left(self, level: torch.Tensor) -> torch.Tensor:
        """c(s) of levels ``(B,)``, interpolated between those at which it was measured."""
        low, high = (math.log(level) for level in self.noise_levels)
        place = (level.log() - low) / (high - low) * (PROFILE_LEVELS - 1)
        start = place.floor().clamp(0, PROFILE_LEVELS - 2)
        here = self.profile[start.long()]
        return here + (place - start).clamp(0, 1) * (self.profile[start.long() + 1] - here)


class LeaveOut:
    """A denoiser that does not see certain of its stored rows; all else is its own.

    Parameters
    ----------
    denoiser : ClosedFormDenoiser
    keys : Tensor of shape (B,)
        Keys of the clean rows behind the noisy rows that it will be given.
    """

    def __init__(self, denoiser: ClosedFormDenoiser, keys: torch.Tensor) -> None:
        self._denoiser, self._keys = denoiser, keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def denoise(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Mean of the clean rows behind noisy ones, ``(B, *E)``."""
        return self._denoiser.denoise(x, level, unlike=self._keys)

    def denoise_and_variance(
        self, x: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`denoise`, and the variance of a reverse step where it is learned."""
        if isinstance(self._denoiser, HybridDenoiser):
            return self._denoiser.denoise_and_variance(x, level, unlike=self._keys)
        return self.denoise(x, level), None

    def predict(self, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        """All views of rows `x_t` ``(B, *E)`` on the path at times `t` ``(B,)``."""
        return self._denoiser.path.predict(self.denoise, x_t, t)
