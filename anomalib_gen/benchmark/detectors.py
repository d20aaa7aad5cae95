"""Detectors of a benchmark, named by import path and literal arguments.

``anomalib_gen.FlowDetector(transform="maf")`` names a class and its keyword arguments; it is read as text,
never evaluated. A name for tables and figures may stand in front: ``my flow=anomalib_gen.FlowDetector()``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from anomalib_gen.calibration._wrapped import innermost, is_pyod
from anomalib_gen.calibration._wrapped import score_rows as score_by_direction

__all__ = [
    "DEEP_PEERS",
    "IMAGE_PEERS",
    "PEERS",
    "Detector",
    "KNNDistance",
    "OnPrincipalComponents",
    "library_detectors",
    "parse_detector",
    "parse_detectors",
    "score_rows",
]


@dataclass(frozen=True)
class Detector:
    """A detector to be built: a display name, an import path and literal keyword arguments.

    Attributes
    ----------
    name : str
        Name in tables and figures; it has no influence on what is computed.
    path : str
        Import path of the estimator's class.
    arguments : tuple of (str, object)
        Keyword arguments, sorted by name.
    """

    name: str
    path: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def specification(self) -> str:
        """The detector as one canonical line: equal lines build equal detectors."""
        return f"{self.path}({', '.join(f'{key}={value!r}' for key, value in self.arguments)})"

    def resolve(self) -> type[Any]:
        """Import the class.

        Returns
        -------
        type
            A class with a ``fit`` method.

        Raises
        ------
        ImportError
            If the path leads to nothing importable.
        TypeError
            If it leads to something other than a class with a ``fit`` method.
        """
        module, _, attribute = self.path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"The detector {self.path} cannot be imported ({error}). "
                "Check the path, and that its package is installed."
            ) from error
        # Only classes that can be fitted are ever called, so that os.system("...") names no detector.
        if not (isinstance(found, type) and callable(getattr(found, "fit", None))):
            raise TypeError(f"The detector {self.path} must be a class with a fit method, found {found!r}.")
        return found

    def build(self, *, seed: int, n_features: int) -> Any:
        """Construct the estimator for one cell of a benchmark.

        ``random_state`` is set to the seed where the class has that parameter and none was given, and so is
        ``n_features`` where the class demands it.

        Parameters
        ----------
        seed : int
            Seed of the cell.
        n_features : int
            Number of columns of the table.

        Returns
        -------
        object
            The unfitted estimator.
        """
        cls = self.resolve()
        arguments = dict(self.arguments)
        parameters = inspect.signature(cls).parameters
        if "random_state" in parameters:
            arguments.setdefault("random_state", seed)
        if "n_features" in parameters and parameters["n_features"].default is inspect.Parameter.empty:
            arguments.setdefault("n_features", n_features)
        return cls(**arguments)


def parse_detector(text: str) -> Detector:
    """Read a detector from text such as ``sklearn.neighbors.LocalOutlierFactor(novelty=True)``.

    Parameters
    ----------
    text : str
        ``[display name=]import.path.Class[(keyword=literal, ...)]``. Arguments are Python literals: numbers,
        strings, booleans, None, and lists, tuples, dictionaries or sets of them.

    Returns
    -------
    Detector
        The detector; nothing is imported yet.

    Raises
    ------
    ValueError
        If the text is anything but an import path with literal keyword arguments.

    Examples
    --------
    >>> from anomalib_gen.benchmark import parse_detector
    >>> parse_detector("mixture=sklearn.mixture.GaussianMixture(n_components=8)").specification
    'sklearn.mixture.GaussianMixture(n_components=8)'
    """
    # "name=path(key=1)" has a name, "path(key=1)" has none: there the first "=" stands inside the
    # parentheses.
    head, equals, tail = text.partition("=")
    named = bool(equals) and head.count("(") == head.count(")")
    name, call = (head.strip(), tail.strip()) if named else ("", text.strip())
    if named and not name:
        raise _bad(text, "the display name before '=' is empty")
    try:
        node: ast.expr = ast.parse(call, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise _bad(text, f"it cannot be read ({error})") from None
    keywords: list[ast.keyword] = []
    if isinstance(node, ast.Call):
        if node.args:
            raise _bad(text, "its arguments must be given by keyword")
        keywords = node.keywords
        node = node.func
    path = _dotted(node)
    if path is None or "." not in path:
        raise _bad(text, "it names no class by its import path")
    arguments: dict[str, Any] = {}
    for keyword in keywords:
        if keyword.arg is None:
            raise _bad(text, "'**' is not understood")
        if keyword.arg in arguments:
            raise _bad(text, f"the argument {keyword.arg} is given twice")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            found = ast.unparse(keyword.value)
            raise _bad(text, f"the argument {keyword.arg}={found} is not a literal") from None
    detector = Detector(name, path, tuple(sorted(arguments.items())))
    if not name:
        short = detector.specification.removeprefix(path.rpartition(".")[0] + ".").removesuffix("()")
        detector = Detector(short, path, detector.arguments)
    return detector


def parse_detectors(detectors: Iterable[str | Detector], *, images: bool = False) -> list[Detector]:
    """Read several detectors; ``library``, ``peers`` and ``deep-peers`` stand for the named sets.

    Parameters
    ----------
    detectors : iterable of str or Detector
        Texts for `parse_detector`, names of sets, or detectors already read.
    images : bool, default=False
        Whether the sets are those for images rather than for tables.

    Returns
    -------
    list of Detector
        In the order given, with different names.

    Raises
    ------
    ValueError
        If a text cannot be read, or two different detectors bear the same name.
    TypeError
        If `detectors` is itself a text, whose letters would be read as detectors.
    """
    if isinstance(detectors, str):
        raise TypeError(f"detectors must be a list, got the text {detectors!r}. Put it into one.")
    found: dict[str, Detector] = {}
    for item in detectors:
        members: tuple[Detector, ...]
        if isinstance(item, Detector):
            members = (item,)
        elif item in _SETS:
            members = _SETS[item](images)
        else:
            members = (parse_detector(item),)
        for detector in members:
            known = found.setdefault(detector.name, detector)
            if known != detector:
                raise ValueError(
                    f"Two detectors are called {detector.name!r}: {known.specification} and "
                    f"{detector.specification}. Put a display name in front of one, as in 'other name=...'."
                )
    return list(found.values())


class KNNDistance(BaseEstimator):
    """Minus the mean Euclidean distance to the nearest training rows.

    The plainest strong baseline on tables, written here because common libraries take the largest distance
    instead.

    Parameters
    ----------
    n_neighbors : int, default=5
        Number of nearest training rows.
    """

    def __init__(self, *, n_neighbors: int = 5) -> None:
        self.n_neighbors = n_neighbors

    def fit(self, X: ArrayLike, y: Any = None) -> KNNDistance:
        """Store the training rows.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features)
            Training rows.
        y : object
            Ignored.

        Returns
        -------
        KNNDistance
            The estimator itself.
        """
        X = validate_data(self, X)
        self.neighbors_ = NearestNeighbors(n_neighbors=self.n_neighbors).fit(X)
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Score rows, lower = more abnormal.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features)
            Rows to score.

        Returns
        -------
        ndarray of shape (n_rows,)
            Minus the mean distance.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return -self.neighbors_.kneighbors(X)[0].mean(axis=1)


class OnPrincipalComponents(BaseEstimator):
    """A detector that sees the leading principal components of the training rows.

    Pixels are many and hang together; distances and random cuts say more about few uncorrelated columns.

    Parameters
    ----------
    detector : str, default="sklearn.ensemble.IsolationForest"
        Any detector of a benchmark, as `parse_detector` reads it.
    n_components : int, default=64
        Components kept, no more than there are rows or columns. They are not whitened.
    random_state : int, RandomState instance or None, default=None
        Of the decomposition, and of the detector where it takes one.
    """

    def __init__(
        self,
        *,
        detector: str = "sklearn.ensemble.IsolationForest",
        n_components: int = 64,
        random_state: Any = None,
    ) -> None:
        self.detector = detector
        self.n_components = n_components
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> OnPrincipalComponents:
        """Fit components and detector.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features)
            Training rows.
        y : object
            Ignored.

        Returns
        -------
        OnPrincipalComponents
            The estimator itself.
        """
        X = validate_data(self, X)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        n_components = min(self.n_components, *np.shape(X))
        self.pca_ = PCA(n_components, svd_solver="randomized", random_state=seed).fit(X)
        self.detector_ = parse_detector(self.detector).build(seed=seed, n_features=n_components)
        self.detector_.fit(self.pca_.transform(X))
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Score rows, lower = more abnormal.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features)
            Rows to score.

        Returns
        -------
        ndarray of shape (n_rows,)
            Scores of the detector.
        """
        check_is_fitted(self)
        return score_rows(self.detector_, self.pca_.transform(validate_data(self, X, reset=False)))


def score_rows(estimator: Any, X: NDArray[np.float64]) -> NDArray[np.float64]:
    """Score rows with any supported detector so that lower = more abnormal.

    Parameters
    ----------
    estimator : object
        A fitted detector: of scikit-learn's kind (``score_samples``, else ``decision_function``, higher =
        normal) or of pyod's (``decision_function``, higher = abnormal).
    X : ndarray of shape (n_rows, n_features)
        Rows to score.

    Returns
    -------
    ndarray of shape (n_rows,)
        Scores, lower = more abnormal.
    """
    high = "abnormal" if is_pyod(innermost(estimator)) else "normal"
    return score_by_direction(estimator, X, high)


def _named(name: str, path: str, **arguments: Any) -> Detector:
    return Detector(name, path, tuple(sorted(arguments.items())))


PEERS: tuple[Detector, ...] = (
    _named("sklearn.IsolationForest", "sklearn.ensemble.IsolationForest"),
    _named("sklearn.LOF", "sklearn.neighbors.LocalOutlierFactor", novelty=True),
    _named("sklearn.OneClassSVM", "sklearn.svm.OneClassSVM"),
    _named("sklearn.GaussianMixture(8)", "sklearn.mixture.GaussianMixture", n_components=8, reg_covar=1e-3),
    _named("kNN(1)", "anomalib_gen.benchmark.KNNDistance", n_neighbors=1),
    _named("kNN(5)", "anomalib_gen.benchmark.KNNDistance", n_neighbors=5),
    _named("pyod.ECOD", "pyod.models.ecod.ECOD"),
    _named("pyod.COPOD", "pyod.models.copod.COPOD"),
    _named("pyod.HBOS", "pyod.models.hbos.HBOS"),
    _named("pyod.CBLOF", "pyod.models.cblof.CBLOF"),
    _named("pyod.PCA", "pyod.models.pca.PCA"),
)
"""Shallow detectors of scikit-learn and pyod at their defaults, a mixture of Gaussians and nearest "
"neighbours."""

DEEP_PEERS: tuple[Detector, ...] = (
    _named("pyod.VAE", "pyod.models.vae.VAE"),
    _named("pyod.AutoEncoder", "pyod.models.auto_encoder.AutoEncoder"),
    _named("pyod.DeepSVDD", "pyod.models.deep_svdd.DeepSVDD"),
)
"""Deep detectors of pyod at their defaults; slow without a GPU."""

_KNN = "anomalib_gen.benchmark.KNNDistance(n_neighbors=1)"
_ON_COMPONENTS = "anomalib_gen.benchmark.OnPrincipalComponents"

IMAGE_PEERS: tuple[Detector, ...] = (
    _named("kNN(1)", "anomalib_gen.benchmark.KNNDistance", n_neighbors=1),
    _named("kNN(1), 64 PCA", _ON_COMPONENTS, detector=_KNN),
    _named("sklearn.IsolationForest", "sklearn.ensemble.IsolationForest"),
    _named("sklearn.IsolationForest, 64 PCA", _ON_COMPONENTS, detector="sklearn.ensemble.IsolationForest"),
    _named("pyod.PCA", "pyod.models.pca.PCA"),
)
"""Shallow detectors of tables that see pixels, nearest neighbours and isolation forest on principal components as well.
The deep ones are those of tables."""

LEFT_OUT = {"auto", "glow"}
"""Names that `library_detectors` leaves out: one that stands for others, and one for images, whose default it is."""
VARIED = ("transform", "denoiser", "objective", "anomaly")
"""Parameters by which `library_detectors` tells the methods of a family apart."""


def library_detectors(*, images: bool = False) -> tuple[Detector, ...]:
    """Return every family of the library at its defaults, and with every transform, denoiser, objective and anomaly.

    One parameter is varied at a time, over all names that it takes; families and names are found, not listed.

    Parameters
    ----------
    images : bool, default=False
        Whether names and defaults are those for images rather than for tables.

    Returns
    -------
    tuple of Detector
    """
    from anomalib_gen import detectors
    from anomalib_gen._base import GenerativeDetector

    found = []
    for name, family in sorted(vars(detectors).items()):
        if not (isinstance(family, type) and issubclass(family, GenerativeDetector)):
            continue
        path = f"anomalib_gen.{name}"
        found.append(_named(name, path))
        detector = family()
        if images:
            detector.event_shape_ = (1, 28, 28)  # of these; any would do
        known = {"objective": family._objectives, "anomaly": detector._known_anomalies()}
        for parameter in VARIED:
            if parameter not in detector.get_params():
                continue
            components = known.get(parameter, {})
            names = components or next(
                constraint.options
                for constraint in family._parameter_constraints[parameter]
                if isinstance(constraint, StrOptions)
            )
            # What the default stands for, which is in the list already.
            resolve = getattr(detector, f"_resolve_{parameter}", None)
            default = repr(detector.get_params()[parameter] if resolve is None else resolve())
            for value in sorted(set(names) - LEFT_OUT):
                part = components[value]() if components else value
                if repr(part) != default:
                    found.append(_named(f"{name} {value}", path, **{parameter: value}))
    return tuple(found)


_SETS: dict[str, Callable[[bool], tuple[Detector, ...]]] = {
    "library": lambda images: library_detectors(images=images),
    "peers": lambda images: IMAGE_PEERS if images else PEERS,
    "deep-peers": lambda images: DEEP_PEERS,
}
"""Sets by name, given whether the data are images."""


def _bad(text: str, reason: str) -> ValueError:
    return ValueError(
        f"The detector {text!r} is not understood: {reason}. Write an import path with literal keyword "
        f"arguments, "
        'for example sklearn.neighbors.LocalOutlierFactor(novelty=True) or "my '
        'flow=anomalib_gen.FlowDetector()".'
    )


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None
