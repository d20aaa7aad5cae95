r"""Normalizing flows: exact densities by a change of variables, on nflows.

An invertible map f sends a row x to a standard normal u = f(x), so that

    log p(x) = log N(f(x); 0, I) + log |det df/dx|                                   (1)

f is a chain of layers whose Jacobians are triangular. Every layer transforms each coordinate by a monotone
function whose parameters a *conditioner* network computes from other coordinates: from one half of them
(coupling; Dinh et al. 2017, arXiv:1605.08803) or from all the previous ones (autoregressive; Papamakarios et
al. 2017, arXiv:1705.07057). The monotone function is affine (RealNVP, MAF) or a rational-quadratic spline
(neural spline flows; Durkan et al. 2019, arXiv:1906.04032, section 3.1).

Three parts are ours:

- *Tails.* The outermost layer leaves |x| <= c alone and compresses what lies beyond (networks.tails),

    t(x) = sign(x) (c + log(1 + |x| - c)),   log t'(x) = -log(1 + |x| - c),           (2)

  and conditioners see their inputs clipped to a box. Both are exact (t is a bijection and a conditioner may be
  any function), and together they make f affine far outside the data with bounded coefficients: the density is
  finite for every finite row and falls off along every ray.
- *Grain.* Columns on a grid are spread over its cells by noise of a fixed width (dequantisation), see `FlowModel`.
- *Noise levels.* A model may be conditional on the standard deviation s of Gaussian noise added to the data;
  then it holds the densities p_s of x + s e, e ~ N(0, I), for a range of s (Kim et al. 2020, "SoftFlow",
  arXiv:2006.04604). Small s keeps a density on data that lie on a thin sheet or on a grid; the larger ones
  regularise it.

This is the only module that imports nflows (0.14, the last release). What is worked around here:

- `LULinear` inverts with `torch.triangular_solve`, which torch is about to remove, and fills its triangles at places
  that lie on the host: a wait for the device at each;
- the unconstrained spline gathers the inside values with a boolean mask: a synchronisation a layer on a GPU,
  and tensor shapes that depend on the data; here values are clamped and selected instead;
- `MADE` gives hidden unit k the degree 1 + k mod (D - 1): with fewer units than columns the later columns are never
  seen by anything, and the first column never learns of the context; here degrees are spread evenly and start at 0;
- `AffineCouplingTransform` has scales of sigmoid(a + 2) + 0.001, which shrink. Linear maps between the layers stretch
  in their place; without them no density could rise above the peak of a standard normal, so scales are up to 2 there;
- `MaskedAffineAutoregressiveTransform` has scales without a bound, with which the training on few wide rows runs away;
  without linear maps between the layers, which is where rows are wide, they are up to 2 as well;
- `BatchNorm` starts with a running variance of zero and is not used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from nflows import transforms as nft
from nflows.transforms.made import MADE, MaskedResidualBlock
from torch import nn
from torch.nn import functional as F

from anomalib_gen._runtime import check_levels, check_rows, check_shape
from anomalib_gen.networks import ResidualMLP, compress_tails, expand_tails
from anomalib_gen.networks.tails import compress_values

SPLINE_BOUND = 6.0
"""Splines act inside this box and are the identity outside."""
CONDITIONER_BOUND = 12.0
"""Conditioners see their inputs clipped to this box."""
LOG_RANGE = 3.5
"""Unnormalised bins and slopes lie in exp(-3.5) .. exp(3.5), so that no bin and no slope collapses."""

FlowTransform = Callable[..., nn.Module]
"""A factory ``(features, context_features) -> module`` with ``forward(x, context)`` and ``inverse``."""


class CompressedTails(nft.Transform):
    """The elementwise bijection of equation 2, as an nflows layer."""

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``(B, D)`` to ``(B, D)`` and the log-determinant ``(B,)``."""
        return compress_tails(x)

    def inverse(
        self, y: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Undo `forward`; the log-determinant is that of the inverse."""
        return expand_tails(y)


@functools.lru_cache(maxsize=128)
def _triangles(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Places below and above the diagonal of a flattened square matrix, row by row."""
    with torch.inference_mode(False):  # they are for training too, whoever asks first
        row, column = torch.arange(size).unsqueeze(1), torch.arange(size)
        parts = ((row > column), (row < column))
        return tuple(part.flatten().nonzero().squeeze(1).to(device) for part in parts)  # type: ignore[return-value]


class LUParts:
    """For nflows' linear layers: triangles filled on the device, and an inverse that current torch supports."""

    def _create_lower_upper(self) -> tuple[torch.Tensor, torch.Tensor]:
        module: Any = self
        below, above = _triangles(module.features, module.bias.device)
        lower, upper = torch.ones_like(module.upper_diag).diag(), module.upper_diag.diag()
        lower = lower.flatten().index_copy(0, below, module.lower_entries).view_as(lower)
        return lower, upper.flatten().index_copy(0, above, module.upper_entries).view_as(upper)

    def inverse_no_cache(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve the two triangular systems for ``(B, D)``."""
        module: Any = self
        lower, upper = self._create_lower_upper()
        columns = (inputs - module.bias).t()
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(upper, columns, upper=True)
        return columns.t(), -module.logabsdet() * inputs.new_ones(len(inputs))


class LULinear(LUParts, nft.LULinear):
    """nflows' invertible linear layer."""


class BoundedConditioner(nn.Module):
    """A conditioner that sees its inputs clipped to a box, so that far outside nothing grows but the row itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, D)`` to the parameters of the elementwise functions."""
        return self.network(x.clamp(-CONDITIONER_BOUND, CONDITIONER_BOUND), context)


def _positive(parameters: torch.Tensor) -> torch.Tensor:
    return torch.exp(LOG_RANGE * torch.tanh(parameters / LOG_RANGE))


def rational_quadratic_spline(
    x: torch.Tensor, parameters: torch.Tensor, n_bins: int, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Monotone rational-quadratic spline on [-b, b] with identity tails, b = `SPLINE_BOUND`.

    Gregory and Delbourgo's interpolant as parametrised in Durkan et al. (2019), equations 4 to 8. Parameters of
    zero give the identity.

    Parameters
    ----------
    x : Tensor of shape (B, D)
    parameters : Tensor of shape (B, D, 3 n_bins - 1)
        Unnormalised widths, heights and inner slopes.
    n_bins : int
    inverse : bool, default=False

    Returns
    -------
    y : Tensor of shape (B, D)
    log_slope : Tensor of shape (B, D)
        log |dy/dx| of the direction taken.
    """
    # (B, D, 2, K): widths beside heights, so that each step below is one kernel for both. Bins are left
    # unnormalised: dividing the one bin that matters is cheaper than dividing all of them.
    bins = _positive(parameters[..., : 2 * n_bins]).unflatten(-1, (2, n_bins))
    edges = bins.cumsum(-1)
    total = edges[..., -1]
    slopes = F.pad(parameters[..., 2 * n_bins :], (1, 1))

    bound = SPLINE_BOUND
    inside = x.abs() <= bound
    unit = (x.clamp(-bound, bound) + bound) / (2 * bound)
    side = 1 if inverse else 0
    k = ((unit * total[..., side]).unsqueeze(-1) >= edges[..., side, :-1]).sum(-1, keepdim=True)
    k_both = k.unsqueeze(-2).expand(*k.shape[:-1], 2, 1)
    size = bins.gather(-1, k_both).squeeze(-1) / total
    start = edges.gather(-1, k_both).squeeze(-1) / total - size
    (w, h), (left, bottom) = size.unbind(-1), start.unbind(-1)
    d0, d1 = _positive(slopes.gather(-1, torch.cat([k, k + 1], -1))).unbind(-1)
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        # Equations 6 to 8: the root of a quadratic, in the form without cancellation.
        rise = unit - bottom
        a = h * (s - d0) + rise * bend
        b = h * d0 - rise * bend
        c = -s * rise
        xi = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
        y = xi * w + left
    else:
        xi = (unit - left) / w
        y = bottom + h * xi * (s * xi + d0 * (1 - xi)) / (s + bend * xi * (1 - xi))
    product = xi * (1 - xi)
    numerator = d1 * xi.square() + 2 * s * product + d0 * (1 - xi).square()
    log_slope = torch.log(numerator * (s / (s + bend * product)).square())
    y = torch.where(inside, y * (2 * bound) - bound, x)
    log_slope = torch.where(inside, -log_slope if inverse else log_slope, 0.0)
    return y, log_slope


class StretchingAffineCoupling(nft.AffineCouplingTransform):
    """nflows' affine coupling with scales up to 2."""

    def _scale_and_shift(self, transform_params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, scale = transform_params.chunk(2, dim=1)
        # Larger ones let the training on few wide rows run away.
        return 2 * torch.sigmoid(scale) + 1e-3, shift


class BoundedAffineAutoregressive(nft.MaskedAffineAutoregressiveTransform):
    """nflows' affine autoregressive layer with the scales of `StretchingAffineCoupling`."""

    def _unconstrained_scale_and_shift(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift = super()._unconstrained_scale_and_shift(parameters)
        # nflows takes softplus of this and adds 0.001, beside which what is cut off is nothing.
        return torch.expm1(2 * torch.sigmoid(scale.clamp(min=-15))).log(), shift


class SplineCoupling(nft.PiecewiseRationalQuadraticCouplingTransform):
    """nflows' spline coupling over our spline."""

    def __init__(self, mask: torch.Tensor, conditioner: Callable[[int, int], nn.Module], n_bins: int) -> None:
        super().__init__(mask, conditioner, num_bins=n_bins, tails="linear", tail_bound=SPLINE_BOUND)

    def _coupling_transform(
        self, inputs: torch.Tensor, transform_params: torch.Tensor, inverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = transform_params.reshape(*inputs.shape, -1)
        y, log_slope = rational_quadratic_spline(inputs, parameters, self.num_bins, inverse=inverse)
        return y, log_slope.sum(1)


class SplineAutoregressive(nft.MaskedPiecewiseRationalQuadraticAutoregressiveTransform):
    """nflows' autoregressive spline over our spline."""

    def _elementwise(
        self, inputs: torch.Tensor, autoregressive_params: torch.Tensor, inverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = autoregressive_params.reshape(*inputs.shape, -1)
        y, log_slope = rational_quadratic_spline(inputs, parameters, self.num_bins, inverse=inverse)
        return y, log_slope.sum(1)


def _repair_made(made: MADE, features: int) -> None:
    """Spread the hidden units' degrees evenly, and start at zero output.

    A unit of degree k sees columns 1 to k and steers columns k + 1 to D. With a context there are units of degree 0,
    which see it alone: they are how the first column learns of it.
    """
    nn.init.zeros_(made.final_layer.weight)
    nn.init.zeros_(made.final_layer.bias)
    hidden = made.initial_layer.out_features
    lowest = 0 if hasattr(made, "context_layer") else min(1, features - 1)
    if hidden >= features - lowest:
        degrees = lowest + torch.arange(hidden) % (features - lowest)
    else:
        blind = torch.zeros(1 if lowest == 0 and hidden > 2 else 0)
        degrees = torch.cat([blind, torch.linspace(1, features - 1, hidden - len(blind))]).round().long()
    inputs, outputs = torch.arange(1, features + 1), made.final_layer.mask
    out_degrees = inputs.repeat_interleave(outputs.shape[0] // features)
    made.initial_layer.mask.copy_(degrees[:, None] >= inputs)
    made.final_layer.mask.copy_(out_degrees[:, None] > degrees)
    for block in made.blocks:
        assert isinstance(block, MaskedResidualBlock)
        for layer in block.linear_layers:
            layer.mask.copy_(degrees[:, None] >= degrees)


def _autoregressive(
    spline: bool,
    features: int,
    context_features: int | None,
    hidden_features: int,
    n_blocks: int,
    n_bins: int,
    *,
    mixed: bool,
) -> nn.Module:
    arguments: dict[str, Any] = {
        "features": features,
        "hidden_features": hidden_features,
        "context_features": context_features,
        "num_blocks": n_blocks,
        "activation": F.silu,
    }
    if spline:
        layer = SplineAutoregressive(**arguments, num_bins=n_bins, tails="linear", tail_bound=SPLINE_BOUND)
    else:
        layer = (nft.MaskedAffineAutoregressiveTransform if mixed else BoundedAffineAutoregressive)(
            **arguments
        )
    _repair_made(layer.autoregressive_net, features)
    layer.autoregressive_net = BoundedConditioner(layer.autoregressive_net)
    return layer


def _coupling(
    spline: bool,
    features: int,
    context_features: int | None,
    hidden_features: int,
    n_blocks: int,
    n_bins: int,
    *,
    odd: bool,
    mixed: bool,
) -> nn.Module:
    def conditioner(n_inputs: int, n_outputs: int) -> nn.Module:
        network = ResidualMLP(
            n_inputs,
            n_outputs,
            hidden_features=hidden_features,
            n_blocks=n_blocks,
            context_features=context_features or 0,
        )
        return BoundedConditioner(network)

    mask = (torch.arange(features) + odd) % 2
    if spline:
        return SplineCoupling(mask, conditioner, n_bins)
    return (nft.AffineCouplingTransform if mixed else StretchingAffineCoupling)(mask, conditioner)


FLOW_TRANSFORMS = ("maf", "nsf-autoregressive", "nsf-coupling", "realnvp")
"""Names that `make_flow_transform` knows."""


def make_flow_transform(
    name: str,
    features: int,
    *,
    context_features: int | None = None,
    n_layers: int = 5,
    hidden_features: int = 64,
    n_blocks: int = 2,
    n_bins: int = 8,
    mix: bool = True,
) -> nn.Module:
    """Build one of the named invertible maps.

    Parameters
    ----------
    name : {"nsf-coupling", "nsf-autoregressive", "maf", "realnvp"}
        The elementwise function and how it is conditioned.
    features : int
        Columns D. With one column there is nothing to couple, and the couplings become their autoregressive
        counterparts (which then condition on nothing but the context).
    context_features : int, optional
        Width of a conditioning vector; None for none.
    n_layers : int, default=5
        Layers of the chain.
    hidden_features, n_blocks : int
        Size of each conditioner.
    n_bins : int, default=8
        Bins of the splines.
    mix : bool, default=True
        Put a trained linear map (LU) between the layers; else the order of the columns is reversed.

    Returns
    -------
    module
        ``forward(x, context) -> (u, logabsdet)`` and ``inverse(u, context) -> (x, logabsdet)`` with x and u of
        shape ``(B, D)`` and logabsdet of shape ``(B,)``.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in FLOW_TRANSFORMS:
        known = ", ".join(repr(known) for known in FLOW_TRANSFORMS)
        raise ValueError(f"transform={name!r} is unknown. Known transforms: {known}; or pass a factory.")
    spline = name.startswith("nsf")
    sizes = (spline, features, context_features, hidden_features, n_blocks, n_bins)
    coupled = name in ("nsf-coupling", "realnvp") and features > 1
    layers: list[nn.Module] = []
    for k in range(n_layers):
        if k > 0 and features > 1:
            # A coupling alternates its halves by its mask; an autoregressive order has to be turned round.
            if not coupled:
                layers.append(nft.ReversePermutation(features))
            if mix:
                layers.append(LULinear(features))
        if coupled:
            layers.append(_coupling(*sizes, odd=bool(k % 2), mixed=mix))
        else:
            layers.append(_autoregressive(*sizes, mixed=mix))
    return nft.CompositeTransform(layers)


class FlowModel(nn.Module):
    """The density of equation 1, optionally conditional on a noise level.

    Parameters
    ----------
    transform : module
        ``forward(x, context)`` and ``inverse(u, context)`` as `make_flow_transform` returns.
    features : int or tuple of int
        Columns D, or the shape E of images.
    noise_levels : tuple of float, optional
        Smallest and largest noise level s that the model is conditional on; None for an unconditional model.
        The context is ``(B, 1)``: log s, scaled to [-1, 1] over that range.
    grain : Tensor of shape E, optional
        Deviation of the dequantisation noise of each column: the model is the density of x + grain * e + s * e'.
        The training objective adds it; here it only sets the scale that the layers work in.
    """

    grain: torch.Tensor
    spread: torch.Tensor

    def __init__(
        self,
        transform: nn.Module,
        features: int | tuple[int, ...],
        *,
        noise_levels: tuple[float, float] | None = None,
        grain: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        check_levels(noise_levels)
        self.event_shape = (features,) if isinstance(features, int) else tuple(features)
        self.tails = CompressedTails()
        self.transform = transform
        self.features = features
        self.noise_levels = noise_levels
        self.register_buffer("grain", torch.zeros(self.event_shape) if grain is None else grain)
        self.register_buffer("spread", (1 + self.grain.square()).sqrt())

    def _context(self, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor | None:
        if self.noise_levels is None:
            return None
        low, high = (math.log(level) for level in self.noise_levels)
        log_noise = x.new_full((len(x),), low) if noise is None else noise.log()
        return ((2 * log_noise - low - high) / (high - low)).unsqueeze(1)

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Log-density; the same as `log_prob`."""
        return self.log_prob(x, noise)

    def log_prob(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Log-density of rows, in nats.

        Parameters
        ----------
        x : Tensor of shape (B, *E)
        noise : Tensor of shape (B,), optional
            Noise level of each row; the smallest one if None. Ignored by an unconditional model.

        Returns
        -------
        Tensor of shape (B,)
        """
        check_rows(x, self.event_shape)
        y, log_det_tails = self.tails(x / self.spread)
        u, log_det = self.transform(y, self._context(x, noise))
        check_shape(u, tuple(y.shape), "The transform")
        check_shape(log_det, (len(y),), "The transform's log-determinant")
        log_base = -0.5 * (u.flatten(1).square().sum(1) + math.prod(self.event_shape) * math.log(2 * math.pi))
        return log_base + log_det + log_det_tails - self.spread.log().sum()

    def log_prob_by_place(self, x: torch.Tensor) -> torch.Tensor:
        """Share of each pixel in the log-density of images, where the transform has such shares (`Glow` has).

        Parameters
        ----------
        x : Tensor of shape (B, C, H, W)

        Returns
        -------
        Tensor of shape (B, H, W)
            In nats. They add up to `log_prob`.
        """
        check_rows(x, self.event_shape)
        y, log_slope = compress_values(x / self.spread)
        transform: Any = self.transform
        return transform.log_prob_by_place(y) + (log_slope - self.spread.log()).sum(1)

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Minus the log-density at the smallest noise level: the energy of a model whose log Z is 0."""
        return -self.log_prob(x)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, *E)`` rows from the density at the smallest noise level."""
        reference = next(self.parameters())
        u = torch.randn(
            (n, *self.event_shape), generator=generator, dtype=reference.dtype, device=reference.device
        )
        transform: Any = self.transform  # its inverse is part of our contract, not of nn.Module's
        y, _ = transform.inverse(u, self._context(u, None))
        x, _ = self.tails.inverse(y)
        return x * self.spread
