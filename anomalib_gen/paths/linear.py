r"""The straight path of flow matching: x_t = (1 - t) x_0 + t e.

Its velocity e - x_0 is constant along each pair of row and noise (Lipman et al. 2023, arXiv:2210.02747, section 4.1,
with time reversed: there t = 1 is the data; Liu et al. 2023, arXiv:2209.03003). With rows and noise paired by optimal
transport the mean velocity is nearly straight as well (Tong et al. 2024, arXiv:2302.00482); see
`objectives.FlowMatching`.
"""

from __future__ import annotations

import torch

from anomalib_gen.paths._path import Path


class Linear(Path):
    """Straight lines between rows and noise.

    Parameters
    ----------
    time_min, time_max : float, default=1e-3 and 0.99
        Ends of the path. At t = 1 nothing of the row would be left; noise levels are t / (1 - t).

    References
    ----------
    Lipman, Y., Chen, R. T. Q., Ben-Hamu, H., Nickel, M., Le, M. (2023). Flow matching for generative modeling. ICLR.
    arXiv:2210.02747.
    """

    def __init__(self, *, time_min: float = 1e-3, time_max: float = 0.99) -> None:
        self.time_min = time_min
        self.time_max = time_max

    @property
    def time_range(self) -> tuple[float, float]:
        """``time_min`` and ``time_max``."""
        return self.time_min, self.time_max

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """``1 - t``."""
        return 1 - t

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The time."""
        return t

    def alpha_dot(self, t: torch.Tensor) -> torch.Tensor:
        """Minus one."""
        return -torch.ones_like(t)

    def sigma_dot(self, t: torch.Tensor) -> torch.Tensor:
        """One."""
        return torch.ones_like(t)

    def time(self, noise_level: torch.Tensor) -> torch.Tensor:
        """Time of a noise level."""
        return noise_level / (1 + noise_level)
