r"""ComposedDetector: fitted detectors combined through their energies, without training.

Every model here has an energy E_i(x) = -log p_i(x) up to a constant, in nats, so concepts that were learned apart can
be put together (Hinton 2002, doi:10.1162/089976602760128018; Du, Li and Mordatch 2020, arXiv:2004.06030, section 3):

    product (and)   E(x) = sum_i w_i E_i(x_i)                      p ~ prod_i p_i^w_i               (1)
    mixture (or)    E(x) = -log sum_i pi_i exp(-E_i(x)) / Z_i      p ~ sum_i pi_i p_i               (2)

A row is normal under a product if every member finds it normal, and under a mixture if one of them does. A negative
weight in a product asks for rows that a member finds *abnormal* (not). The members of a product may look at different
columns x_i of a row, and constants do not matter to it. In a mixture Z_i is 1 for energies that are those of a density,
or of an autoencoder's bound on one, and what `normalize` found of an energy or diffusion model's. Rows are drawn from a
mixture by choosing a member, and from a product by Metropolis-adjusted Langevin chains on E (samplers.langevin).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn import get_config
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.metaestimators import _BaseComposition
from sklearn.utils.validation import check_is_fitted

from anomalib_gen import _runtime
from anomalib_gen._base import outlier_threshold, rows_in_use
from anomalib_gen._inputs import check_images, validate_rows
from anomalib_gen._outlier import OutlierScores
from anomalib_gen._runtime import check_count
from anomalib_gen._warnings import warn_user
from anomalib_gen.samplers import mala


class ComposedDetector(OutlierScores, _BaseComposition):
    """Outlier detection by the combined energies of several detectors.

    Parameters
    ----------
    detectors : list of (str, detector)
        Named members: detectors of this package, composed ones included.
    rule : {"product", "mixture"}, default="product"
        ``"product"`` adds the members' energies: a row must be normal to *all* of them. ``"mixture"`` adds their
        densities: it must be normal to *one* of them.
    weights : array-like of shape (n_detectors,) or None, default=None
        Of the energies in a product, where a negative one turns a member around (not), or of the densities in a
        mixture, where they are positive and are divided by their sum. None weights all alike: 1 each in a
        product, 1 / n in a mixture.
    columns : list of (list of int or str) or None, default=None
        The columns that each member looks at, by position or, for data frames, by name. None gives every member
        the columns it was fitted on, by name if it knows names, else all columns. Members of a mixture look at the
        same columns, in whatever order, because densities over different ones cannot be compared.
    prefit : bool, default=True
        Whether the members are fitted already. `fit` then trains nothing and only sets `offset_`. If False, `fit`
        fits clones of them; a `sklearn.frozen.FrozenEstimator` around a member excepts it, and keeps it
        fitted through `clone` as well.
    n_steps : int, default=500
        Steps of each chain that `sample` runs for a product; the first half adapts the step size.
    contamination : "auto" or float, default="auto"
        Sets `offset_`: the share of the rows given to `fit` that fall below it. "auto" takes the score that a new row
        of their kind falls below with a probability of .05. Rows that the members were fitted on look a little too
        normal, so give `fit` other ones where you can.
    random_state : int, RandomState instance or None, default=None
        Seeds the fitting of clones; the same for each of them.

    Attributes
    ----------
    detectors_ : list of detector
        The fitted members.
    weights_ : ndarray of shape (n_detectors,)
        The weights in use.
    offset_ : float
        Threshold on `score_samples`.
    event_shape_ : tuple of int
        Shape of one row: ``(n_features_in_,)``, or ``(channels, height, width)`` of an image.
    n_features_in_ : int
        Number of columns, or of channels.
    feature_names_in_ : ndarray of str
        Names of the columns, where X had names.

    See Also
    --------
    FlowDetector : A member with exact densities.
    sklearn.ensemble.VotingClassifier : Combines labels rather than energies.

    Notes
    -----
    Energies are in nats in the units of X, those of a flow exact, those of a variational autoencoder bounds, those of
    an energy model known up to a constant, which shifts a product's scores alike, and those of a diffusion model bounds
    that may be many nats off. In a mixture either would tilt the weights: there the energies of a member with a
    `log_normalizer_` have it added, so that it enters as a density. Call `normalize` of energy and diffusion models in
    a mixture first; one without counts as if its log Z were 0, and `fit` warns of it. Scores of a mixture are then log-
    densities where all members have densities, as those of a product are where its members have densities, look at
    different columns and have weights of 1. Another product has a constant of its own, which nothing here knows, not as
    a member of a mixture either.

    Members are not copied. One that is fitted again changes the scores from then on, but not `offset_`: call `fit`
    again.

    With negative weights a product need not be a density: energies may fall without end where the member that is
    turned around rises fastest. Scores are still finite; samples may leave the data.

    References
    ----------
    .. [1] Hinton, G. E. (2002). Training products of experts by minimizing contrastive divergence. Neural
       Computation, 14(8). doi:10.1162/089976602760128018.
    .. [2] Du, Y., Li, S., Mordatch, I. (2020). Compositional visual generation with energy based models. NeurIPS.
       arXiv:2004.06030.

    Examples
    --------
    Each pair of columns was learned alone. A row that is a little odd in both is found by their product only.

    >>> import numpy as np
    >>> from sklearn.base import clone
    >>> from anomalib_gen import ComposedDetector, FlowDetector
    >>> X = np.random.default_rng(0).normal(size=(1000, 4))
    >>> flow = FlowDetector(max_iter=100, contamination=0.01, random_state=0)
    >>> left, right = clone(flow).fit(X[:, :2]), clone(flow).fit(X[:, 2:])
    >>> both = ComposedDetector(
    ...     [("left", left), ("right", right)], columns=[[0, 1], [2, 3]], contamination=0.01
    ... ).fit(X)
    >>> left.predict([[1.8, 1.8]]), right.predict([[1.8, 1.8]]), both.predict([[1.8, 1.8, 1.8, 1.8]])
    (array([1]), array([1]), array([-1]))
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "detectors": [list],
        "rule": [StrOptions({"product", "mixture"})],
        "weights": ["array-like", None],
        "columns": [list, None],
        "prefit": ["boolean"],
        "n_steps": [Interval(Integral, 2, None, closed="left")],
        "contamination": [Interval(Real, 0, 0.5, closed="right"), StrOptions({"auto"})],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        detectors: list[tuple[str, Any]],
        *,
        rule: str = "product",
        weights: Any = None,
        columns: list[Any] | None = None,
        prefit: bool = True,
        n_steps: int = 500,
        contamination: float | str = "auto",
        random_state: Any = None,
    ) -> None:
        self.detectors = detectors
        self.rule = rule
        self.weights = weights
        self.columns = columns
        self.prefit = prefit
        self.n_steps = n_steps
        self.contamination = contamination
        self.random_state = random_state

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Get the parameters of this detector.

        Parameters
        ----------
        deep : bool, default=True
            Whether to add the members, by their names, and their parameters, as ``<name>__<parameter>``.

        Returns
        -------
        dict of str to value
        """
        params: dict[str, Any] = self._get_params("detectors", deep=deep)
        return params

    def set_params(self, **params: Any) -> Self:
        """Set parameters of this detector, its members by name, or theirs as ``<name>__<parameter>``.

        Parameters
        ----------
        **params : dict

        Returns
        -------
        self
        """
        self._set_params("detectors", **params)
        return self

    # Fitting ----------------------------------------------------------------------------------------------

    def get_metadata_routing(self) -> MetadataRouter:
        """Say who takes sample weights: this detector, and the members that it fits.

        Returns
        -------
        MetadataRouter
        """
        router = MetadataRouter(owner=self).add_self_request(self)
        fitting = MethodMapping().add(caller="fit", callee="fit")
        for (name, member), frozen in zip(self.detectors, self._frozen(), strict=True):
            if not (self.prefit or frozen):
                router.add(**{name: member}, method_mapping=fitting)
        return router

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Set the threshold on rows that are mostly normal; fit the members first if they are not.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        y : ignored
            For scikit-learn's conventions.
        sample_weight : array-like of shape (n_samples,), optional
            Non-negative weight of each row for the members that are fitted; with scikit-learn's metadata routing, for
            those that request it. A weight of zero leaves a row out of the threshold, too.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If members, weights and columns do not fit together; the message says which.
        """
        self._validate_params()
        with self._restored_on_failure():
            return self._fit(X, sample_weight)

    def _fit(self, X: Any, sample_weight: Any) -> Self:
        members = self._check_members()
        weights = self._check_weights(len(members))
        rows = validate_rows(self, X, reset=True, min_rows=1 if self.prefit else 2)
        self.event_shape_ = rows.shape[1:]
        index, _ = rows_in_use(rows, sample_weight)
        columns = self._check_columns(members)
        if rows.ndim > 2:
            for member, frozen, chosen in zip(members, self._frozen(), columns, strict=True):
                if self.prefit or frozen:
                    check_images(member, _take(rows, chosen), reset=False)
        if not self.prefit:
            seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
            given = self._given_to_members(sample_weight)
            members = [
                member if frozen else _seeded(clone(member), seed).fit(_take(rows, chosen), **params)
                for member, frozen, chosen, params in zip(
                    members, self._frozen(), columns, given, strict=True
                )
            ]
        self.detectors_, self.weights_, self._columns = members, weights, columns
        if self.rule == "mixture":
            self._check_constants()
        judged = rows if len(index) == len(rows) else rows[index]
        self.offset_ = outlier_threshold(-self._energy(judged), self.contamination)
        return self

    def _given_to_members(self, sample_weight: Any) -> list[dict[str, Any]]:
        """What the `fit` of each member is given beside rows."""
        if sample_weight is None:
            return [{}] * len(self.detectors)
        if get_config()["enable_metadata_routing"]:
            routed = process_routing(self, "fit", sample_weight=sample_weight)
            return [routed[name].fit if name in routed else {} for name, _ in self.detectors]
        return [{"sample_weight": sample_weight}] * len(self.detectors)

    @property
    def _eight_bit(self) -> bool:
        """Whether rows are images of whole numbers, as the members know."""
        return any(getattr(member, "_eight_bit", False) for member in self.detectors_)

    @property
    def _binary(self) -> bool:
        """Whether some columns are of zeros and ones, as the members know."""
        return any(getattr(member, "_binary", False) for member in self.detectors_)

    def _frozen(self) -> list[bool]:
        return [isinstance(member, FrozenEstimator) for _, member in self.detectors]

    def _check_members(self) -> list[Any]:
        """Members without their names; what is frozen is taken out of its wrapper."""
        if not self.detectors:
            raise ValueError("detectors is empty; give at least one (name, detector).")
        for member in self.detectors:
            if not (isinstance(member, tuple | list) and len(member) == 2 and isinstance(member[0], str)):
                raise ValueError(f"detectors must hold pairs (name, detector), got {member!r}.")
        names = [name for name, _ in self.detectors]
        self._validate_names(names)
        members = [m.estimator if isinstance(m, FrozenEstimator) else m for _, m in self.detectors]
        for name, member, frozen in zip(names, members, self._frozen(), strict=True):
            if not HasMethods(["energy", "score_samples", "_torch_energy"]).is_satisfied_by(member):
                raise ValueError(
                    f"Member {name!r} is of class {type(member).__name__}, which has no energy. "
                    "Use detectors of anomalib_gen."
                )
            if self.prefit or frozen:
                check_is_fitted(
                    member,
                    msg=f"Member {name!r} (%(name)s) is not fitted. Fit it, or set prefit=False to fit clones. "
                    "To be kept fitted by clone, as in cross-validation, it has to be in a "
                    "sklearn.frozen.FrozenEstimator.",
                )
                try:
                    if hasattr(member, "_energy_anomaly"):
                        member._energy_anomaly()
                except TypeError as error:  # a diffusion model that has learned the time alone
                    raise ValueError(f"Member {name!r} has no energy. {error}") from error
        return members

    def _check_weights(self, n: int) -> npt.NDArray[np.float64]:
        if self.weights is None:
            weights = np.ones(n)
        else:
            try:
                weights = np.asarray(self.weights, dtype=np.float64)
            except (TypeError, ValueError):
                weights = np.array(math.nan)
            if weights.shape != (n,) or not np.isfinite(weights).all():
                raise ValueError(
                    f"weights must be {n} finite numbers, one for each detector, got {self.weights!r}."
                )
        if not weights.any():
            raise ValueError("weights are all zero: nothing would be left to score by.")
        if self.rule == "mixture":
            if not (weights > 0).all():
                raise ValueError(f"weights of a mixture must be positive, got {self.weights!r}.")
            weights = weights / weights.sum()
        return weights

    def _check_columns(self, members: list[Any]) -> list[npt.NDArray[np.int64]]:
        """Positions of the columns that each member looks at."""
        if self.columns is not None and len(self.columns) != len(members):
            raise ValueError(
                f"columns must be a list with one entry for each of the {len(members)} detectors, "
                f"got {len(self.columns)}."
            )
        chosen = []
        for k, ((name, _), member) in enumerate(zip(self.detectors, members, strict=True)):
            wanted: Any = None if self.columns is None else self.columns[k]
            fitted = self.prefit or self._frozen()[k]
            names = list(getattr(member, "feature_names_in_", []))
            if wanted is None and names and hasattr(self, "feature_names_in_"):
                wanted = names
            elif wanted is None and names and fitted:
                warn_user(
                    f"Member {name!r} was fitted on columns with names, and X has none: its columns are taken in the "
                    f"order {names}. Give X with names, or columns.",
                )
            positions = self._positions(name, wanted)
            given = [column for column in ([] if wanted is None else wanted) if isinstance(column, str)]
            if fitted and given != names and sorted(given) == sorted(names):
                raise ValueError(
                    f"columns of member {name!r} are those it was fitted on in another order. Give them as {names}."
                )
            width = getattr(member, "n_features_in_", len(positions))
            if len(positions) != width and fitted:
                raise ValueError(
                    f"Member {name!r} was fitted on {width} columns and is given {len(positions)}. "
                    "Say which ones through columns."
                )
            chosen.append(positions)
        if self.rule == "mixture" and len({frozenset(positions.tolist()) for positions in chosen}) > 1:
            raise ValueError(
                'The members of rule="mixture" must look at the same columns: densities over different ones '
                "cannot be compared."
            )
        return chosen

    def _check_constants(self) -> None:
        """Warn of members of a mixture whose energy is not known to be that of a density, which tilts the weights."""
        without = [
            name
            for (name, _), member in zip(self.detectors, self.detectors_, strict=True)
            if hasattr(member, "normalize") and not hasattr(member, "log_normalizer_")
        ]
        if without:
            warn_user(
                f"The energies of members {without} have a constant that is not known, so that their weights in the "
                "mixture are not those asked for. Call their normalize() before fit.",
            )

    def _positions(self, name: str, wanted: Any) -> npt.NDArray[np.int64]:
        if wanted is None:
            return np.arange(self.n_features_in_)
        known = list(getattr(self, "feature_names_in_", []))
        if isinstance(wanted, str) or not isinstance(wanted, Iterable):
            raise ValueError(
                f"columns must hold a list of names or positions, or None, for each member, got {wanted!r} for member "
                f"{name!r}."
            )
        wanted = list(wanted)
        positions = []
        for column in wanted:
            if isinstance(column, bool | np.bool_):
                raise ValueError(
                    f"columns of member {name!r} are a mask; give the positions instead: numpy.flatnonzero(mask)."
                )
            if isinstance(column, str):
                if column not in known:
                    raise ValueError(
                        f"columns of member {name!r} name {column!r}, which X lacks. Its columns: {known or 'unnamed'}."
                    )
                positions.append(known.index(column))
            elif isinstance(column, Integral) and 0 <= int(column) < self.n_features_in_:
                positions.append(int(column))
            else:
                raise ValueError(
                    f"columns of member {name!r} hold {column!r}; names or positions from 0 to "
                    f"{self.n_features_in_ - 1} are needed."
                )
        if len(set(positions)) < len(positions) or not positions:
            raise ValueError(f"columns of member {name!r} must be at least one and differ, got {wanted!r}.")
        return np.array(positions, dtype=np.int64)

    # Scoring ----------------------------------------------------------------------------------------------

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:
        """Minus the combined energy of each row; lower is more abnormal.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X.
        """
        return -self.energy(X)

    def energy(self, X: Any) -> npt.NDArray[np.float64]:
        """Combined energy of rows, equation 1 or 2 of the module.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X.
        """
        check_is_fitted(self)
        return self._energy(validate_rows(self, X, reset=False, min_rows=1))

    def member_energies(self, X: Any) -> npt.NDArray[np.float64]:
        """Energies of rows under each member, which tell who objects to a row.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_detectors)
            In nats, in the units of X, before weighting.
        """
        check_is_fitted(self)
        return self._member_energies(validate_rows(self, X, reset=False, min_rows=1))

    def _member_energies(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        # Rows are checked already; members that know names would only warn that these have none.
        self._check_widths()
        return np.column_stack(
            [
                member._energy(_take(rows, chosen))
                for member, chosen in zip(self.detectors_, self._columns, strict=True)
            ]
        )

    def _check_widths(self) -> None:
        """Refuse members that were fitted again on rows of another width: their energies would be of nothing."""
        for (name, _), member, chosen in zip(self.detectors, self.detectors_, self._columns, strict=True):
            width = getattr(member, "n_features_in_", len(chosen))
            if width != len(chosen):
                raise ValueError(
                    f"Member {name!r} was fitted again, on {width} columns, and it looks at {len(chosen)} here. Fit "
                    "the composed detector again too."
                )

    def _energy(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        combined = self._combine(torch.from_numpy(self._member_energies(rows)))
        return combined.numpy()

    def _combine(self, energies: torch.Tensor) -> torch.Tensor:
        """Combine ``(n, n_detectors)`` to ``(n,)``."""
        weights = torch.as_tensor(self.weights_, dtype=energies.dtype, device=energies.device)
        if self.rule == "mixture":
            # An energy model that has no constant yet enters as it is.
            log_z = [getattr(member, "log_normalizer_", 0.0) for member in self.detectors_]
            return -torch.logsumexp(weights.log() - energies.new_tensor(log_z) - energies, dim=1)
        # A mean of the members cannot overflow where their sum could, far out; saturate on the way back to the sum.
        total, limit = weights.abs().sum(), torch.finfo(energies.dtype).max
        return ((energies * (weights / total)).sum(1) * total).clamp(-limit, limit)

    def _torch_energy(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return `energy` as a differentiable function of rows on `device`, in the units of X."""
        members = [member._torch_energy(device) for member in self.detectors_]
        columns = [torch.as_tensor(chosen, device=device) for chosen in self._columns]

        def energy(x: torch.Tensor) -> torch.Tensor:
            parts = [member(x[:, chosen]) for member, chosen in zip(members, columns, strict=True)]
            return self._combine(torch.stack(parts, dim=1))

        return energy

    # Sampling ---------------------------------------------------------------------------------------------

    @_runtime.within_quota()
    @torch.inference_mode(False)  # chains follow gradients, also within a caller's inference_mode
    def sample(self, n_samples: int = 1, *, random_state: Any = None) -> npt.NDArray[Any]:
        """Draw new rows: from a mixture exactly, from a product by Langevin chains that start at members' samples.

        Parameters
        ----------
        n_samples : int, default=1
            For a product each row is the end of a chain of its own.
        random_state : int, RandomState instance or None, default=None
            None draws afresh at each call.

        Returns
        -------
        ndarray of shape (n_samples, n_features) or (n_samples, channels, height, width)
            In the units and the order of X's columns; uint8 for members of such images.

        Raises
        ------
        ValueError
            If `n_samples` is not a positive integer, if no member looks at some column, or if a member of a product is
            one of rows of zeros and ones.
        """
        check_is_fitted(self)
        check_count(n_samples, "n_samples")
        self._check_widths()
        unseen = np.setdiff1d(np.arange(self.n_features_in_), np.concatenate(self._columns))
        if len(unseen):
            raise ValueError(
                f"No member looks at columns {unseen.tolist()}: nothing is known to draw them from."
            )
        if self.rule == "product" and self._binary:
            raise ValueError(
                "A product of members of which one has observation='bernoulli' cannot be sampled: "
                "its chains move through real numbers, and the member's rows are zeros and ones."
            )
        random = check_random_state(random_state)
        # Which member each row starts from; those of negative weight would start it where it must not stay.
        chances = np.maximum(self.weights_, 0)
        chances = chances / chances.sum() if chances.sum() else np.full(len(chances), 1 / len(chances))
        start = np.empty((n_samples, *self.event_shape_))
        order = random.choice(len(chances), size=n_samples, p=chances)
        for k in np.argsort(chances, kind="stable"):  # the likeliest last: it fills what it sees for all rows
            start[:, self._columns[k]] = self.detectors_[k].sample(n_samples, random_state=random)
        for k in np.unique(order):
            rows = np.flatnonzero(order == k)
            start[np.ix_(rows, self._columns[k])] = self.detectors_[k].sample(len(rows), random_state=random)
        if self.rule == "mixture":
            return self._as_fitted(start)
        device = torch.device("cpu")
        energy, x = self._torch_energy(device), torch.from_numpy(start)
        # Chains move in units in which all columns are alike.
        scale = x.std(0, correction=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        generator = _runtime.make_generator(int(random.randint(np.iinfo(np.int32).max)), device)
        warmup = self.n_steps // 2
        x, _ = mala(
            energy, x, self.n_steps - warmup, step_size=0.1, scale=scale, n_warmup=warmup, generator=generator
        )
        return self._as_fitted(x.numpy())

    def _as_fitted(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        """Whole numbers for images of them."""
        return np.clip(np.rint(rows), 0, 255).astype(np.uint8) if self._eight_bit else rows


def _take(rows: npt.NDArray[Any], columns: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Columns of rows, without a copy where they are all of them."""
    return rows if np.array_equal(columns, np.arange(rows.shape[1])) else rows[:, columns]


def _seeded(detector: Any, seed: int) -> Any:
    """Give a clone without a seed of its own one, so that the composed detector is repeatable."""
    if "random_state" in detector.get_params() and detector.get_params()["random_state"] is None:
        detector.set_params(random_state=seed)
    return detector
