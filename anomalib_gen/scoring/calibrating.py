"""A threshold or p-values for a saved model, from files of normal rows, and a training reference made from them.

The rows are read and scored part by part; what stays in memory is one score a row. The model inside is not touched:
it is wrapped in `ThresholdDetector` or `SplitConformalDetector`, in place of an earlier such wrapper, and saved to a
folder of its own, without pickle like every other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.frozen import FrozenEstimator

from anomalib_gen import persistence
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
from anomalib_gen.scoring._columns import Wanted, to_frame, wanted_by
from anomalib_gen.scoring._errors import DataError, UsageError, explain_os_error
from anomalib_gen.scoring._log import Log
from anomalib_gen.scoring.config import CalibrateOptions
from anomalib_gen.scoring.rows import finite, load_model, score_rows, threshold_of
from anomalib_gen.scoring.sources import Reader, find_inputs, rows_per_part


def calibrate_files(options: CalibrateOptions, log: Log) -> dict[str, Any]:
    """Calibrate a saved model and save the result.

    Returns
    -------
    dict
        "model" (the content hash), "folder", "method", "rows", "threshold" and "flagged": the share of the rows below
        it.

    Raises
    ------
    UsageError, DataError
        As the exit codes say. What was there is then untouched.
    """
    folder = Path(options.output or options.model)
    if os.path.lexists(folder) and not options.overwrite:
        what = "Choose another --output" if options.output else "Give an --output"
        raise UsageError(f"{folder} exists already. {what}, or replace it with --overwrite.")
    model, facts = load_model(options.model)
    wanted = wanted_by(facts["schema"], (), model)
    summary, scores = Summariser(), []
    for frame, part in scored_rows(options.input, model, wanted, log):
        summary.add(frame)
        scores.append(part)
    s = np.concatenate(scores) if scores else np.empty(0)
    if not len(s):
        raise DataError("The files have no rows.")
    calibrated = _calibrated(model, s, options)
    threshold = threshold_of(calibrated)
    reference = reference_of(summary.columns(), s, threshold=threshold, held_out=True)
    try:
        content = persistence.save_described(
            calibrated,
            folder,
            schema=facts["schema"],
            reference=reference.to_bytes(),
            overwrite=options.overwrite,
        )
    except (FileExistsError, ModelFolderError) as error:
        raise UsageError(str(error).replace("overwrite=True", "--overwrite")) from None
    except OSError as error:
        raise explain_os_error(error, f"writing {folder}") from None
    flagged = float((s < threshold).mean())
    log.info(
        f"saved {folder}, hash {content}: {flagged:.3%} of {len(s)} rows are below the threshold",
        model=str(folder),
        hash=content,
    )
    return {
        "model": content,
        "folder": str(folder),
        "method": options.method,
        "rows": len(s),
        "threshold": finite(threshold),
        "flagged": flagged,
    }


def scored_rows(
    patterns: tuple[str, ...], model: Any, wanted: Wanted, log: Log
) -> Iterator[tuple[pd.DataFrame, npt.NDArray[np.float64]]]:
    """Rows of files by the names that a training reference gives them, and their scores.

    Raises
    ------
    DataError
        If a file cannot be read, or a row cannot be scored.
    """
    for item in find_inputs(patterns):
        reader = Reader(item, wanted)
        for part in reader.parts(rows_per_part(wanted.count)):
            frame, bad = to_frame(part.table, reader.names, wanted.types)
            scores, refused = score_rows(model, frame, named=wanted.names is not None, limit=0)
            odd = {int(part.rows[row]): reason for row, reason in {**refused, **bad}.items()}
            odd |= {line: reason for line, (reason, _) in part.malformed.items()}
            if odd:
                row = min(odd)
                raise DataError(f"{item.path} has a bad row: row {row}, {odd[row]}. Mend it and run again.")
            if wanted.names is None:
                frame.columns = pd.Index([str(j) for j in range(frame.shape[1])])
            yield frame, scores
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
