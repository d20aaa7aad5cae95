"""Images as rows of features, from a network that the user brings.

In front of any detector in a pipeline, `FeatureExtractor` turns it into a detector on features: of a network that was
trained on many other images (torchvision, timm), where normal ones are few; of one of your own. The network is used as
it is. Nothing is downloaded here and nothing is trained: what weights it has, and where they come from, is the
caller's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted
from torch import nn

from anomalib_gen import _runtime
from anomalib_gen._inputs import stack_images


class FeatureExtractor(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Turn images into rows of features with a given network.

    Parameters
    ----------
    network : torch.nn.Module or callable
        Maps images ``(B, channels, height, width)`` of float32 to ``(B, n_features)``, or to maps ``(B, n_features,
        h, w)``, which are averaged over their pixels. A module works in evaluation mode and without gradients; the one
        that was passed is left as it is.
    batch_size : int, default=64
        Images at once. All batches have this size (the last is filled up), so that the features of an image do not
        depend on the images beside it.
    device : str or torch.device, default="auto"
        ``"auto"`` takes CUDA, else MPS, else the CPU. A callable that is no module gets its images there.

    Attributes
    ----------
    event_shape_ : tuple of int
        ``(channels, height, width)`` of the images.

    Notes
    -----
    Images of uint8 are divided by 255, those of floating-point numbers are passed on as they are. Networks that want
    another scale, more channels or another size get them from layers in front: a pretrained one of torchvision its
    ``transforms.Normalize``, for example. Normal images that a network was trained on look more normal than new ones
    do, so it should be none that has seen the images at hand.

    Model folders hold no networks of others: save the detector alone, and build the extractor around it again.

    A detector on features sees what its network tells apart. Pretrained ones know objects and textures, and are
    the better choice where normal images are few; figures with and without them do not compare.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from sklearn.pipeline import make_pipeline
    >>> from anomalib_gen import DiffusionDetector
    >>> from anomalib_gen.features import FeatureExtractor
    >>> images = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())  # your backbone
    >>> extractor = FeatureExtractor(network)
    >>> extractor.fit_transform(images).shape
    (40, 8)
    >>> detector = make_pipeline(extractor, DiffusionDetector(denoiser="closed-form", random_state=0))
    >>> detector.fit(images).score_samples(images[:2]).shape
    (2,)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "network": [callable],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "device": [str, torch.device],
    }

    def __init__(
        self, network: Callable[[torch.Tensor], torch.Tensor], *, batch_size: int = 64, device: Any = "auto"
    ) -> None:
        self.network = network
        self.batch_size = batch_size
        self.device = device

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the shape of images and the number of features, from the first image.

        Parameters
        ----------
        X : array-like of shape (n_samples, channels, height, width)
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If X holds no images, or numbers that are neither uint8 nor floating-point.
        TypeError
            If the network does not return rows or maps of features.
        """
        X = self._check(X)
        n_features = self._extract(X[:1]).shape[1]
        self.event_shape_, self._eight_bit = X.shape[1:], X.dtype == np.uint8
        self._n_features_out = n_features
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:
        """Features of images.

        Parameters
        ----------
        X : array-like of shape (n_samples, channels, height, width)
            Read in blocks, so that a memory-mapped array stays on disk.

        Returns
        -------
        ndarray of shape (n_samples, n_features)

        Raises
        ------
        ValueError
            If the images have another shape than in `fit`, or whole numbers stand for real ones or the other way round.
        """
        check_is_fitted(self)
        X = self._check(X)
        if X.shape[1:] != self.event_shape_:
            raise ValueError(f"X holds images of shape {X.shape[1:]}, but {self.event_shape_} were fitted.")
        if (X.dtype == np.uint8) != self._eight_bit:
            fitted = "uint8 images, 0 to 255" if self._eight_bit else "images of real numbers"
            raise ValueError(
                f"X is {X.dtype}, but {fitted} were fitted, and only those of uint8 are divided by 255. Give images in "
                "the units of `fit`."
            )
        return self._extract(X)

    @staticmethod
    def _check(X: Any) -> npt.NDArray[Any]:
        X = stack_images(X)
        if X.ndim != 4 or not len(X):
            raise ValueError(
                "Images (n, channels, height, width) are needed, at least one, got an array of shape "
                f"{X.shape}. See anomalib_gen.images for other layouts and for files."
            )
        if X.dtype != np.uint8 and X.dtype.kind != "f":
            raise ValueError(
                f"X is {X.dtype}: images are uint8, which are divided by 255, or floating-point numbers, which are "
                "passed on as they are. Say which by X.astype(numpy.uint8) or X.astype(numpy.float32)."
            )
        return X

    @_runtime.within_quota()
    def _extract(self, X: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        device = _runtime.resolve_device(self.device)
        network: Any = self.network
        if isinstance(network, nn.Module):
            network = copy.deepcopy(network).to(device).float().eval()
        scale = 255 if X.dtype == np.uint8 else 1
        parts = []
        with torch.inference_mode():
            for rows in _runtime.row_blocks(len(X), int(self.batch_size)):
                images = np.asarray(X[rows], dtype=np.float32) / np.float32(scale)
                n = len(images)
                full = np.resize(images, (int(self.batch_size), *images.shape[1:]))
                parts.append(self._pool(network(torch.from_numpy(full).to(device)), len(full))[:n])
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"The network gives features that are not finite for image {bad}.")
        return features

    @staticmethod
    def _pool(features: Any, n: int) -> npt.NDArray[np.float32]:
        """Rows ``(n, n_features)`` of what a network returned."""
        if not isinstance(features, torch.Tensor) or features.ndim not in (2, 4) or len(features) != n:
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise TypeError(
                f"The network must return a tensor (B, n_features) or (B, n_features, h, w) for {n} images, got "
                f"{found}."
            )
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        return features.float().cpu().numpy()
