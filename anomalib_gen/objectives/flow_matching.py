r"""Flow matching: learn the velocity by which noise flows to the data.

Rows x_0 and noise e are joined by the path x_t = alpha x_0 + sigma e. The velocity of a pair is known, and the mean
of those that pass through a place,

    u(x, t) = E[alpha' x_0 + sigma' e | x_t = x],                                                    (1)

carries the noise to the data as an ordinary differential equation dx / dt = u. It is the minimum of

    E |u_theta(x_t, t) - (alpha' x_0 + sigma' e)|^2 / 2,     t uniform                               (2)

(Lipman et al. 2023, arXiv:2210.02747, equation 14, with time reversed). On the straight path, alpha = 1 - t and sigma
= t, the target is e - x_0. With u_theta = alpha' D + sigma' (x_t - alpha D) / sigma, the velocity of a denoiser D,
the two sides of (2) differ by

    u_theta - (alpha' x_0 + sigma' e) = (alpha' - alpha sigma' / sigma) (D - x_0),                   (3)

so that (2) *is* denoising, with the weight (alpha' - alpha sigma' / sigma)^2; on the straight path 1 / t^2.

Rows and noise need not be independent: any pairing that leaves both as they are gives a flow between them. Pairs of a
batch that are matched by optimal transport, the permutation pi with the least sum of |x_i - e_pi(i)|^2, cross each
other less; the flow is straighter and takes fewer steps to follow (Tong et al. 2024, arXiv:2302.00482). The price:
the noise in x_t is not independent of the row any more, so the model's velocity remains a flow from noise to data,
but its score is not that of rows with added noise, and what rests on that (denoising, score norms, ancestral
sampling) is for independent pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

from anomalib_gen._component import Component
from anomalib_gen._runtime import expand_as_rows, normal_like, row_blocks
from anomalib_gen.objectives._levels import clean_rows, judged_draws, places, uniform_times, unseen

PAIRINGS = ("independent", "optimal-transport")
PAIRED_ROWS = 256
"""Rows matched at once: of more the pairs are closer still, but the time grows up to cubically."""


class FlowMatching(Component):
    """Squared error of the velocity (equation 2).

    The model is a `Denoiser`: it needs ``predict(x_t, t)`` and a `path`, usually `paths.Linear`. Times are uniform
    over the path's clock, or over its steps where it is discrete. Where the model has a `grain`, rows get the noise
    of the grain first.

    Parameters
    ----------
    pairing : {"independent", "optimal-transport"}, default="independent"
        How rows meet noise. With "optimal-transport" they are matched within each batch, in groups of at most 256
        rows, and the model is good for flows along the ordinary differential equation alone, see the module's text.
        The matching takes 5 to 15 milliseconds for 256 rows, longest where columns are few.

    References
    ----------
    Lipman, Y., Chen, R. T. Q., Ben-Hamu, H., Nickel, M., Le, M. (2023). Flow matching for generative modeling. ICLR.
    arXiv:2210.02747.

    Tong, A. et al. (2024). Improving and generalizing flow-based generative models with minibatch optimal transport.
    TMLR. arXiv:2302.00482.
    """

    def __init__(self, *, pairing: str = "independent") -> None:
        self.pairing = pairing

    def __call__(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of each row of ``(B, *E)``, as ``(B,)``."""
        t = uniform_times(model.path, places(len(x), x, generator))
        clean = clean_rows(model, x, generator)
        return _loss(unseen(model, x), clean, t, self._pair(clean, normal_like(x, generator)))

    def validate(self, model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss by which training is judged, ``(B,)``.

        The same, over noise in pairs e and -e and, for few rows, over more draws, each row at times spread evenly.
        `train` gives the same noise at every evaluation.
        """
        draws = judged_draws(x)
        t = uniform_times(model.path, places(len(x), x, generator, draws=draws)).repeat(2)
        repeated = x.repeat(draws, *[1] * (x.ndim - 1))
        clean, e = clean_rows(model, repeated, generator), normal_like(repeated, generator)
        # All at once, so that few rows are matched among as many as in training.
        clean = torch.cat([clean, clean])
        e = self._pair(clean, torch.cat([e, -e]))
        model = unseen(model, torch.cat([repeated, repeated]))
        return _loss(model, clean, t, e).reshape(2 * draws, len(x)).mean(0)

    def _pair(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Put noise ``(B, *E)`` in the order in which it meets the rows."""
        if self.pairing == "independent":
            return e
        if self.pairing != "optimal-transport":
            known = ", ".join(map(repr, PAIRINGS))
            raise ValueError(f"pairing={self.pairing!r} is unknown. Known: {known}.")
        matched = [match_by_transport(x[rows], e[rows]) for rows in row_blocks(len(x), PAIRED_ROWS)]
        return torch.cat(matched)


def match_by_transport(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Noise `e` ``(B, *E)`` in the order that has the least sum of squared distances to the rows `x` ``(B, *E)``."""
    # |x - e|^2 without what no permutation changes. So the match depends on no scale of the noise, and is the same for
    # all paths.
    gain = (x.detach().double().flatten(1) @ e.double().flatten(1).T).cpu().numpy()
    _, order = linear_sum_assignment(gain, maximize=True)
    return e[torch.from_numpy(order).to(e.device)]


def _loss(model: Any, x: torch.Tensor, t: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    path = model.path
    velocity = expand_as_rows(path.alpha_dot(t), x) * x + expand_as_rows(path.sigma_dot(t), x) * e
    error = model.predict(path.add_noise(x, t, e), t).velocity - velocity
    return 0.5 * error.square().flatten(1).sum(1)
