"""A threshold or p-values for a saved model, from files of normal rows, and a training reference made from them.

The rows are read and scored part by part; what stays in memory is one score a row, of at most `MAX_SCORES` rows, and so
much is in the folder of a model that makes p-values. Of more rows as many are drawn at random, each with the same
chance. That keeps what is promised: which rows are drawn does not depend on their scores, so if all n rows and a new
normal one are exchangeable, the m drawn ones and the new one are as well, and the new one's p-value,
(1 + #{s_i <= s}) / (m + 1), is at most t with probability at most t. What is lost is p-values below 1 / (m + 1).

The model inside is not touched: it is wrapped in `ThresholdDetector` or `SplitConformalDetector`, in place of an
earlier such wrapper, and saved to a folder of its own, without pickle like every other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.frozen import FrozenEstimator

from anomalib_gen import persistence
from anomalib_gen._outlier import is_below
from anomalib_gen.calibration import (
    Contamination,
    FalsePositiveRate,
    SplitConformalDetector,
    TailProbability,
    ThresholdDetector,
)
from anomalib_gen.calibration._wrapped import WrappedDetector
from anomalib_gen.monitoring import Summariser, reference_of
from anomalib_gen.persistence import ModelFolderError
from anomalib_gen.scoring._columns import Wanted, wanted_by
from anomalib_gen.scoring._errors import DataError, UsageError, explain_os_error
from anomalib_gen.scoring._log import Log, count
from anomalib_gen.scoring.config import CalibrateOptions
from anomalib_gen.scoring.rows import check_folder, finite, load_model, score_rows, threshold_of
from anomalib_gen.scoring.sources import Alike, Reader, find_inputs, rows_per_part

MAX_SCORES = 2**20
"""Scores that calibrate: 8 MB, p-values from one in a million on, and rates of 5 % to within 0.02 %."""


def calibrate_files(options: CalibrateOptions, log: Log) -> dict[str, Any]:
    """Calibrate a saved model and save the result.

    Returns
    -------
    dict
        "model" (the content hash), "folder", "method", "rows", "scores" (how many of them calibrate), "threshold" and
        "flagged": the share of those scores below it.

    Raises
    ------
    UsageError, DataError
        As the exit codes say. What was there is then untouched.
    """
    folder = options.output or options.model
    if os.path.lexists(folder) and not options.overwrite:
        what = "Choose another --output" if options.output else "Give an --output"
        raise UsageError(f"{folder} exists already. {what}, or replace it with --overwrite.")
    check_folder(folder, overwrite=options.overwrite)
    model, facts = load_model(options.model, options.trusted)
    wanted = wanted_by(facts["schema"], (), model)
    summary, sample = Summariser(), _Sample(MAX_SCORES)
    for frame, part in scored_rows(options.input, model, wanted, log):
        summary.add(frame)
        sample.add(part)
    s = sample.scores()
    if not len(s):
        raise DataError("The files have no rows.")
    if len(s) < sample.n_rows:
        log.info(f"{count(len(s), 'row')} of {sample.n_rows:,} calibrate, drawn at random")
    try:
        calibrated = _calibrated(model, s, options)
    except DataError as error:
        if len(s) < sample.n_rows:
            raise DataError(
                f"{error} Of {sample.n_rows:,} rows {len(s):,} calibrate, and no more can; `--method tail` goes to "
                "lower rates."
            ) from None
        raise
    threshold = threshold_of(calibrated)
    reference = reference_of(summary.columns(), s, threshold=threshold, held_out=True)
    try:
        content = persistence.save_described(
            calibrated,
            folder,
            schema=facts["schema"],
            reference=reference.to_bytes(),
            overwrite=options.overwrite,
            trusted=options.trusted,
        )
    except (FileExistsError, ModelFolderError) as error:
        raise UsageError(str(error).replace("overwrite=True", "--overwrite")) from None
    except OSError as error:
        raise explain_os_error(error, f"writing {folder}") from None
    flagged = float(is_below(s, threshold).mean())
    log.info(
        f"saved {folder}, hash {content}: {flagged:.3%} of {count(len(s), 'row')} are below the threshold",
        model=folder,
        hash=content,
    )
    return {
        "model": content,
        "folder": folder,
        "method": options.method,
        "rows": sample.n_rows,
        "scores": len(s),
        "threshold": finite(threshold),
        "flagged": flagged,
    }


class _Sample:
    """Scores of rows that come in parts: of all, or of `limit` drawn ones, in the order in which they came.

    A row is drawn if its random number is among the smallest; which rows are depends on their order alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._random, self.n_rows = limit, np.random.default_rng(0), 0
        self._parts: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = []
        self._held = 0
        self._largest = np.inf

    def add(self, scores: npt.NDArray[np.float64]) -> None:
        """See more rows."""
        keys = self._random.random(len(scores))
        self.n_rows += len(scores)
        near = keys < self._largest
        self._parts.append((keys[near], scores[near]))
        self._held += int(near.sum())
        # (Not at every part, of which there may be many small ones.)
        if self._held > 2 * self._limit:
            self._cut()

    def _cut(self) -> None:
        keys, scores = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        if len(keys) > self._limit:
            chosen = np.sort(np.argpartition(keys, self._limit - 1)[: self._limit])
            keys, scores = keys[chosen], scores[chosen]
            self._largest = float(keys.max())
        self._parts, self._held = [(keys, scores)], len(keys)

    def scores(self) -> npt.NDArray[np.float64]:
        """What was drawn so far."""
        if not self._parts:
            return np.empty(0)
        self._cut()
        return self._parts[0][1]


def scored_rows(
    patterns: tuple[str, ...], model: Any, wanted: Wanted, log: Log
) -> Iterator[tuple[pd.DataFrame, npt.NDArray[np.float64]]]:
    """Rows of files by the names that a training reference gives them, and their scores.

    Raises
    ------
    DataError
        If a file cannot be read, or a row cannot be scored.
    """
    alike = Alike(wanted)
    with log.progress("rows") as bar:
        for item in find_inputs(patterns):
            reader = alike.check_names(Reader(item, wanted))
            for part in reader.parts(rows_per_part(wanted.count)):
                frame, bad = part.frame(reader.names, wanted.types)
                scores, refused = score_rows(model, frame, named=wanted.names is not None, limit=0)
                odd = {int(part.rows[row]): reason for row, reason in {**refused, **bad}.items()}
                odd |= {line: reason for line, (reason, _) in part.malformed.items()}
                if odd:
                    row = min(odd)
                    raise DataError(
                        f"{item.path} has a bad row: row {row}, {odd[row]}. Mend it and run again."
                    )
                if wanted.names is None:
                    frame.columns = pd.Index([str(j) for j in range(frame.shape[1])])
                yield frame, scores
                bar.update(len(part.rows))
            log.info(f"scored {item.path}", file=item.path)


def _calibrated(model: Any, scores: npt.NDArray[np.float64], options: CalibrateOptions) -> Any:
    if options.method == "keep":
        return model
    while isinstance(model, WrappedDetector | FrozenEstimator):
        if isinstance(model, WrappedDetector) and not hasattr(model, "estimator_"):
            raise UsageError(
                f"{options.model} holds a {type(model).__name__} of several models, with a calibration of its own. "
                "Only `--method keep` suits it."
            )
        model = model.estimator_ if isinstance(model, WrappedDetector) else model.estimator
    frozen = FrozenEstimator(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if options.method == "conformal":
                conformal = SplitConformalDetector(frozen, alpha=options.rate)
                conformal._calibrate(frozen, scores)
                return conformal
            rule: Any = {
                "false-positive-rate": lambda: FalsePositiveRate(options.rate, options.confidence),
                "tail": lambda: TailProbability(options.rate, options.tail_fraction),
                "contamination": lambda: Contamination(options.rate),
            }[options.method]()
            detector = ThresholdDetector(frozen, threshold=type(rule)(**rule.get_params()))
            detector._calibrate(frozen, rule, scores)
            return detector
    except (ValueError, UserWarning) as error:
        # (A p-value that none reaches is a warning in Python; a job that flags nothing for ever is an error.)
        raise DataError(
            str(error).replace("alpha=", "--rate ").replace("Raise alpha", "Raise --rate")
        ) from None
