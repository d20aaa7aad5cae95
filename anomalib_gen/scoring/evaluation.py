"""How well a saved model tells labelled rows apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_gen._outlier import is_below
from anomalib_gen.scoring._columns import wanted_by
from anomalib_gen.scoring._errors import DataError, UsageError, explain_os_error
from anomalib_gen.scoring._log import Log
from anomalib_gen.scoring.config import EvaluateOptions
from anomalib_gen.scoring.parts import to_json, write_output
from anomalib_gen.scoring.rows import finite, load_model, score_rows, threshold_of
from anomalib_gen.scoring.sources import (
    Alike,
    Reader,
    check_beside_model,
    check_output,
    find_inputs,
    local_place,
    rows_per_part,
)


def evaluate_files(options: EvaluateOptions, log: Log) -> dict[str, Any]:
    """Score labelled files and compare.

    Returns
    -------
    dict
        "rows", "anomalies", "flagged", "threshold", "model", "auroc", "average_precision", and of the labels at the
        threshold "precision", "recall", "f1" and "false_positive_rate"; None where a figure is not defined.

    Raises
    ------
    UsageError, DataError
        As the exit codes say.
    """
    output = None if options.output is None else Path(local_place(options.output))
    if output is not None and output.is_dir():
        raise UsageError(f"--output {output} is a folder. Name a file.")
    if output is not None and output.exists() and not options.overwrite:
        raise UsageError(f"{output} exists already. Choose another output, or replace it with --overwrite.")
    model, facts = load_model(options.model, options.trusted)
    wanted = wanted_by(facts["schema"], (options.label,), model)
    inputs = find_inputs(options.input)
    if output is not None:
        check_output(str(options.output), "--output", inputs)
        check_beside_model(str(options.output), "--output", options.model)
    scores, anomalous, alike = [], [], Alike(wanted)
    with log.progress("rows") as bar:
        for item in inputs:
            for part in alike.check_names(Reader(item, wanted)).parts(rows_per_part(wanted.count)):
                names = wanted.names or [name for name in part.table.column_names if name != options.label]
                frame, bad = part.frame(names, wanted.types)
                values = part.column(options.label).to_pylist()
                values_of_part, refused = score_rows(model, frame, named=wanted.names is not None, limit=0)
                lines = {line: reason for line, (reason, _) in part.malformed.items()}
                odd = {int(part.rows[row]): reason for row, reason in {**refused, **bad}.items()} | lines
                odd |= {int(part.rows[k]): "no label" for k, value in enumerate(values) if value is None}
                if odd:
                    row = min(odd)
                    raise DataError(
                        f"{item.path} has a bad row: row {row}, {odd[row]}. Mend it and run again."
                    )
                scores.append(values_of_part)
                anomalous.append(np.array([_same(value, options.anomaly) for value in values], dtype=bool))
                bar.update(len(part.rows))
            log.info(f"scored {item.path}", file=item.path)
    if not sum(map(len, scores)):
        raise DataError("The files have no rows.")
    threshold = threshold_of(model)
    found = {
        "model": facts["hash"],
        "threshold": finite(threshold),
        **figures(np.concatenate(scores), np.concatenate(anomalous), threshold),
    }
    if not found["anomalies"]:
        log.warning(
            f"no row has {options.anomaly!r} in {options.label!r}; --anomaly says which value marks anomalies"
        )
    if output is not None:
        try:
            write_output(output, to_json(found) + b"\n")
        except OSError as error:
            raise explain_os_error(error, f"writing {output}") from None
    return found


def _same(value: Any, text: str) -> bool:
    """Whether a label is the one that a user wrote as text: 1, 1.0 and "1" are."""
    if str(value) == text:
        return True
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value).lower() == text.lower()


def figures(scores: Any, anomalous: Any, threshold: float) -> dict[str, Any]:
    """Figures of scores ``(n,)``, lower = more abnormal, against what is anomalous ``(n,)``."""
    flagged = is_below(scores, threshold)
    hits, n_flagged, n_anomalies = int((flagged & anomalous).sum()), int(flagged.sum()), int(anomalous.sum())
    both = 0 < n_anomalies < len(scores)
    precision = hits / n_flagged if n_flagged else None
    recall = hits / n_anomalies if n_anomalies else None
    n_normal = len(scores) - n_anomalies
    return {
        "rows": len(scores),
        "anomalies": n_anomalies,
        "flagged": n_flagged,
        "auroc": float(roc_auc_score(anomalous, -scores)) if both else None,
        "average_precision": float(average_precision_score(anomalous, -scores)) if both else None,
        "precision": precision,
        "recall": recall,
        "f1": 2 * hits / (n_flagged + n_anomalies) if n_flagged + n_anomalies else None,
        "false_positive_rate": (n_flagged - hits) / n_normal if n_normal else None,
    }
