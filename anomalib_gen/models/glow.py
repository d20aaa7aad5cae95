r"""Multi-scale flows of images (Glow; Kingma and Dhariwal 2018, arXiv:1807.03039), on nflows' layers.

An invertible map of images x ``(B, C, H, W)`` to a standard normal of the same shape, as `models.flow` needs it. At
each level the map

    squeezes    (C, H, W) -> (4 C, H / 2, W / 2): each 2 x 2 square of pixels becomes one pixel,
    steps       K times: actnorm y = s * x + b, channel by channel;
                         invertible 1 x 1 convolution y = W x with W = P L U, log |det| = H W sum log |diag U|;
                         affine coupling y_2 = s(y_1) * x_2 + m(y_1) of two halves of the channels,
    splits      half of the channels off: they are done, up to z = (x_2 - m(x_1)) / s(x_1) given those that go on,

as RealNVP does (Dinh et al. 2017, arXiv:1605.08803, sections 3.6 and 4). Levels go on while both sides are even, three
at most. What is split off early costs no more layers, and coarse structure is what is left at the end.

*Odd sides.* A last row or column of an odd side is split off first, given the others, so that any size has a squeeze.

*Places.* Layers keep to their place in the image: conditioners look around, but each pixel of each level has its own
scales. So the log-density is a sum over places,

    log p(x) = sum over levels l and their pixels i of  log N(z_i; 0, 1) + log |det dz_i|,

and a pixel of level l stands for 4^l pixels of the image, among which its share is divided evenly.

*Order.* What `forward` returns has the pixels' shape but not their order: parts as they are split off, one after the
other. Under a standard normal that makes no difference.

nflows' actnorm divides by a deviation that is 0 for a channel that is constant in the first batch; here it has a floor.
It also looks at a flag on the device at every step; here it remembers what it saw.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from nflows import transforms as nft
from torch import nn
from torch.nn import functional as F

from anomalib_gen.models.flow import BoundedConditioner, LUParts

MAX_LEVELS = 3
MIN_DEVIATION = 1e-2
"""Floor of the deviation that actnorm starts from: dead pixels are not blown up."""
LOG_SCALE = 2.0
"""Log-scales of splits lie in (-2, 2), along a smooth curve."""


class ActNorm(nft.ActNorm):
    """nflows' actnorm with a floor under the deviations of its first batch."""

    _seen_initialized = False

    def forward(
        self, inputs: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift ``(B, C, H, W)`` by channel; also the log-determinant ``(B,)``."""
        if self.training and not self._seen_initialized:
            if not self.initialized:
                self._initialize(inputs)
            self._seen_initialized = True
        scale, shift = self._broadcastable_scale_shift(inputs)
        log_det = inputs.shape[2] * inputs.shape[3] * self.log_scale.sum()
        return scale * inputs + shift, log_det * inputs.new_ones(len(inputs))

    @torch.no_grad()
    def _initialize(self, inputs: torch.Tensor) -> None:
        values = inputs.transpose(0, 1).flatten(1)
        std = values.std(1, correction=0).clamp(min=MIN_DEVIATION)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-values.mean(1) / std)
        self.initialized.fill_(True)


class OneByOneConvolution(LUParts, nft.OneByOneConvolution):
    """nflows' invertible 1 x 1 convolution."""


class ConvConditioner(nn.Module):
    """Three convolutions from half of the channels to the parameters of the other half; zero at the start."""

    def __init__(self, n_inputs: int, n_outputs: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_inputs, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 1)
        self.last = nn.Conv2d(hidden, n_outputs, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, n_inputs, H, W)`` to ``(B, n_outputs, H, W)``."""
        return self.last(F.silu(self.second(F.silu(self.first(x)))))


def _conditioner(n_inputs: int, n_outputs: int, hidden: int) -> nn.Module:
    return BoundedConditioner(ConvConditioner(n_inputs, n_outputs, hidden))


class Split(nn.Module):
    """Normalise one part of the pixels given the other: z = (a - m(b)) / s(b)."""

    def __init__(self, n_given: int, n_split: int, hidden: int) -> None:
        super().__init__()
        self.n_split = n_split
        self.network = _conditioner(n_given, 2 * n_split, hidden)

    def parameters_given(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and log-scales ``(B, n_split, h, w)`` of the part, from maps ``(B, n_given, h, w)``."""
        mean, raw = self.network(given).chunk(2, dim=1)
        return mean, LOG_SCALE * torch.tanh(raw / LOG_SCALE)

    def forward(self, part: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z ``(B, n_split, h, w)`` and the log-determinant ``(B,)``."""
        mean, log_scale = self.parameters_given(given)
        return (part - mean) * torch.exp(-log_scale), -log_scale.flatten(1).sum(1)

    def log_prob_by_place(self, part: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Log-density of the part for a standard normal z, at each place: ``(B, h, w)``."""
        mean, log_scale = self.parameters_given(given)
        return _log_normal((part - mean) * torch.exp(-log_scale)) - log_scale.sum(1)

    def inverse(self, z: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Undo `forward`."""
        mean, log_scale = self.parameters_given(given)
        return z * torch.exp(log_scale) + mean, log_scale.flatten(1).sum(1)


def _log_normal(z: torch.Tensor) -> torch.Tensor:
    """Log-density of standard normal values ``(B, C, h, w)``, at each place: ``(B, h, w)``."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def _couple_by_place(
    coupling: nft.AffineCouplingTransform, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map ``(B, C, h, w)`` by an affine coupling; and its log-determinant at each place: ``(B, h, w)``."""
    given, part = x[:, coupling.identity_features], x[:, coupling.transform_features]
    scale, shift = coupling._scale_and_shift(coupling.transform_net(given, None))
    y = torch.empty_like(x)
    y[:, coupling.identity_features], y[:, coupling.transform_features] = given, part * scale + shift
    return y, scale.log().sum(1)


def squeeze(x: torch.Tensor) -> torch.Tensor:
    """Fold each square of 2 x 2 pixels into channels: ``(B, C, H, W)`` to ``(B, 4 C, H / 2, W / 2)``."""
    return F.pixel_unshuffle(x, 2)


def unsqueeze(x: torch.Tensor) -> torch.Tensor:
    """Undo `squeeze`."""
    return F.pixel_shuffle(x, 2)


class Glow(nn.Module):
    """The invertible map of the module, with ``forward`` and ``inverse`` as `FlowModel` wants them.

    Parameters
    ----------
    event_shape : tuple of int
        ``(channels, height, width)``, with sides of at least 2.
    n_steps : int, default=8
        Steps K of each level.
    hidden_channels : int, default=32
        Width of the conditioners.
    n_levels : int, default=3
        Levels at most; there are no more than the sides can be halved.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        n_steps: int = 8,
        hidden_channels: int = 32,
        n_levels: int = MAX_LEVELS,
    ) -> None:
        super().__init__()
        channels, height, width = event_shape
        if min(height, width) < 2 or n_steps < 1 or n_levels < 1:
            raise ValueError(
                f"A multi-scale flow needs sides of at least 2, n_steps and n_levels of at least 1, got "
                f"{event_shape}, {n_steps} and {n_levels}."
            )
        self.event_shape = (channels, height, width)
        self.edges = nn.ModuleDict(
            {
                name: Split(channels, channels, hidden_channels)
                for name, side in (("column", width), ("row", height))
                if side % 2
            }
        )
        height, width = height - height % 2, width - width % 2
        self.levels, self.splits = nn.ModuleList(), nn.ModuleList()
        for level in range(n_levels):
            if level and (height % 2 or width % 2):
                break
            if level:
                kept = channels // 2
                self.splits.append(Split(kept, channels - kept, hidden_channels))
                channels = kept
            channels, height, width = 4 * channels, height // 2, width // 2
            steps: list[nn.Module] = []
            for k in range(n_steps):
                mask = (torch.arange(channels) < channels // 2).int()
                coupling = nft.AffineCouplingTransform(
                    mask if k % 2 else 1 - mask, lambda a, b: _conditioner(a, b, hidden_channels)
                )
                steps += [ActNorm(channels), OneByOneConvolution(channels), coupling]
            self.levels.append(nft.CompositeTransform(steps))
        self.end_shape = (channels, height, width)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images ``(B, C, H, W)`` to u of the same shape, and the log-determinant ``(B,)``."""
        parts, log_det = [], x.new_zeros(len(x))
        for name in self.edges:
            given, edge = self._cut(name, x)
            z, d = self.edges[name](edge, self._beside(name, given))
            x, log_det = given, log_det + d
            parts.append(z.flatten(1))
        for level, steps in enumerate(self.levels):
            if level:
                split: Any = self.splits[level - 1]
                kept = x.shape[1] // 2
                x, part = x[:, :kept], x[:, kept:]
                z, d = split(part, x)
                log_det = log_det + d
                parts.append(z.flatten(1))
            x, d = steps(squeeze(x))
            log_det = log_det + d
        u = torch.cat([*parts, x.flatten(1)], dim=1)
        return u.unflatten(1, self.event_shape), log_det

    def log_prob_by_place(self, x: torch.Tensor) -> torch.Tensor:
        """Share of each pixel in the log-density of images, for a standard normal u.

        Parameters
        ----------
        x : Tensor of shape (B, C, H, W)

        Returns
        -------
        Tensor of shape (B, H, W)
            In nats. They add up to the log-density.
        """
        shares = x.new_zeros(len(x), *x.shape[2:])
        for name in self.edges:
            given, edge = self._cut(name, x)
            beside = self._beside(name, given)
            _, last = self._cut(name, shares[:, : x.shape[2], : x.shape[3]])
            network: Any = self.edges[name]
            last += network.log_prob_by_place(edge, beside)
            x = given
        # What edges leave has even sides.
        inner = shares[:, : x.shape[2], : x.shape[3]]

        def add(found: torch.Tensor) -> None:
            side = inner.shape[1] // found.shape[1]
            inner.add_(found.repeat_interleave(side, 1).repeat_interleave(side, 2) / side**2)

        for level, steps in enumerate(self.levels):
            if level:
                split: Any = self.splits[level - 1]
                kept = x.shape[1] // 2
                x, part = x[:, :kept], x[:, kept:]
                add(split.log_prob_by_place(part, x))
            x = squeeze(x)
            layers: Any = steps
            for step in layers._transforms:
                if isinstance(step, nft.AffineCouplingTransform):
                    x, found = _couple_by_place(step, x)
                else:  # the same for all places
                    x, log_det = step(x)
                    found = (log_det / x[0, 0].numel())[:, None, None].expand(-1, *x.shape[2:])
                add(found)
        add(_log_normal(x))
        return shares

    def inverse(
        self, u: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Undo `forward`; the log-determinant is that of the inverse."""
        flat, log_det = u.flatten(1), u.new_zeros(len(u))
        end = math.prod(self.end_shape)
        flat, x = flat[:, :-end], flat[:, -end:].unflatten(1, self.end_shape)
        for level in reversed(range(len(self.levels))):
            steps: Any = self.levels[level]
            x, d = steps.inverse(x)
            x, log_det = unsqueeze(x), log_det + d
            if level:
                split: Any = self.splits[level - 1]
                shape = (split.n_split, *x.shape[2:])
                size = math.prod(shape)
                flat, z = flat[:, :-size], flat[:, -size:].unflatten(1, shape)
                part, d = split.inverse(z, x)
                x, log_det = torch.cat([x, part], dim=1), log_det + d
        for name in reversed(list(self.edges)):
            edge: Any = self.edges[name]
            beside = self._beside(name, x)
            size = beside[0].numel()
            flat, z = flat[:, :-size], flat[:, -size:].reshape(beside.shape)
            part, d = edge.inverse(z, beside)
            x, log_det = torch.cat([x, part], dim=3 if name == "column" else 2), log_det + d
        return x, log_det

    @staticmethod
    def _cut(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the last column or row off images."""
        if name == "column":
            return x[..., :-1], x[..., -1:]
        return x[..., :-1, :], x[..., -1:, :]

    @staticmethod
    def _beside(name: str, x: torch.Tensor) -> torch.Tensor:
        """The last column or row that is left: what an edge is predicted from."""
        return x[..., -1:] if name == "column" else x[..., -1:, :]


class FlattenedTransform(nn.Module):
    """A transform of rows of pixels as one of images.

    Parameters
    ----------
    transform : module
        Of rows ``(B, C H W)``, as `make_flow_transform` returns.
    event_shape : tuple of int
    """

    def __init__(self, transform: nn.Module, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.transform: Any = transform
        self.event_shape = event_shape

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images ``(B, C, H, W)`` to u of the same shape, and the log-determinant ``(B,)``."""
        u, log_det = self.transform(x.flatten(1), context)
        return u.unflatten(1, self.event_shape), log_det

    def inverse(
        self, u: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Undo `forward`; the log-determinant is that of the inverse."""
        x, log_det = self.transform.inverse(u.flatten(1), context)
        return x.unflatten(1, self.event_shape), log_det
