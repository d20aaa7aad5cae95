r"""Heat maps: how much each pixel of an image adds to its anomaly.

A map has the height and width of its images; the channels are summed. There are four kinds, each of a quantity that is
made of one number a value or a place:

    "residual":     r_j^2, r = x - xhat, what the model would change;
    "score":        s_j^2, s = grad log p(x), how steeply the density rises if the value changes; of a model that
                    is conditional on noise, the mean over a ladder of levels of (s * level)_j^2;
    "likelihood":   of an autoencoder -E_q[log p(x_j | z)], what its decoder charges for the value, and an even share of
                    KL(q(z | x) || N(0, I)), which belongs to no place; of a multi-scale flow the share of each pixel in
                    -log p(x), with the values that its layers give to the place and what they stretch there
                    (models.glow). Before they are averaged the former add up to minus the evidence lower bound, the
                    latter to -log p(x), of images as they are (not spread over cells) and in standardised pixels;
    "matching":     what an image has at a place and the stored images that match it best have not, or the reverse
                    (models.matching).

The first asks for a model that reconstructs (autoencoders and diffusion models), the second for one that is
differentiable, which all are. As an energy E is -log p up to a constant, the score is minus the energy's gradient. Maps
are averaged over a window, because single pixels are noise: by default a sixteenth of the side.

What a map tells is where a model's number comes from, not where an anomaly is: a missing part shows where it should
have been, and gradients are large at edges whether these are odd or not; those of a flow, which is fitted without
noise, say next to nothing. `subtract` takes off what is usual at each pixel.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted
from torch.nn import functional as F

from anomalib_gen._base import GenerativeDetector
from anomalib_gen._runtime import scoring_generator
from anomalib_gen.anomaly import MultiScaleReconstruction
from anomalib_gen.anomaly._levels import level_ladder
from anomalib_gen.samplers import score_of

KINDS = ("auto", "likelihood", "matching", "residual", "score")
SCORE_LEVELS, N_LEVELS = (0.1, 1.0), 4
"""Noise levels of the score maps of models that are conditional on noise: those that see single pixels."""


def explain_images(
    detector: GenerativeDetector,
    X: Any,
    *,
    kind: str = "auto",
    smooth: int | str = "auto",
    subtract: Any = None,
) -> npt.NDArray[np.float64]:
    """Heat maps of images.

    Parameters
    ----------
    detector : detector
        A fitted detector of images, of any family; of a composition its members have maps.
    X : array-like of shape (n_samples, channels, height, width)
    kind : {"auto", "residual", "score", "likelihood", "matching"}, default="auto"
        What is shown, see the module. "auto" takes the matching of a diffusion model with stored images, the residual
        of any other and of an autoencoder, the likelihood of a multi-scale flow ("glow", the default for images) and
        the score of an energy model or of any other flow. "likelihood" is for autoencoders and multi-scale flows, and
        "matching" for models with stored images.
    smooth : int or "auto", default="auto"
        Side of the window over which maps are averaged; 1 for none. "auto" takes a sixteenth of the longer side, an odd
        number and at least 3.
    subtract : array-like of shape (n_reference, channels, height, width), optional
        Normal images whose mean map is taken off: pixels that are hard in every image no longer stand out. It is for
        images that are alike pixel by pixel, such as one part always in the same place. Digits are not: there it
        makes maps worse, and on photographs it does next to nothing.

    Returns
    -------
    ndarray of shape (n_samples, height, width)
        Higher is more anomalous. Units are those of the kind, in standardised pixels; of "matching", shares of all
        gradients.

    Raises
    ------
    ValueError
        If the detector was fitted on a table, or `kind` or `smooth` is none of the values above.
    TypeError
        If `detector` is none of this package, or the model lacks what the kind asks for.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from anomalib_gen import VAEDetector
    >>> from anomalib_gen.heatmaps import explain_images
    >>> images = load_digits().images[:200, None]
    >>> detector = VAEDetector(max_iter=20, random_state=0).fit(images)
    >>> explain_images(detector, images[:2]).shape
    (2, 8, 8)
    """
    if not isinstance(detector, GenerativeDetector):
        hint = ""
        if hasattr(detector, "steps"):
            hint = " Explain the last step: explain_images(pipeline[-1], pipeline[:-1].transform(X))."
        elif hasattr(detector, "estimator_"):
            hint = " Explain what is inside: explain_images(detector.estimator_, X)."
        elif hasattr(detector, "detectors"):
            hint = " Explain its members one by one."
        raise TypeError(
            f"Heat maps are for detectors of images of anomalib_gen, got {type(detector).__name__}.{hint}"
        )
    check_is_fitted(detector)
    if len(detector.event_shape_) != 3:
        raise ValueError(
            f"Heat maps are for detectors of images; this {type(detector).__name__} was fitted on rows of shape "
            f"{detector.event_shape_}."
        )
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown. Known kinds: {', '.join(map(repr, KINDS))}.")
    if hasattr(detector.model_, "estimate_level"):
        raise TypeError(
            f"A {type(detector.model_).__name__} tells how much noise is in a whole image, and nothing of its pixels. "
            "Fit the detector with another objective than 'diffusion-time'."
        )
    height, width = detector.event_shape_[1:]
    if smooth == "auto":
        window = max(3, max(height, width) // 16 // 2 * 2 + 1)
    elif isinstance(smooth, Integral) and not isinstance(smooth, bool) and smooth >= 1:
        window = int(smooth)
    else:
        raise ValueError(f"smooth must be a positive integer or 'auto', got {smooth!r}.")

    def values(model: Any, x: torch.Tensor) -> torch.Tensor:
        return _average(_pixels(model, x, kind, scoring_generator(detector._scoring_seed)).sum(1), window)

    def maps_of(images: Any) -> npt.NDArray[np.float64]:
        rows = detector._validate(images, reset=False)
        return detector._map(values, rows, (height, width), detector._scaler)

    maps = maps_of(X)
    return maps if subtract is None else maps - maps_of(subtract).mean(axis=0)


def resolve_kind(model: Any, kind: str) -> str:
    """Kind of map that "auto" stands for with a model.

    Parameters
    ----------
    model : torch.nn.Module
        The model of a detector.
    kind : str
        As in `explain_images`.

    Returns
    -------
    str
        Any other kind as it is.
    """
    if kind != "auto":
        return kind
    if hasattr(getattr(model, "memory", None), "unmatched_pixels"):
        return "matching"
    if hasattr(model, "denoise") or hasattr(model, "reconstruct"):
        return "residual"
    return "likelihood" if hasattr(getattr(model, "transform", None), "log_prob_by_place") else "score"


def _pixels(model: Any, x: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """The quantity of each value of images ``(B, C, H, W)``, of the same shape, or of each pixel, ``(B, 1, H, W)``."""
    kind = resolve_kind(model, kind)
    try:
        if kind == "matching":
            return model.memory.unmatched_pixels(x.flatten(1)).unsqueeze(1)
        if kind == "residual":
            return _mean(r.square() for r in MultiScaleReconstruction().residuals(model, x))
        if kind == "likelihood":
            if hasattr(model, "log_prob_by_place"):
                return -model.log_prob_by_place(x).unsqueeze(1)
            return _bound_by_value(model, x, generator)
        if hasattr(model, "score") and getattr(model, "noise_levels", None) is not None:
            return _mean(
                (level * model.score(x, x.new_full((len(x),), level))).square()
                for level in level_ladder(model, SCORE_LEVELS, N_LEVELS)
            )
        return _score(model, x).square()
    except AttributeError as error:
        raise TypeError(
            f"kind={kind!r} does not work with {type(model).__name__}: {error}. Choose another kind."
        ) from error


def _bound_by_value(model: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Share of each value of images ``(B, *E)`` in minus the evidence lower bound, with the draws of `NegativeELBO`."""
    q = model.encode(x)
    noise = model.draw_balanced_noise("auto", generator)
    charged = _mean(-model.observation.value_log_probs(x, model.decode(q.draw(e))) for e in noise)
    return charged + (q.kl().sum(1) / x[0].numel()).reshape(-1, 1, 1, 1)


def _score(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Gradient of the log-density, or of the bound with the posterior's mean, of a model without noise levels."""
    if hasattr(model, "draw_balanced_noise"):
        noise = torch.zeros(model.n_components, dtype=x.dtype, device=x.device)
        return score_of(lambda y: -model.elbo(y, noise))(x)
    return score_of(model.energy)(x)


def _mean(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).mean(0)


def _average(maps: torch.Tensor, window: int) -> torch.Tensor:
    """Mean over windows of maps ``(B, H, W)``; beyond the border the pixels at the border are repeated."""
    if window == 1:
        return maps
    padded = F.pad(maps.unsqueeze(1), [window // 2, (window - 1) // 2] * 2, mode="replicate")
    return F.avg_pool2d(padded, window, stride=1).squeeze(1)
