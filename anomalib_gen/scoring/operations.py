"""The commands around scoring: is the model still right for the data, where is its threshold, and why this row."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from anomalib_gen.scoring._log import Log, count
from anomalib_gen.scoring.commands import (
    Config,
    Inputs,
    LogFormat,
    Logs,
    Model,
    Overwrite,
    Quiet,
    Trusted,
    reported,
    require,
)


def _option(*flags: str, **settings: Any) -> Any:
    return typer.Option(*flags, show_default=False, **settings)


def calibrate(
    input: Inputs = None,
    model: Model = None,
    trusted: Trusted = None,
    output: Annotated[
        str | None,
        _option(
            "--output", "-o", metavar="FOLDER", help="Model folder to make. Default: MODEL, with --overwrite."
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option(
            metavar="NAME",
            help="false-positive-rate (default), tail (for rates below one by the number of rows), contamination, "
            "conformal (p-values), or keep (describe the rows, leave the threshold).",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        _option(
            metavar="NUMBER",
            help="Share of normal rows that may be flagged; of conformal the largest p-value that is. Default: 0.05.",
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        _option(
            metavar="NUMBER",
            help="Probability that a false-positive rate is kept, for these rows. Default: kept on average.",
        ),
    ] = None,
    tail_fraction: Annotated[
        float | None, _option(metavar="NUMBER", help="Share of the rows that make a tail. Default: 0.1.")
    ] = None,
    overwrite: Overwrite = None,
    config: Config = None,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.text,
) -> None:
    """Set the threshold of a saved model by files of normal rows, and describe them for `monitor`.

    The rows must be normal, and others than those of `fit`: scores of training rows look too normal, and promise
    nothing about new ones. The result is a model folder like any other, with another hash; of `--method conformal`
    `score` adds a column p_value: of a normal row it is at most t with probability at most t.

    **Exit codes**: 0 done; 1 usage; 2 files that cannot be read or written, do not fit the model, or are too few rows
    for the rate; 5 internal error.

    **Example**: `anomalib-gen calibrate normal/ -m model --method conformal --rate 0.01 -o calibrated`
    """
    log = Log(quiet=quiet, as_json=log_format is LogFormat.json)
    with reported(log):
        import json

        from anomalib_gen.scoring.config import CalibrateOptions, resolve

        flags = {
            "input": input,
            "model": model,
            "trusted": trusted,
            "output": output,
            "method": method,
            "rate": rate,
            "confidence": confidence,
            "tail_fraction": tail_fraction,
            "overwrite": overwrite,
        }
        options = resolve(CalibrateOptions, "calibrate", flags, config)
        require()
        from anomalib_gen.scoring.calibrating import calibrate_files

        typer.echo(json.dumps(calibrate_files(options, log), indent=2, allow_nan=False))


def explain(
    input: Inputs = None,
    model: Model = None,
    trusted: Trusted = None,
    output: Annotated[
        str | None,
        _option(
            "--output",
            "-o",
            metavar="PATH",
            help="File or folder to make on this machine; endings as for `score`. Required.",
        ),
    ] = None,
    key: Annotated[
        list[str] | None,
        _option("--key", "-k", metavar="NAME", help="Column to carry over to the output; may be repeated."),
    ] = None,
    top: Annotated[
        int | None, _option(min=1, metavar="N", help="Explain the N lowest rows, lowest first. Default: 100.")
    ] = None,
    flagged: Annotated[
        bool | None,
        _option(
            "--flagged/--no-flagged",
            help="Explain all rows below the threshold, in the files' order, and not the lowest N.",
        ),
    ] = None,
    features: Annotated[
        int | None,
        _option(
            min=1, metavar="K", help="Keep the K columns that contribute most to each row. Default: all."
        ),
    ] = None,
    background: Annotated[
        list[str] | None,
        _option(
            metavar="PATH",
            help="Files of normal rows to start from; may be repeated. Default: the mean of the training rows, which "
            "is poor where there are several kinds of normal rows.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option(
            metavar="NAME",
            help="auto (default), integrated-gradients, score, reconstruction or conditional.",
        ),
    ] = None,
    overwrite: Overwrite = None,
    config: Config = None,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.text,
) -> None:
    """Say which columns make rows of files anomalous.

    The output has a line for each row and column: the keys, file and row (from 0), score and label, what is explained
    and from where (anomaly, baseline), and rank, name, value and contribution of the column. Over all columns the
    contributions add up to the anomaly less the baseline.

    **Exit codes**: 0 done; 1 usage, or a model whose rows cannot be explained; 2 files that cannot be read or written,
    or do not fit the model; 5 internal error.

    **Example**: `anomalib-gen explain incoming/ -m model -k id --top 20 --background normal/ -o why.csv`
    """
    log = Log(quiet=quiet, as_json=log_format is LogFormat.json)
    with reported(log):
        from anomalib_gen.scoring.config import ExplainOptions, resolve

        flags = {
            "input": input,
            "model": model,
            "trusted": trusted,
            "output": output,
            "key": key,
            "top": top,
            "flagged": flagged,
            "features": features,
            "background": background,
            "method": method,
            "overwrite": overwrite,
        }
        options = resolve(ExplainOptions, "explain", flags, config)
        require()
        from anomalib_gen.scoring.explaining_files import explain_files

        rows = explain_files(options, log)
        log.info(f"{options.output}: {count(rows, 'row')} explained", rows=rows, output=options.output)


def monitor(
    scores: Annotated[
        str | None,
        typer.Argument(
            metavar="SCORES", help="What `score` wrote: a file, or a folder. Required.", show_default=False
        ),
    ] = None,
    model: Model = None,
    input: Annotated[
        list[str] | None,
        _option(
            "--input",
            metavar="PATH",
            help="Files that were scored, to compare their columns too; others are left out. May be repeated.",
        ),
    ] = None,
    key: Annotated[
        list[str] | None,
        _option(
            "--key",
            "-k",
            metavar="NAME",
            help="Column of the input that is none of the model's, for models that know no names.",
        ),
    ] = None,
    job: Annotated[
        str | None,
        _option(
            metavar="NAME",
            help="Series that this run belongs to. Default: the full path of the model folder.",
        ),
    ] = None,
    run: Annotated[
        str | None,
        _option(
            metavar="NAME",
            help="Name of the run, such as a date. Default: made from the model and the files that were scored.",
        ),
    ] = None,
    history: Annotated[
        str | None, _option(metavar="FILE", help="SQLite file of all runs; tells the usual volume.")
    ] = None,
    keep_days: Annotated[
        float | None,
        _option(min=1, metavar="DAYS", help="Forget runs of this job that are older. Default: 400."),
    ] = None,
    output: Annotated[
        str | None,
        _option("--output", "-o", metavar="FILE", help="JSON file with everything that was found."),
    ] = None,
    as_json: Annotated[
        bool | None, _option("--json/--no-json", help="Print that JSON rather than a table.")
    ] = None,
    prometheus: Annotated[
        str | None,
        _option(metavar="FILE", help="Metrics for the node exporter's textfile collector (.prom)."),
    ] = None,
    webhook: Annotated[
        str | None,
        _option(
            metavar="URL",
            envvar="ANOMALIB_GEN_WEBHOOK",
            help="Address that alerts are posted to, as JSON; better in the variable, where `ps` does not show it.",
        ),
    ] = None,
    webhook_timeout: Annotated[
        float | None, _option(metavar="SECONDS", help="How long one try may take. Default: 10.")
    ] = None,
    webhook_retries: Annotated[
        int | None, _option(min=0, metavar="N", help="Tries after the first. Default: 3.")
    ] = None,
    webhook_backoff: Annotated[
        float | None,
        _option(min=0, metavar="SECONDS", help="Pause, doubled from one try to the next. Default: 1."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        _option(
            metavar="NAME", help="Column that raises no alert, such as one of the calendar; may be repeated."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        _option(
            metavar="NUMBER", help="No alert above this p-value, corrected for all columns. Default: 0.01."
        ),
    ] = None,
    distance: Annotated[
        float | None,
        _option(
            metavar="NUMBER",
            help="Alert from this KS distance on, of categories total variation. Default: 0.2.",
        ),
    ] = None,
    psi: Annotated[
        float | None,
        _option(metavar="NUMBER", help="Alert from this population stability index on. Default: 0.2."),
    ] = None,
    wasserstein: Annotated[
        float | None,
        _option(
            metavar="NUMBER",
            help="Alert from this Wasserstein distance on, in standard deviations. Default: 0.5.",
        ),
    ] = None,
    missing: Annotated[
        float | None,
        _option(
            metavar="NUMBER", help="Alert if the share of missing values changes by so much. Default: 0.05."
        ),
    ] = None,
    unseen: Annotated[
        float | None,
        _option(metavar="NUMBER", help="Alert from this share of new categories on. Default: 0.01."),
    ] = None,
    alert_rate: Annotated[
        float | None,
        _option(
            metavar="NUMBER",
            help="Alert if the share of outliers is so many times that of normal rows. Default: 2.",
        ),
    ] = None,
    volume: Annotated[
        float | None,
        _option(
            metavar="NUMBER",
            help="Alert if rows are so many times the usual number, or one by so many. Default: 2.",
        ),
    ] = None,
    min_runs: Annotated[
        int | None,
        _option(min=1, metavar="N", help="Earlier runs in the history that tell a usual number. Default: 5."),
    ] = None,
    config: Config = None,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.text,
) -> None:
    """Compare a scored batch with normal rows of `fit` or `calibrate`, and raise an alert if it has drifted.

    Compared are the scores, the share of outliers, the number of rows and, with `--input`, every column. A difference
    is an alert if it is both large (one of the thresholds) and sure (`--alpha`). What one run found has one entry in
    the history, however often it is looked at; the webhook is called for alerts until it was reached
    once, and again when there are others. Without a history it is called at every look.

    **Exit codes**: 0 nothing to see; 1 usage; 2 files that cannot be read or written, or a model without a training
    reference; 3 alert; 4 done, but for input files that cannot be read or a webhook that was not reached; 5 internal
    error.

    **Example**: `anomalib-gen monitor scores.parquet -m model --input incoming/ --history monitor.sqlite`
    """
    log = Log(quiet=quiet, as_json=log_format is LogFormat.json)
    with reported(log):
        from anomalib_gen.scoring.config import MonitorOptions, resolve

        flags = {
            "scores": scores,
            "model": model,
            "input": input,
            "key": key,
            "job": job,
            "run": run,
            "history": history,
            "keep_days": keep_days,
            "output": output,
            "json": as_json,
            "prometheus": prometheus,
            "webhook": webhook,
            "webhook_timeout": webhook_timeout,
            "webhook_retries": webhook_retries,
            "webhook_backoff": webhook_backoff,
            "ignore": ignore,
            "alpha": alpha,
            "distance": distance,
            "psi": psi,
            "wasserstein": wasserstein,
            "missing": missing,
            "unseen": unseen,
            "alert_rate": alert_rate,
            "volume": volume,
            "min_runs": min_runs,
        }
        options = resolve(MonitorOptions, "monitor", flags, config)
        require()
        import json

        from anomalib_gen.scoring.monitor import monitor_files, table

        document, code = monitor_files(options, log)
        if options.json:
            typer.echo(json.dumps(document, indent=2, allow_nan=False))
        elif not quiet:
            typer.echo(table(document))
        raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for function in (calibrate, explain, monitor):
        app.command()(function)
