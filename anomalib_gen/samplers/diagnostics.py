r"""How much draws are worth: effective sample size and convergence of chains, and the tail of importance weights.

N correlated draws with autocorrelations rho_t estimate a mean as well as N / tau independent ones, where

    tau = 1 + 2 sum_{t >= 1} rho_t.                                                  (1)

The sum of the estimates never settles. For a reversible chain the sums of neighbours P_k = rho_2k + rho_2k+1 are
positive and fall, so the estimated ones are cut at the first that is not positive and kept from rising: Geyer's
initial monotone sequence (1992, doi:10.1214/ss/1177011137, section 3.3), tau = -1 + 2 sum_k P_k. With M chains of N
draws, rho_t compares the autocovariance within chains to the variance over all of them (Gelman et al. 2013, BDA3,
equation 11.7; Vehtari et al. 2021, arXiv:1903.08008, equation 10), so chains that disagree are worth little:

    W = mean of the variances within chains,  B / N = variance of the chains' means,
    V = (N - 1) / N W + B / N,
    rho_t = 1 - (W - mean over chains of their autocovariance at t) / V.             (2)

Split R-hat is sqrt(V / W) after each chain was cut into halves (BDA3, equation 11.4): 1 when chains have converged, and
infinite for chains that stay for ever where they began, in different places.

Importance weights above a high threshold have nearly a generalised Pareto distribution,

    P(w > u + y) / P(w > u) = (1 + k y / s)^(-1/k),                                  (3)

whatever they are (Pickands 1975, doi:10.1214/aos/1176343003). For k < 1/2 they have a variance, and their mean an error
bar; for k < 1 they have a mean. Above k = 0.7 the draws that it takes are too many to be had (Vehtari et al. 2024,
arXiv:1507.02646, section 3). k is estimated from the largest M = min(n / 5, 3 sqrt(n)) of n weights by the posterior
mean of Zhang & Stephens (2009, doi:10.1198/tech.2009.08017), drawn towards 1/2 as if by ten more weights.
"""

from __future__ import annotations

import math

import torch


@torch.no_grad()
def effective_sample_size(samples: torch.Tensor) -> torch.Tensor:
    """Independent draws that chains are worth for each mean (equations 1 and 2).

    Parameters
    ----------
    samples : Tensor
        ``(N, B, *E)``: N draws of each of B chains, N at least 4.

    Returns
    -------
    Tensor
        ``(*E)``, in the precision of `samples`. At most N B log10(N B), since antithetic chains beat independent draws
        without limit; NaN where all samples are alike or one is not finite.
    """
    samples = _check(samples)
    n, m = samples.shape[:2]
    chains = samples.double() if samples.device.type != "mps" else samples
    centred = chains - chains.mean(0)
    # The correlation theorem; zeros as many as draws keep the circle from closing.
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n] / n
    within, total = _variances(chains)
    # (2) wants the unbiased variance W and autocovariances with the same factor.
    rho = 1 - (within - covariance.mean(1) * n / (n - 1)) / total
    rho[0] = 1.0
    pairs = rho[: n - n % 2].reshape(n // 2, 2, *rho.shape[1:]).sum(1)
    positive = (pairs > 0).cumprod(0)
    monotone = torch.cummin(pairs, dim=0).values * positive
    tau = (2 * monotone.sum(0) - 1).clamp(min=1 / torch.log10(torch.tensor(float(max(10, n * m)))))
    valid = _differ(samples) & total.isfinite()
    return torch.where(valid, n * m / tau, torch.nan).to(samples.dtype)


@torch.no_grad()
def split_rhat(samples: torch.Tensor) -> torch.Tensor:
    """Potential scale reduction of split chains; above about 1.01 they have not converged.

    Parameters
    ----------
    samples : Tensor
        ``(N, B, *E)``: N draws of each of B chains, N at least 4. Of an odd number the middle draw is left out.

    Returns
    -------
    Tensor
        ``(*E)``; infinity where chains stand still in different places, NaN where all samples are alike or one is not
        finite.
    """
    samples = _check(samples)
    n = len(samples)
    halves = torch.cat([samples[: n // 2], samples[n - n // 2 :]], dim=1)
    within, total = _variances(halves)
    return torch.where(_differ(samples) & total.isfinite(), (total / within).sqrt(), torch.nan)


@torch.no_grad()
def pareto_k(log_weights: torch.Tensor) -> float:
    """Shape k of the tail of importance weights (equation 3): above 0.7 their mean is not to be relied on.

    Parameters
    ----------
    log_weights : Tensor
        ``(n,)``, logs of the weights up to a constant; -inf for a weight of zero.

    Returns
    -------
    float
        NaN where fewer than five weights lie above the threshold: there are fewer than 25, or most are alike or zero.
    """
    n = len(log_weights)
    n_tail = min(n // 5, math.ceil(3 * math.sqrt(n)))
    log_w = log_weights.cpu().double()
    w = (log_w - log_w.max()).exp().sort().values
    if n_tail < 5 or not bool(w.isfinite().all()):
        return math.nan
    y = w[-n_tail:] - w[-n_tail - 1]
    y = y[y > 0]
    m = len(y)
    if m < 5:
        return math.nan
    # Their theta = -k / s: a grid of quantiles of its prior, and the profile likelihood there.
    n_grid = 30 + int(math.sqrt(m))
    j = torch.arange(1, n_grid + 1, dtype=y.dtype, device=y.device)
    theta = 1 / y[-1] + (1 - (n_grid / (j - 0.5)).sqrt()) / (3 * y[int(m / 4 + 0.5) - 1])
    k = torch.log1p(-theta.unsqueeze(1) * y).mean(1)
    posterior = (m * ((-theta / k).log() - k - 1)).softmax(0)
    estimate = float(torch.log1p(-(posterior * theta).sum() * y).mean())
    return (m * estimate + 10 * 0.5) / (m + 10)


def _variances(chains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W and V of equation 2, each ``(*E)``."""
    n, m = chains.shape[:2]
    within = chains.var(0).mean(0)
    between = chains.mean(0).var(0) if m > 1 else torch.zeros_like(within)
    return within, (n - 1) / n * within + between


def _differ(samples: torch.Tensor) -> torch.Tensor:
    """Whether not all samples are alike, ``(*E)``; the variance of equal numbers may be a rounding error above zero."""
    return samples.amax((0, 1)) > samples.amin((0, 1))


def _check(samples: torch.Tensor) -> torch.Tensor:
    """Return draws as floating-point numbers; refuse too few of them."""
    if not isinstance(samples, torch.Tensor):
        raise TypeError(
            f"samples must be a torch.Tensor, got a {type(samples).__name__}; see torch.as_tensor."
        )
    if samples.ndim < 2 or samples.shape[0] < 4 or samples.shape[1] < 1:
        raise ValueError(f"samples must be (N, B, *E) with N >= 4 and B >= 1, got {tuple(samples.shape)}.")
    return samples if samples.is_floating_point() else samples.to(torch.get_default_dtype())
