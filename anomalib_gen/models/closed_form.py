"""Energies in closed form, for teaching and for checking everything else against.

    GaussianEnergy         |L^T (x - m)|^2 / 2                                                 log Z closed
    QuadraticEnergy        x^T A x / 2 - b^T x                                                 closed, if A is definite
    GaussianMixtureEnergy  -log sum_k w_k N(x; m_k, C_k + s^2 I)                               log Z = 0
    BinaryRBM              -b^T v - sum_j log(1 + exp(c_j + (W^T v)_j))                        a sum over states
    GaussianBernoulliRBM   |(v - b) / s|^2 / 2 - sum_j log(1 + exp(c_j + (W^T (v / s^2))_j))   a sum over hidden states

The energies of the two restricted Boltzmann machines are free energies: the hidden units are summed out (Hinton 2002,
doi:10.1162/089976602760128018; Hinton and Salakhutdinov 2006, doi:10.1126/science.1127647). All are `torch.nn.Module`s
with ``energy(x) -> (B,)``, ``score(x) -> (B, D)`` and ``log_partition() -> scalar``, and all can be trained.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from anomalib_gen.samplers import score_of

MAX_ENUMERATED = 20
"""Units whose states are enumerated for an exact log Z: a million states."""


def _parameter(value: torch.Tensor, shape: tuple[int, ...], name: str) -> nn.Parameter:
    """Parameter of a shape; a smaller one would broadcast in the energy and be missing from log Z."""
    if value.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(value.shape)}.")
    return nn.Parameter(value)


class ClosedFormEnergy(nn.Module):
    """What these models share: the score is minus the energy's gradient."""

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Energy ``(B,)`` of rows ``(B, D)``, in nats."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Energy; the same as `energy`."""
        return self.energy(x)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """Gradient of log p, ``(B, D)``."""
        return score_of(self.energy, create_graph=torch.is_grad_enabled())(x)

    def log_partition(self) -> torch.Tensor:
        """Exact log Z, a scalar."""
        raise NotImplementedError


class GaussianEnergy(ClosedFormEnergy):
    """A normal with a trained mean m and precision L L^T.

    Parameters
    ----------
    mean : Tensor of shape (D,)
    precision_factor : Tensor of shape (D, D)
        Lower triangular L with a non-zero diagonal; entries above it are not used.
    """

    def __init__(self, mean: torch.Tensor, precision_factor: torch.Tensor) -> None:
        super().__init__()
        size = mean.numel()
        self.mean = _parameter(mean, (size,), "mean")
        self.precision_factor = _parameter(precision_factor, (size, size), "precision_factor")

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Energy ``(B,)`` of rows ``(B, D)``."""
        return 0.5 * ((x - self.mean) @ self.precision_factor.tril()).square().sum(1)

    def log_partition(self) -> torch.Tensor:
        """``D/2 log 2 pi - log |det L|``."""
        log_det = self.precision_factor.diagonal().abs().log().sum()
        return 0.5 * len(self.mean) * math.log(2 * math.pi) - log_det

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, D)`` rows: x = m + L^-T e."""
        e = torch.randn(
            (n, len(self.mean)), generator=generator, dtype=self.mean.dtype, device=self.mean.device
        )
        factor = self.precision_factor.detach().tril()
        return self.mean.detach() + torch.linalg.solve_triangular(factor, e, upper=False, left=False)


class QuadraticEnergy(ClosedFormEnergy):
    """x^T A x / 2 - b^T x with A any symmetric matrix: linear in its parameters, as in exponential families.

    Score matching fits it in closed form (Hyvarinen 2005, section 3.1).

    Parameters
    ----------
    matrix : Tensor of shape (D, D)
        A; its symmetric part is used.
    linear : Tensor of shape (D,)
        b.
    """

    def __init__(self, matrix: torch.Tensor, linear: torch.Tensor) -> None:
        super().__init__()
        size = linear.numel()
        self.matrix = _parameter(matrix, (size, size), "matrix")
        self.linear = _parameter(linear, (size,), "linear")

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Energy ``(B,)`` of rows ``(B, D)``."""
        return 0.5 * ((x @ self.matrix) * x).sum(1) - x @ self.linear

    def log_partition(self) -> torch.Tensor:
        """D/2 log 2 pi - log det A / 2 + b^T A^-1 b / 2; infinite unless A is positive definite."""
        matrix = (self.matrix + self.matrix.t()) / 2
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            return torch.full_like(self.linear[0], math.inf)
        whitened = torch.linalg.solve_triangular(factor, self.linear.unsqueeze(1), upper=False)
        constant = 0.5 * len(self.linear) * math.log(2 * math.pi)
        return constant - factor.diagonal().log().sum() + 0.5 * whitened.square().sum()


class GaussianMixtureEnergy(ClosedFormEnergy):
    """A mixture of normals, normalised: also with Gaussian noise added, whose score is then known exactly.

    Parameters
    ----------
    log_weights : Tensor of shape (K,)
        Log of the weights, up to a constant.
    means : Tensor of shape (K, D)
    factors : Tensor of shape (K, D, D)
        Lower triangular; covariances are factor times its transpose.
    """

    def __init__(self, log_weights: torch.Tensor, means: torch.Tensor, factors: torch.Tensor) -> None:
        super().__init__()
        n_components, size = log_weights.numel(), means.shape[-1]
        self.log_weights = _parameter(log_weights, (n_components,), "log_weights")
        self.means = _parameter(means, (n_components, size), "means")
        self.factors = _parameter(factors, (n_components, size, size), "factors")

    def _whitened(
        self, x: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Component log-densities with weights ``(B, K)``, C^-1 (x - m) ``(B, K, D)``, and factors of C."""
        factors = self.factors.tril()
        covariances = (factors @ factors.mT).expand(len(x), -1, -1, -1)
        if noise is not None:
            identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            covariances = covariances + noise.square().reshape(-1, 1, 1, 1) * identity
        factors = torch.linalg.cholesky(covariances)
        difference = (x.unsqueeze(1) - self.means).unsqueeze(-1)
        solved = torch.cholesky_solve(difference, factors)
        log_det = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        distance = (difference * solved).sum((-2, -1))
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi)
        log_joint = self.log_weights.log_softmax(0) - 0.5 * distance - log_det - constant
        return log_joint, solved.squeeze(-1), factors

    def energy(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Minus the log-density ``(B,)`` of rows ``(B, D)``, with noise of deviation `noise` ``(B,)`` if given."""
        return -self._whitened(x, noise)[0].logsumexp(1)

    def score(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Gradient of log p, -sum_k p(k | x) C_k^-1 (x - m_k), ``(B, D)``."""
        log_joint, solved, _ = self._whitened(x, noise)
        return -(log_joint.softmax(1).unsqueeze(-1) * solved).sum(1)

    def log_partition(self) -> torch.Tensor:
        """Zero: the density is normalised."""
        return torch.zeros_like(self.log_weights[0])

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(n, D)`` rows."""
        k = torch.multinomial(self.log_weights.softmax(0), n, replacement=True, generator=generator)
        shape = (n, self.means.shape[1], 1)
        e = torch.randn(shape, generator=generator, dtype=self.means.dtype, device=self.means.device)
        return self.means[k] + (self.factors.tril()[k] @ e).squeeze(-1)


class _RestrictedBoltzmannMachine(ClosedFormEnergy):
    """Visible and hidden units that are independent given each other.

    Parameters
    ----------
    weights : Tensor of shape (n_visible, n_hidden)
        W.
    visible_bias : Tensor of shape (n_visible,)
        b.
    hidden_bias : Tensor of shape (n_hidden,)
        c.
    """

    def __init__(self, weights: torch.Tensor, visible_bias: torch.Tensor, hidden_bias: torch.Tensor) -> None:
        super().__init__()
        n_visible, n_hidden = visible_bias.numel(), hidden_bias.numel()
        self.weights = _parameter(weights, (n_visible, n_hidden), "weights")
        self.visible_bias = _parameter(visible_bias, (n_visible,), "visible_bias")
        self.hidden_bias = _parameter(hidden_bias, (n_hidden,), "hidden_bias")

    def hidden_probabilities(self, v: torch.Tensor) -> torch.Tensor:
        """P(h_j = 1 | v), ``(B, n_hidden)``."""
        return self._hidden_input(v).sigmoid()

    def _hidden_input(self, v: torch.Tensor) -> torch.Tensor:
        return self.hidden_bias + v @ self.weights

    def sample_visible(self, h: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw v given h ``(B, n_hidden)``."""
        raise NotImplementedError

    @torch.no_grad()
    def gibbs(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One sweep of block Gibbs sampling, hidden given visible and back; leaves p(v) invariant."""
        h = _bernoulli(self.hidden_probabilities(x), generator)
        return self.sample_visible(h, generator)


class BinaryRBM(_RestrictedBoltzmannMachine):
    """Restricted Boltzmann machine of binary units, -E(v, h) = b^T v + c^T h + v^T W h."""

    def joint_energy(self, v: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Energy ``(B,)`` of visible and hidden units together."""
        return -(v @ self.visible_bias + h @ self.hidden_bias + ((v @ self.weights) * h).sum(1))

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Free energy ``(B,)`` of visible units ``(B, n_visible)`` in {0, 1}."""
        return -x @ self.visible_bias - F.softplus(self._hidden_input(x)).sum(1)

    def sample_visible(self, h: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw v ``(B, n_visible)`` given h."""
        return _bernoulli((self.visible_bias + h @ self.weights.t()).sigmoid(), generator)

    def log_partition(self) -> torch.Tensor:
        """Exact log Z: the smaller layer's states are enumerated, the other one is summed out."""
        if self.weights.shape[0] <= self.weights.shape[1]:
            return (-self.energy(_states(self.visible_bias))).logsumexp(0)
        h = _states(self.hidden_bias)
        visible = F.softplus(self.visible_bias + h @ self.weights.t()).sum(1)
        return (h @ self.hidden_bias + visible).logsumexp(0)

    def pseudo_log_likelihood(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over i of log p(v_i | the others), ``(B,)`` (Besag 1975, doi:10.2307/2987782)."""
        free = self.energy(x)
        flips = 1 - 2 * x
        # Flipping v_i moves the hidden inputs by one row of W.
        inputs = self._hidden_input(x).unsqueeze(1) + flips.unsqueeze(-1) * self.weights
        flipped = -((x @ self.visible_bias).unsqueeze(1) + flips * self.visible_bias) - F.softplus(
            inputs
        ).sum(-1)
        return F.logsigmoid(flipped - free.unsqueeze(1)).sum(1)


class GaussianBernoulliRBM(_RestrictedBoltzmannMachine):
    """Restricted Boltzmann machine of real visible and binary hidden units.

    ``E(v, h) = |(v - b) / s|^2 / 2 - c^T h - (v / s^2)^T W h``, so v given h is normal with mean b + W h and
    deviations s (the form of Cho et al. 2011, doi:10.1007/978-3-642-21735-7_2): a mixture of 2^n_hidden normals.

    Parameters
    ----------
    weights : Tensor of shape (n_visible, n_hidden)
    visible_bias : Tensor of shape (n_visible,)
    hidden_bias : Tensor of shape (n_hidden,)
    log_scale : Tensor of shape (n_visible,)
        log s.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        visible_bias: torch.Tensor,
        hidden_bias: torch.Tensor,
        log_scale: torch.Tensor,
    ) -> None:
        super().__init__(weights, visible_bias, hidden_bias)
        self.log_scale = _parameter(log_scale, tuple(visible_bias.shape), "log_scale")

    def _hidden_input(self, v: torch.Tensor) -> torch.Tensor:
        return self.hidden_bias + (v * (-2 * self.log_scale).exp()) @ self.weights

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Free energy ``(B,)`` of visible units ``(B, n_visible)``."""
        quadratic = 0.5 * ((x - self.visible_bias) * (-self.log_scale).exp()).square().sum(1)
        return quadratic - F.softplus(self._hidden_input(x)).sum(1)

    def sample_visible(self, h: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw v ``(B, n_visible)`` given h."""
        mean = self.visible_bias + h @ self.weights.t()
        e = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.log_scale.exp() * e

    def log_partition(self) -> torch.Tensor:
        """Exact log Z: the normal integrals of all hidden states, summed."""
        h = _states(self.hidden_bias)
        shift = (h @ self.weights.t()) * (-self.log_scale).exp()
        bias = self.visible_bias * (-self.log_scale).exp()
        exponent = h @ self.hidden_bias + (shift * bias).sum(1) + 0.5 * shift.square().sum(1)
        constant = 0.5 * len(self.visible_bias) * math.log(2 * math.pi) + self.log_scale.sum()
        return exponent.logsumexp(0) + constant


def _bernoulli(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(
        probabilities.shape, generator=generator, dtype=probabilities.dtype, device=probabilities.device
    )
    return (uniform < probabilities).to(probabilities)


def _states(like: torch.Tensor) -> torch.Tensor:
    """All binary states ``(2^n, n)`` of n units."""
    n = len(like)
    if n > MAX_ENUMERATED:
        raise ValueError(f"log Z by enumeration needs at most {MAX_ENUMERATED} units on one side, got {n}.")
    codes = torch.arange(2**n, device=like.device).unsqueeze(1)
    return ((codes >> torch.arange(n, device=like.device)) & 1).to(like)
