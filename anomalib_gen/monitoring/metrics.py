"""The state of the latest run as a text file for Prometheus' node exporter (its textfile collector).

Labels are few: a run of a table of a thousand columns would be thousands of series, so the drift of single columns is
written for so many of them only, the most drifted first, and of all there are the largest values.
"""

from __future__ import annotations

from typing import Any

from anomalib_gen.monitoring.drift import DriftReport

MAX_COLUMNS = 50
"""Columns with series of their own."""


def metrics_of(report: DriftReport, *, job: str, model: str, time: float) -> bytes:
    """Metrics of a run, in Prometheus' text format.

    Parameters
    ----------
    report : DriftReport
    job : str
        Label "job_name" of every series ("job" is Prometheus' own): several jobs can write files into one folder.
    model : str
        The model's hash, a label of ``anomalib_gen_model_info``.
    time : float
        Of the run, in seconds since 1970: alert when it is long ago.

    Returns
    -------
    bytes
    """
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()

    def gauge(name: str, help: str, value: float | None, **labels: str) -> None:
        if value is None:
            return
        key = f"anomalib_gen_{name}"
        if key not in gauges:
            gauges[key] = Gauge(key, help, ["job_name", *labels], registry=registry)
        gauges[key].labels(job, *labels.values()).set(value)

    gauges: dict[str, Any] = {}
    gauge("run_timestamp_seconds", "When the run was first looked at.", time)
    gauge("model_info", "1; the model's hash is a label.", 1, model=model)
    gauge("rows", "Rows that were scored.", report.n_rows)
    gauge("outliers", "Rows below the threshold.", report.n_flagged)
    gauge("bad_rows", "Rows that could not be scored.", report.n_bad_rows)
    gauge("bad_files", "Files that could not be scored.", report.n_bad_files)
    gauge("usual_rows", "Median of recent runs.", report.usual_rows)
    kinds = ("scores", "alert-rate", "volume", "distribution", "missing", "unseen")
    for kind in kinds:
        count = sum(alert.kind == kind for alert in report.alerts)
        gauge("alerts", "Alerts of the run, by kind.", count, kind=kind)
    if (scores := report.scores) is not None:
        gauge("score_ks_distance", "Kolmogorov-Smirnov distance of the scores.", scores.distance)
        gauge("score_psi", "Population stability index of the scores.", scores.psi)
        gauge("score_wasserstein", "Wasserstein distance of the scores, in spreads.", scores.wasserstein)
        gauge("score_energy_p_value", "p-value of the scores' energy test.", scores.p_value)
        gauge("outlier_rate", "Share of outliers.", scores.rate_batch)
        gauge("outlier_rate_reference", "Share of outliers among normal rows.", scores.rate_reference)
    if report.columns:
        gauge("drifted_columns", "Columns that raised an alert.", sum(c.drifted for c in report.columns))
        for name, of in (("distance", "KS distance or total variation"), ("psi", "PSI")):
            largest = max(getattr(column, name) for column in report.columns)
            gauge(f"column_{name}_max", f"Largest {of} of a column.", largest)
        first = sorted(report.columns, key=lambda column: (-column.drifted, -column.psi, column.name))
        for column in first[:MAX_COLUMNS]:
            gauge("column_distance", "KS distance or total variation.", column.distance, column=column.name)
            gauge("column_psi", "Population stability index.", column.psi, column=column.name)
            gauge("column_missing_rate", "Share missing.", column.missing_batch, column=column.name)
    return bytes(generate_latest(registry))
