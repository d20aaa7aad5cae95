"""Which columns make a row anomalous: of flagged rows in a scored output, and in a file of its own.

Contributions are those of `anomalib_gen.explain`, in blocks of rows that depend on the input alone, so that a run that
was killed gives the same bytes. They cost a few hundred evaluations of the model a row: only rows that are flagged, or
the lowest ones, are explained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from anomalib_gen.explain import FeatureContributions, feature_contributions
from anomalib_gen.explain._columns import sources, split_pipeline
from anomalib_gen.scoring._errors import UsageError
from anomalib_gen.scoring._log import Log

BLOCK_ROWS = 512
"""Rows that are explained at once."""


class Explainer:
    """Contributions of a model's columns.

    Parameters
    ----------
    model : fitted detector or pipeline
    names : sequence of str
        Its columns.
    named : bool
        Whether the model knows them by name.
    log : Log
    background : DataFrame or None, default=None
        Normal rows to start from.
    method : str, default="auto"
        As for `feature_contributions`.

    Raises
    ------
    UsageError
        If the model's rows cannot be explained.
    """

    def __init__(
        self,
        model: Any,
        names: list[str],
        *,
        named: bool,
        log: Log,
        background: pd.DataFrame | None = None,
        method: str = "auto",
    ) -> None:
        front, inner = split_pipeline(model)
        if not hasattr(inner, "_torch_energy"):
            raise UsageError(f"A {type(inner).__name__} has no energy, so its rows cannot be explained.")
        if background is None and not hasattr(inner, "_scaler"):
            raise UsageError(
                f"A {type(inner).__name__} keeps no mean row that an explanation could start from: use "
                "`anomalib-gen explain` with --background."
            )
        try:
            if front is not None:
                sources(front, range(len(names)), names)
        except (ValueError, TypeError) as error:
            raise UsageError(f"Rows cannot be explained: {error}") from None
        self.model, self.names, self.named, self.log, self.method = model, names, named, log, method
        self.background = None if background is None else self._rows(background)
        self._warned = False

    def _rows(self, frame: pd.DataFrame) -> Any:
        return frame if self.named else frame.to_numpy()

    def contributions(self, frame: pd.DataFrame) -> Iterator[FeatureContributions]:
        """Contributions of rows, in blocks.

        Raises
        ------
        UsageError
            If the method does not suit the model.
        """
        for start in range(0, len(frame), BLOCK_ROWS):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    block = feature_contributions(
                        self.model,
                        self._rows(frame.iloc[start : start + BLOCK_ROWS]),
                        method=self.method,
                        background=self.background,
                    )
                except (TypeError, ValueError) as error:
                    raise UsageError(f"Rows cannot be explained: {error}") from None
            if caught and not self._warned:
                self.log.warning(f"explanations: {caught[0].message}")
                self._warned = True
            yield block


def top_fields(count: int) -> list[pa.Field]:
    """Columns of the output for the columns that contribute most."""
    kinds = (("feature", pa.string()), ("value", pa.string()), ("contribution", pa.float64()))
    return [pa.field(f"top_{k}_{name}", kind) for k in range(1, count + 1) for name, kind in kinds]


def top_columns(
    explainer: Explainer, frame: pd.DataFrame, flagged: npt.NDArray[np.bool_], count: int
) -> dict[str, pa.Array]:
    """Values of `top_fields` for rows, null where a row is not flagged or has no more columns."""
    rows = np.flatnonzero(flagged)
    tops: list[list[tuple[str, Any, float]]] = []
    for block in explainer.contributions(frame.iloc[rows]):
        block.feature_names[:] = explainer.names
        tops += block.top(count)
    columns: dict[str, list[Any]] = {field.name: [None] * len(frame) for field in top_fields(count)}
    for row, top in zip(rows, tops, strict=True):
        for k, (name, value, contribution) in enumerate(top, start=1):
            columns[f"top_{k}_feature"][row] = name
            columns[f"top_{k}_value"][row] = shown(value)
            columns[f"top_{k}_contribution"][row] = contribution
    return {field.name: pa.array(columns[field.name], field.type) for field in top_fields(count)}


def shown(value: Any) -> str | None:
    """A value of any type as text; None for a missing one."""
    return None if pd.isna(value) else str(value)
