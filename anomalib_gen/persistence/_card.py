"""The model card: a page of Markdown for people, made from a folder's document. Nothing is ever loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_COLUMNS = 100
"""Columns listed; the others are counted."""


def model_card(document: Mapping[str, Any]) -> str:
    """Markdown of a document."""
    schema, training = document["schema"], document["training"]
    lines = [
        f"# Model card: {_text(document['class'])}",
        "",
        f"- Content hash: `{_text(document['hash'])}`",
        f"- Format: version {document['version']}",
        f"- Versions: {', '.join(f'{_text(k)} {_text(v)}' for k, v in sorted(document['versions'].items()))}",
        "",
        "## What it does",
        "",
        "It scores rows; lower is more abnormal. Rows that score below the threshold are labelled -1 (outlier), the "
        "others +1.",
        "",
        "```python",
        "import anomalib_gen",
        "",
        'detector = anomalib_gen.load("path/to/this/folder")',
        "detector.score_samples(X), detector.predict(X)",
        "```",
        "",
        "## Training",
        "",
    ]
    for part in training:
        lines += [f"### {_text(part['class'])}{_place(part)}", "", "| | |", "| --- | --- |"]
        labels = {
            "offset": "Threshold",
            "anomaly": "Anomaly",
            "n_features_in": "Columns",
            "image_shape": "Images (channels, height, width)",
            "n_weights": "Weights",
            "n_iter": "Gradient steps",
            "best_iter": "Step whose weights were kept",
            "last_loss": "Last training loss",
            "best_validation_loss": "Best held-out loss",
            "log_normalizer": "log Z",
            "seeds": "Seeds",
        }
        lines += [f"| {label} | {_text(part[key])} |" for key, label in labels.items() if key in part]
        lines += ["", "Parameters:", ""]
        lines += [f"- `{_text(name)}` = `{_text(value)}`" for name, value in part["parameters"].items()]
        lines.append("")
    lines += ["## Rows", ""]
    if schema["n_rows"] is not None:
        lines += [f"Described from {schema['n_rows']} rows.", ""]
    columns = schema["columns"]
    if columns is None:
        images = any("image_shape" in part for part in training)
        lines.append("They are images." if images else "Nothing is known of the columns.")
    else:
        lines += ["| column | type | range or values | missing |", "| --- | --- | --- | --- |"]
        lines += [_row(column) for column in columns[:MAX_COLUMNS]]
        if len(columns) > MAX_COLUMNS:
            lines += ["", f"and {len(columns) - MAX_COLUMNS} more columns."]
    lines += [
        "",
        "## Limits",
        "",
        "What is abnormal was learned from the rows above. Where what is normal changes, fit it again. A low score "
        "says that a row is unusual, not that it is wrong.",
        "",
    ]
    return "\n".join(lines)


def _row(column: Mapping[str, Any]) -> str:
    if "min" in column:
        values = f"{column['min']:.6g} to {column['max']:.6g}"
    else:
        values = ", ".join(_text(value) for value in column.get("categories", [])[:10])
    missing = {True: "yes", False: "no", None: ""}[column.get("missing")]
    return f"| {_text(column['name'])} | {_text(column['type'] or 'unknown')} | {values} | {missing} |"


def _place(part: Mapping[str, Any]) -> str:
    return f" at `{_text(part['path'])}`" if part["path"] else ""


def _text(value: Any) -> str:
    """Text that stays in its cell: names of columns are anybody's."""
    shown = " ".join(str(value).split())
    return shown.replace("`", "'").replace("|", "\\|").replace("<", "&lt;")[:500]
