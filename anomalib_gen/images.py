"""Images on their way to and from detectors: layout, files, and bits per dimension.

Detectors take arrays ``(n, channels, height, width)`` and nothing else: of uint8, which stand for whole numbers from 0
to 255, or of other types, which stand for real numbers. What comes otherwise is brought into that form by one of two
transformers, each of which is told what it gets and guesses nothing: `ChannelsFirst` for arrays with the channels at
the end or without any, `ImageReader` for files. Both drop into a pipeline.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import struct
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context, clone
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from anomalib_gen._base import GenerativeDetector
from anomalib_gen._inputs import stack_images
from anomalib_gen._runtime import check_count, check_share, row_blocks
from anomalib_gen._scaling import rows_per_block
from anomalib_gen._warnings import warn_user
from anomalib_gen.detectors import ComposedDetector

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Endings by which the images of a folder are told from its other files."""
SHOWN = 5
"""Files named in a message; the others are counted."""
CHANNELS = {"L": 1, "RGB": 3}
MODES = {channels: mode for mode, channels in CHANNELS.items()}
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, MemoryError, struct.error)
"""What Pillow and its decoders raise for damaged files; MemoryError for sizes that a header has made up."""


def bits_per_dimension(log_prob: Any, event_shape: Sequence[int]) -> npt.NDArray[np.float64]:
    """Turn log-densities of images of whole numbers into bits per dimension.

    Of a detector fitted on uint8 images `log_prob` and `elbo` are densities of whole numbers spread over cells of
    width one. On average over the cells they are below log-probabilities, so this is an upper bound on the length of
    the shortest code, in bits for each value of a pixel (Theis et al. 2016, arXiv:1511.01844, section 3.1).

    Parameters
    ----------
    log_prob : array-like of shape (n_samples,)
        In nats, in units of grey levels. A detector fitted on images divided by 255 reports larger densities: take
        ``log(255)`` off for each value first. It has taken them for real numbers and not spread them over cells: the
        result bounds no code.
    event_shape : sequence of int
        Shape of one image, the detector's `event_shape_`.

    Returns
    -------
    ndarray of shape (n_samples,)

    Raises
    ------
    ValueError
        If `event_shape` holds anything but positive whole numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen.images import bits_per_dimension
    >>> bits_per_dimension([-64 * np.log(256)], (1, 8, 8))  # all values of 8 bits alike
    array([8.])
    """
    if isinstance(event_shape, Integral):
        raise ValueError(f"event_shape must be a sequence such as (1, 28, 28), got {event_shape!r}.")
    n = math.prod(check_count(side, "Each number of event_shape") for side in event_shape)
    bits: npt.NDArray[np.float64] = -np.asarray(log_prob, dtype=np.float64) / (n * np.log(2))
    return bits


def mutate_pixels(X: npt.NDArray[Any], *, rate: float = 0.2, random_state: Any = None) -> npt.NDArray[Any]:
    """Replace some values of images by random ones, uniform over the range of X.

    Parameters
    ----------
    X : ndarray of shape (n_samples, channels, height, width)
    rate : float, default=0.2
        Share of the values that are replaced, each independently; whole numbers by whole numbers.
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    ndarray of shape (n_samples, channels, height, width)
        A copy in memory, in the type of X.

    Raises
    ------
    ValueError
        If the rate does not lie between 0 and 1.
    """
    check_share(rate, "rate", with_one=True)
    random = check_random_state(random_state)
    X = np.asarray(X)
    low, high = X.min(), X.max()
    mutated = X.copy()
    for rows in row_blocks(len(X), rows_per_block(int(np.prod(X.shape[1:])))):
        block = mutated[rows]
        chosen = random.random_sample(block.shape) < rate
        if X.dtype.kind in "iub":
            block[chosen] = random.randint(int(low), int(high) + 1, size=int(chosen.sum()))
        else:
            block[chosen] = random.uniform(low, high, size=int(chosen.sum()))
    return mutated


def likelihood_ratio(
    detector: GenerativeDetector, X: Any, *, rate: float = 0.2, random_state: Any = None
) -> ComposedDetector:
    """Compare a detector's likelihood with that of a background model (Ren et al. 2019).

    The background model is a clone of the detector, fitted to images some of whose pixels are random. It learns what is
    common to all images (grey backgrounds, smoothness) and loses what normal ones show. The anomaly is

        -log p(x) + log p_background(x),

    in which what both know cancels: a composition of the two energies with weights 1 and -1.

    It helps where likelihoods are led by the background, as on grey or flat images of another source. It fails where
    the mutations leave nothing to learn, or too much; the rate is then to be chosen on images of a third kind. Both
    models must be good: the difference of two bounds is as wrong as the bounds are loose in different ways.

    Parameters
    ----------
    detector : detector
        A fitted detector of images.
    X : ndarray of shape (n_samples, channels, height, width)
        The images it was fitted on.
    rate : float, default=0.2
        Share of the values that are replaced by random ones.
    random_state : int, RandomState instance or None, default=None
        Draws the mutations.

    Returns
    -------
    ComposedDetector
        A fitted one, whose members are named "normal" and "background".

    Raises
    ------
    TypeError
        If `detector` is none of this package.
    ValueError
        If it was fitted on a table, X are images unlike those that it was fitted on, or `rate` does not lie between 0
        and 1.

    References
    ----------
    Ren, J., Liu, P. J., Fertig, E., Snoek, J., Poplin, R., DePristo, M. A., Dillon, J. V., Lakshminarayanan, B. (2019).
    Likelihood ratios for out-of-distribution detection. NeurIPS. arXiv:1906.02845.
    """
    if not isinstance(detector, GenerativeDetector):
        hint = ""
        if hasattr(detector, "steps"):
            hint = " Take the last step: likelihood_ratio(pipeline[-1], pipeline[:-1].transform(X))."
        raise TypeError(
            f"Likelihood ratios are of detectors of anomalib_gen with a density, got {type(detector).__name__}.{hint}"
        )
    check_is_fitted(detector)
    if len(detector.event_shape_) != 3:
        raise ValueError(
            "Likelihood ratios against mutated pixels are of detectors of images; this "
            f"{type(detector).__name__} was fitted on rows of shape {detector.event_shape_}."
        )
    X = detector._validate(X, reset=False, min_rows=2)
    # Zeros and ones are to stay such, in whatever type they are given.
    whole = X.astype(np.uint8) if getattr(detector, "observation", None) == "bernoulli" else X
    mutated = mutate_pixels(whole, rate=rate, random_state=random_state).astype(X.dtype, copy=False)
    background = clone(detector).fit(mutated)
    return ComposedDetector([("normal", detector), ("background", background)], weights=[1, -1]).fit(X)


class _ImageTransformer(TransformerMixin, BaseEstimator):
    """A transformer whose result are images, which no container of columns holds."""

    def set_output(self, *, transform: str | None = None) -> Self:
        """Change nothing: images stay arrays, also in a pipeline that is to return data frames.

        Parameters
        ----------
        transform : {"default", "pandas", "polars"} or None, default=None
            What the steps of a pipeline return.

        Returns
        -------
        self
        """
        return self


class ChannelsFirst(_ImageTransformer):
    """Bring images with channels at the end, or grey ones without, into the layout of detectors.

    Images that have their channels in front already do not go through it: detectors refuse what comes out, saying so.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen.images import ChannelsFirst
    >>> ChannelsFirst().fit_transform(np.zeros((5, 32, 24, 3))).shape
    (5, 3, 32, 24)
    >>> ChannelsFirst().fit_transform(np.zeros((5, 32, 24))).shape
    (5, 1, 32, 24)
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the number of dimensions; there is nothing to learn.

        Parameters
        ----------
        X : array-like of shape (n_samples, height, width, channels) or (n_samples, height, width)
        y : ignored

        Returns
        -------
        self
        """
        self._check(X)
        return self

    def transform(self, X: Any) -> npt.NDArray[Any]:
        """Move the channels, without a copy.

        Parameters
        ----------
        X : array-like of shape (n_samples, height, width, channels) or (n_samples, height, width)

        Returns
        -------
        ndarray of shape (n_samples, channels, height, width)
            A view of X, in its type.

        Raises
        ------
        ValueError
            If X has neither three nor four dimensions, or is a list of images of different shapes.
        """
        X = self._check(X)
        return X[:, None] if X.ndim == 3 else np.moveaxis(X, 3, 1)

    def inverse_transform(self, X: Any) -> npt.NDArray[Any]:
        """Move the channels of images to the end, to show them or to hand them on.

        Parameters
        ----------
        X : array-like of shape (n_samples, channels, height, width)

        Returns
        -------
        ndarray of shape (n_samples, height, width, channels)

        Raises
        ------
        ValueError
            If X does not have four dimensions, or is a list of images of different shapes.
        """
        X = stack_images(X)
        if X.ndim != 4:
            raise ValueError(
                f"Images (n, channels, height, width) are needed, got an array of shape {X.shape}."
            )
        return np.moveaxis(X, 1, 3)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @staticmethod
    def _check(X: Any) -> npt.NDArray[Any]:
        X = stack_images(X)
        if X.ndim not in (3, 4):
            raise ValueError(
                "Images (n, height, width, channels) or (n, height, width) are needed, got an array of shape "
                f"{X.shape}."
            )
        return X


class ImageReader(_ImageTransformer):
    """Read image files into the arrays that detectors take.

    Files are decoded one after the other, so that no more than one is held beside the result. A result beyond
    `max_bytes` is written to a temporary file that is mapped into memory; detectors read such arrays in blocks,
    processes of joblib share them, and the file goes with the array.

    Parameters
    ----------
    size : int, tuple of int or None, default=None
        Height and width that images are resized to, one number for both. None keeps them as they are, and then all must
        have the size of the first one that is read in `fit`.
    mode : {"RGB", "L"}, default="RGB"
        Colour, three channels, or grey, one. Transparency is dropped. Files with more than 8 bits a value cannot be
        read, in grey or in colour: what does not fit would be cut.
    on_error : {"raise", "skip"}, default="raise"
        What to do about files that cannot be read: refuse them all by name before anything is returned, or warn and
        leave them out. The result then has fewer images than files; `skipped_` says which are missing.
    max_bytes : int, default=2**30
        Largest result that is kept in memory.

    Attributes
    ----------
    event_shape_ : tuple of int
        ``(channels, height, width)`` of every image.
    skipped_ : list of str
        Files that the last call could not read.

    Notes
    -----
    Images stand as a viewer shows them: turned where the file says so (EXIF orientation), which a camera that was held
    upright does. Of a file with several images the first is read.

    Resizing is bilinear with antialiasing, after decoding, and keeps no proportions. Compare images only after the
    same resizing and coding: a difference in either is easier to detect than any anomaly.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> from anomalib_gen.images import ImageReader
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for grey in range(3):
    ...         Image.new("L", (20, 10), 80 * grey).save(f"{folder}/{grey}.png")
    ...     images = ImageReader(size=8, mode="L").fit_transform(folder)
    >>> images.shape, images.dtype, images[1, 0, 0, 0]
    ((3, 1, 8, 8), dtype('uint8'), np.uint8(80))
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "size": [Interval(Integral, 1, None, closed="left"), tuple, list, None],
        "mode": [StrOptions(set(CHANNELS))],
        "on_error": [StrOptions({"raise", "skip"})],
        "max_bytes": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(
        self,
        *,
        size: int | tuple[int, int] | None = None,
        mode: str = "RGB",
        on_error: str = "raise",
        max_bytes: int = 2**30,
    ) -> None:
        self.size = size
        self.mode = mode
        self.on_error = on_error
        self.max_bytes = max_bytes

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Find the size of images: `size`, or that of the first file that can be read.

        Parameters
        ----------
        X : path of a folder, or sequence of paths of files
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If there is no file, or none that can be read.
        """
        paths = list_images(X)
        if self.size is None:
            height, width = self._first_size(paths)
        else:
            size: Any = self.size
            sides = list(size) if np.iterable(size) else [size, size]
            whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
            if len(sides) != 2 or not whole or min(sides) < 1:
                raise ValueError(
                    f"size must be a positive integer or a pair (height, width), got {self.size!r}."
                )
            height, width = (int(side) for side in sides)
        self.event_shape_ = (CHANNELS[self.mode], height, width)
        return self

    def transform(self, X: Any) -> npt.NDArray[np.uint8]:
        """Read files.

        Parameters
        ----------
        X : path of a folder, or sequence of paths of files
            A folder is read with all below it, in the order of the paths; `list_images` says which files are taken.

        Returns
        -------
        ndarray of uint8 of shape (n_images, channels, height, width)
            A `numpy.memmap` beyond `max_bytes`.

        Raises
        ------
        OSError
            If a folder below X may not be read, or the result is to be mapped and the disk lacks the space.
        ValueError
            If files cannot be read, or have another size where none was asked for, and `on_error` is "raise"; if none
            can be read.

        Warns
        -----
        UserWarning
            If files were skipped.
        """
        check_is_fitted(self)
        paths = list_images(X)
        images = self._allocate(len(paths))
        errors: list[str] = []
        skipped: list[str] = []
        n = 0
        for path in paths:
            try:
                images[n] = self._decode(path, self.event_shape_)
                n += 1
            except UNREADABLE as error:
                errors.append(f"{path} ({str(error) or type(error).__name__})")
                skipped.append(path)
        self.skipped_ = skipped
        if errors and (self.on_error == "raise" or n == 0):
            raise ValueError(
                f"{len(errors)} of {len(paths)} files cannot be read: {_named(errors)}. Remove them, or set "
                "on_error='skip'."
            )
        if errors:
            warn_user(
                f"{len(errors)} of {len(paths)} files cannot be read and are left out: {_named(errors)}. "
                "See skipped_ for all of them.",
            )
        return images[:n]

    def _first_size(self, paths: Sequence[str]) -> tuple[int, int]:
        """Height and width of the first file; of the first that can be read, if others are skipped."""
        errors = []
        for path in paths:
            try:
                _, height, width = self._decode(path, None).shape
                return height, width
            except UNREADABLE as error:
                errors.append(f"{path} ({str(error) or type(error).__name__})")
                if self.on_error == "raise":
                    break
        raise ValueError(f"No size can be told from {_named(errors)}.")

    def _allocate(self, n: int) -> npt.NDArray[np.uint8]:
        shape = (n, *self.event_shape_)
        if int(np.prod(shape)) <= self.max_bytes:
            return np.empty(shape, dtype=np.uint8)
        # The file keeps its name as long as it is mapped: by it joblib's processes find the data.
        descriptor, path = tempfile.mkstemp(prefix="anomalib_gen-", suffix=".images")
        try:
            _reserve(descriptor, int(np.prod(shape)))
        except OSError as error:
            _remove(path)
            raise OSError(
                error.errno,
                f"{n} images of shape {self.event_shape_} need {np.prod(shape) / 2**30:.1f} GiB on disk "
                f"({error.strerror}). Set the environment variable TMPDIR to a folder with more space, or lower size",
                tempfile.gettempdir(),
            ) from error
        finally:
            os.close(descriptor)
        images = np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)  # "w+" would give the space back
        weakref.finalize(images.base, _remove, path)  # the mapping, which views of the array hold, too
        return images

    def _decode(self, path: str, event_shape: tuple[int, int, int] | None) -> npt.NDArray[np.uint8]:
        """One file as ``(channels, height, width)``; in the mode of `fit`, if that is over."""
        mode = self.mode if event_shape is None else MODES[event_shape[0]]
        try:
            from PIL import Image, ImageOps, UnidentifiedImageError
        except ImportError as error:  # pragma: no cover
            raise ModuleNotFoundError(
                "Reading image files needs Pillow: pip install 'anomalib-gen[images]'."
            ) from error

        try:
            # A stream: files that Pillow knows by name it maps into memory, and then garbles turned grey TIFF files.
            with open(path, "rb") as stream, Image.open(stream) as file:
                if file.mode[0] in "IF" or any(map(_is_deep, file.tile)):
                    # Pillow would cut what is beyond 255, and fractions; of colours it would drop the lower 8 bits.
                    raise ValueError(
                        f"more than 8 bits a value, mode {file.mode!r}; convert it to 8 bits, or read it into an array "
                        "of real numbers"
                    )
                file.info.pop("transparency", None)  # of some forms of it the conversion would warn
                image = ImageOps.exif_transpose(file).convert(mode)
        except UnidentifiedImageError as error:
            raise ValueError("no image that Pillow can read") from error
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        if event_shape is not None and image.size != (event_shape[2], event_shape[1]):
            if self.size is None:
                raise ValueError(
                    f"{image.height} x {image.width} pixels in place of {event_shape[1]} x {event_shape[2]}; set size"
                )
            image = image.resize((event_shape[2], event_shape[1]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


def _reserve(descriptor: int, size: int) -> None:
    """Take the space of a file now: a mapped file that finds the disk full later ends the process."""
    if not hasattr(os, "posix_fallocate"):  # pragma: no cover
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot do it
            raise


def _is_deep(tile: Any) -> bool:
    """Whether a part of a file has more than 8 bits a value: by the name of its layout, or the largest value of PPM."""
    name, _, _, arguments = tile
    if name.startswith("ppm") and isinstance(arguments, tuple):
        return bool(arguments[1] > 255)
    return ";16" in str(arguments) and "BGR;16" not in str(arguments)  # that is 16 bits a pixel


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def list_images(X: Any) -> list[str]:
    """Paths of image files: those in a folder and below it, sorted, or the given ones in their order.

    Parameters
    ----------
    X : path of a folder, or sequence of paths of files
        The images of a folder are its files that end in .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff or
        .webp, in either case. Links to other folders are followed, and each folder is read once. Files that are listed
        may have any ending.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If there are none, or X is a table of several columns.
    TypeError
        If X is no sequence, such as a generator, or holds something else than paths.
    OSError
        If a folder below X may not be read.
    """
    if isinstance(X, str | os.PathLike):
        folder = Path(X)
        if not os.path.isdir(X):  # of "", an unset variable, Path makes the working directory
            raise ValueError(
                f"X={os.fspath(X)!r} is no folder. Give a folder, or a list of the paths of files."
            )
        paths = sorted(str(path) for path in _walk(folder) if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"There are no image files ({', '.join(SUFFIXES)}) in {folder}.")
        return paths
    given = np.asarray(X, dtype=object)
    if given.ndim == 0:
        # (What can be gone through once would be empty in `transform` after `fit`; a set has no order.)
        hint = " Give list(X)." if isinstance(X, Iterator) else ""
        raise TypeError(f"X must be a folder or a sequence of paths of files, got {type(X).__name__}.{hint}")
    paths = []
    for path in given.ravel():
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"X must be a folder or paths of files, but holds {type(path).__name__} values. Arrays of images need "
                "no reader."
            )
        paths.append(os.fspath(path))
    if not paths:
        raise ValueError("X names no files.")
    if len(paths) != len(given):
        raise ValueError(
            f"X must be paths of files, one an image, got a table of shape {given.shape}. Take the column of paths."
        )
    if len(paths) > 1 and all(len(path) == 1 for path in paths) and not any(map(os.path.isfile, paths)):
        raise TypeError(
            "X holds single letters, as of a folder's name that was split into parts. Whatever splits rows takes "
            "files: anomalib_gen.images.list_images(folder)."
        )
    return paths


def _walk(folder: Path) -> Iterator[Path]:
    """Files in a folder and below it; a link to nothing is one, and is to be named later."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for place, below, files in os.walk(folder, followlinks=True, onerror=refuse):
        below.sort()  # of two ways to a folder always the same one is taken
        real = os.path.realpath(place)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(place, file) for file in files)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
