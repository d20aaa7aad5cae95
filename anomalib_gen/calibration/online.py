r"""False discoveries in a stream: decide on each row when it comes, and keep the rate over all of them.

A batch method sees all p-values before it decides. In a stream each p_t is compared at once with a level alpha_t that
depends on the past alone. Generalised alpha-investing pays for tests from a wealth and earns alpha back with each
discovery; with an endowment w_0, discoveries at times tau_1, tau_2, ... and weights gamma_1 >= gamma_2 >= ... of sum 1,

    LORD++    alpha_t = w_0 gamma_t + (alpha - w_0) gamma_{t - tau_1} + alpha sum_{j >= 2} gamma_{t - tau_j}

    SAFFRON   alpha_t = min{lambda, (1 - lambda) (w_0 gamma_{t - C_0} + (alpha - w_0) gamma_{t - tau_1 - C_1}
                                                  + alpha sum_{j >= 2} gamma_{t - tau_j - C_j})}

where C_j counts the candidates (p_i <= lambda) between tau_j and t: SAFFRON pays for tests above lambda only, as Storey
does for batches, and so has more to spend where anomalies are many. ADDIS also discards p-values above theta, which
carry next to no evidence; it helps where p-values of normal rows are conservative. In its formula t and tau_j count
the rows that are kept, and the factor is (theta - lambda) in place of (1 - lambda).

All three keep E[V / max(R, 1)] at alpha at every time if the p-values of normal rows are valid and independent of each
other and of the rest. Split-conformal p-values of one calibration set are valid and independent *given that set* only
after `conditional_p_values`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import exp, isfinite, log, sqrt
from numbers import Real
from typing import Any, ClassVar, Self

from scipy import special

from anomalib_gen._runtime import check_share

LORD_TERMS = 100_000
"""Terms of LORD's series summed one by one; the rest is an integral in closed form."""


def _lord_weight(j: int) -> float:
    """LORD's gamma_j before division by the sum (Javanmard and Montanari 2018)."""
    return log(max(j, 2)) / (j * exp(sqrt(log(j))))


@lru_cache(maxsize=1)
def _lord_sum() -> float:
    # With v = sqrt(log j) the rest is the integral of 2 v^3 exp(-v), from half a term on.
    v = sqrt(log(LORD_TERMS + 0.5))
    rest = 2 * exp(-v) * (v**3 + 3 * v**2 + 6 * v + 6)
    return sum(_lord_weight(j) for j in range(1, LORD_TERMS + 1)) + rest


def lord_gamma(j: int) -> float:
    """gamma_j ~ log(max(j, 2)) / (j exp(sqrt(log j))), of sum 1."""
    return _lord_weight(j) / _lord_sum()


SAFFRON_SUM = float(special.zeta(1.6))


def saffron_gamma(j: int) -> float:
    """gamma_j ~ j^-1.6, of sum 1 (Ramdas et al. 2018)."""
    return float(j**-1.6 / SAFFRON_SUM)


class OnlineControl(ABC):
    """Base of the online procedures: what is spent, what is earned, and a state of plain numbers.

    In each of them a test uses up one step of every endowment's gamma sequence unless its p-value is a candidate or is
    discarded. So the state is, for each endowment, the number of steps used; there is one endowment for the start and
    one for each discovery, and a test costs time in proportion to their number.
    """

    _parameters: ClassVar[tuple[str, ...]] = ("alpha", "initial_wealth")

    def __init__(self, *, alpha: float, initial_wealth: float | None) -> None:
        self.alpha = check_share(alpha, "alpha")
        wealth: Any = alpha / 2 if initial_wealth is None else initial_wealth
        if not isinstance(wealth, Real) or not 0 < float(wealth) <= alpha:
            raise ValueError(
                f"initial_wealth must be positive and at most alpha={alpha:g}, got {initial_wealth!r}."
            )
        self.initial_wealth = float(wealth)
        self.n_tests = 0
        self.n_discoveries = 0
        self.wealth = self.initial_wealth
        self._steps = [1]

    @staticmethod
    @abstractmethod
    def _gamma(j: int) -> float:
        """Weight of the jth step, j = 1, 2, ..."""

    @property
    @abstractmethod
    def level(self) -> float:
        """Level alpha_t that the next p-value is compared with."""

    @abstractmethod
    def _uses(self, p_value: float) -> bool:
        """Whether a test with this p-value is paid for."""

    @abstractmethod
    def _price(self, level: float) -> float:
        """What such a test costs."""

    def _spendable(self) -> float:
        """Sum over the endowments of what each gives to the next test."""
        start, *earned = self._steps
        total = self.initial_wealth * self._gamma(start)
        for number, step in enumerate(earned):
            total += (self.alpha - (self.initial_wealth if number == 0 else 0.0)) * self._gamma(step)
        return total

    def test(self, p_value: float) -> bool:
        """Decide on the next row.

        Parameters
        ----------
        p_value : float
            In [0, 1].

        Returns
        -------
        bool
            True for a discovery: the row is flagged.

        Raises
        ------
        ValueError
            If it is no p-value; the state is as before.
        TypeError
            If it is no number, such as an array.
        """
        try:
            p = float(p_value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"p_value must be one number, got {type(p_value).__name__}; test_each takes several."
            ) from error
        if not 0 <= p <= 1:
            raise ValueError(f"p_value must lie in [0, 1], got {p_value!r}.")
        level = self.level
        discovery = p <= level
        if self._uses(p):
            # A wealth is what is left of endowments that are spent in full only at infinity: rounding aside, positive.
            self.wealth = max(self.wealth - self._price(level), 0.0)
            self._steps = [step + 1 for step in self._steps]
        if discovery:
            self.wealth += self.alpha - (self.initial_wealth if self.n_discoveries == 0 else 0.0)
            self._steps.append(1)
            self.n_discoveries += 1
        self.n_tests += 1
        return discovery

    def test_each(self, p_values: Iterable[float]) -> Iterator[bool]:
        """Decide on rows one after the other, as they come.

        Parameters
        ----------
        p_values : iterable of float

        Yields
        ------
        bool
            True for a discovery.
        """
        for p_value in p_values:
            yield self.test(p_value)

    def get_state(self) -> dict[str, Any]:
        """Parameters and state as numbers, strings and lists, fit for JSON.

        Returns
        -------
        dict
        """
        return {
            "procedure": type(self).__name__,
            **{name: getattr(self, name) for name in self._parameters},
            "n_tests": self.n_tests,
            "n_discoveries": self.n_discoveries,
            "wealth": self.wealth,
            "steps": list(self._steps),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Go on where another object stopped.

        Parameters
        ----------
        state : dict
            From `get_state`.

        Returns
        -------
        online control of this class

        Raises
        ------
        ValueError
            If the state is that of another procedure, or damaged.
        """
        if state.get("procedure") != cls.__name__:
            raise ValueError(f"The state is one of {state.get('procedure')!r}, not of {cls.__name__!r}.")
        expected = {"procedure", *cls._parameters, "n_tests", "n_discoveries", "wealth", "steps"}
        if set(state) != expected:
            raise ValueError(f"The state should hold {sorted(expected)}, got {sorted(state)}.")
        control = cls(**{name: state[name] for name in cls._parameters})
        steps = [int(step) for step in state["steps"]]
        wealth = float(state["wealth"])
        if (
            len(steps) != state["n_discoveries"] + 1
            or min(steps) < 1
            or not (isfinite(wealth) and wealth >= 0)
        ):
            raise ValueError("The state is damaged: its steps, discoveries and wealth do not fit together.")
        control.n_tests, control.n_discoveries = int(state["n_tests"]), int(state["n_discoveries"])
        control.wealth, control._steps = wealth, steps
        return control

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._parameters)
        return f"{type(self).__name__}({arguments})"


class LORD(OnlineControl):
    """LORD++: online control of the false-discovery rate that pays for every test.

    Parameters
    ----------
    alpha : float, default=0.05
        False-discovery rate to keep.
    initial_wealth : float or None, default=None
        w_0 of the module, at most `alpha`; None takes half of it. More finds early anomalies sooner, less leaves more
        for later.

    Attributes
    ----------
    level : float
        What the next p-value is compared with.
    wealth : float
        What is left to spend, never negative.
    n_tests, n_discoveries : int
        So far.

    See Also
    --------
    SAFFRON : Finds more where anomalies are many.

    References
    ----------
    .. [1] Ramdas, A., Yang, F., Wainwright, M. J., Jordan, M. I. (2017). Online control of the false discovery rate
       with decaying memory. NeurIPS. arXiv:1710.00499.
    .. [2] Javanmard, A., Montanari, A. (2018). Online rules for control of false discovery rate and false discovery
       exceedance. Annals of Statistics, 46(2). arXiv:1603.09000.

    Examples
    --------
    >>> from anomalib_gen.calibration import LORD
    >>> control = LORD(alpha=0.1)
    >>> [control.test(p) for p in (1e-6, 0.2, 0.001, 0.04)]
    [True, False, True, False]
    >>> LORD.from_state(control.get_state()).level == control.level
    True
    """

    def __init__(self, *, alpha: float = 0.05, initial_wealth: float | None = None) -> None:
        super().__init__(alpha=alpha, initial_wealth=initial_wealth)

    _gamma = staticmethod(lord_gamma)

    @property
    def level(self) -> float:
        """Level alpha_t that the next p-value is compared with."""
        return self._spendable()

    def _uses(self, p_value: float) -> bool:
        return True

    def _price(self, level: float) -> float:
        return level


class SAFFRON(OnlineControl):
    """SAFFRON: online control of the false-discovery rate that adapts to the share of anomalies.

    Parameters
    ----------
    alpha : float, default=0.05
        False-discovery rate to keep.
    lambda_ : float, default=0.5
        p-values up to it are candidates and cost nothing.
    initial_wealth : float or None, default=None
        w_0 of the module, at most `alpha`; None takes half of it.

    Attributes
    ----------
    level : float
        What the next p-value is compared with, at most `lambda_`.
    wealth : float
        What is left to spend, never negative.
    n_tests, n_discoveries : int
        So far.

    See Also
    --------
    LORD : Pays for every test.
    ADDIS : Also discards p-values that are too large to be uniform.

    References
    ----------
    .. [1] Ramdas, A., Zrnic, T., Wainwright, M. J., Jordan, M. I. (2018). SAFFRON: an adaptive algorithm for online
       control of the false discovery rate. ICML. arXiv:1802.09098.

    Examples
    --------
    >>> from anomalib_gen.calibration import SAFFRON
    >>> control = SAFFRON(alpha=0.1)
    >>> list(control.test_each([1e-6, 0.2, 0.003, 0.04]))
    [True, False, True, True]
    """

    _parameters = ("alpha", "lambda_", "initial_wealth")

    def __init__(
        self, *, alpha: float = 0.05, lambda_: float = 0.5, initial_wealth: float | None = None
    ) -> None:
        check_share(lambda_, "lambda_")
        super().__init__(alpha=alpha, initial_wealth=initial_wealth)
        self.lambda_ = float(lambda_)

    _gamma = staticmethod(saffron_gamma)

    @property
    def level(self) -> float:
        """Level alpha_t that the next p-value is compared with."""
        return min(self.lambda_, (1 - self.lambda_) * self._spendable())

    def _uses(self, p_value: float) -> bool:
        return p_value > self.lambda_

    def _price(self, level: float) -> float:
        return level / (1 - self.lambda_)


class ADDIS(OnlineControl):
    """ADDIS: SAFFRON that discards p-values above a threshold, for conservative ones.

    Parameters
    ----------
    alpha : float, default=0.05
        False-discovery rate to keep.
    lambda_ : float, default=0.25
        p-values up to it are candidates and cost nothing.
    theta : float, default=0.5
        p-values above it are discarded and cost nothing; larger than `lambda_`. 1 makes it SAFFRON.
    initial_wealth : float or None, default=None
        w_0 of the module, at most `alpha`; None takes half of it.

    Attributes
    ----------
    level : float
        What the next p-value is compared with, at most `lambda_`.
    wealth : float
        What is left to spend, never negative.
    n_tests, n_discoveries : int
        So far.

    See Also
    --------
    anomalib_gen.calibration.conditional_p_values : Conservative p-values, for which discarding helps.

    Notes
    -----
    The p-values of normal rows have to be uniformly conservative, P(p <= t u | p <= t) <= u: uniform ones are, and
    those with an increasing density; those that are valid only on the whole need not be.

    References
    ----------
    .. [1] Tian, J., Ramdas, A. (2019). ADDIS: an adaptive discarding algorithm for online FDR control with conservative
       nulls. NeurIPS. arXiv:1905.11465.

    Examples
    --------
    >>> from anomalib_gen.calibration import ADDIS
    >>> control = ADDIS(alpha=0.1)
    >>> list(control.test_each([1e-6, 0.9, 0.003, 0.04]))
    [True, False, True, False]
    """

    _parameters = ("alpha", "lambda_", "theta", "initial_wealth")

    def __init__(
        self,
        *,
        alpha: float = 0.05,
        lambda_: float = 0.25,
        theta: float = 0.5,
        initial_wealth: float | None = None,
    ) -> None:
        check_share(lambda_, "lambda_")
        check_share(theta, "theta", with_one=True)
        if not lambda_ < theta:
            raise ValueError(f"0 < lambda_ < theta <= 1 is needed, got lambda_={lambda_!r}, theta={theta!r}.")
        super().__init__(alpha=alpha, initial_wealth=initial_wealth)
        self.lambda_, self.theta = float(lambda_), float(theta)

    _gamma = staticmethod(saffron_gamma)

    @property
    def level(self) -> float:
        """Level alpha_t that the next p-value is compared with."""
        return min(self.lambda_, (self.theta - self.lambda_) * self._spendable())

    def _uses(self, p_value: float) -> bool:
        return self.lambda_ < p_value <= self.theta

    def _price(self, level: float) -> float:
        return level / (self.theta - self.lambda_)
