"""The commands of scheduled scoring. Nothing heavy is imported before one runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from anomalib_gen.scoring._errors import DATA, DONE, INTERRUPTED, ScoringError
from anomalib_gen.scoring._log import Log, count, python_warnings_in


class LogFormat(StrEnum):
    """How messages look."""

    text = "text"
    json = "json"


Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="Files, folders or globs of Parquet, Feather, Arrow, CSV or TSV files (text in UTF-8, also as .gz, .bz2, "
        ".zst, .lz4, .br); scheme://... through fsspec. Required.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="TOML file with a table for each command, such as [score]: options that are not given here.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors, and no progress.")]
Logs = Annotated[LogFormat, typer.Option("--log-format", help="Messages for people, or JSON, one a line.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FOLDER",
        help="Local folder of a model. Required.",
        show_default=False,
    ),
]
Trusted = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted",
        metavar="PATH",
        help="Import path of a class or function of your own (package.module:name) that the model may be made of, as "
        "named when it was saved; its module is imported, which runs its code. May be repeated.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool | None,
    typer.Option(
        "--overwrite/--no-overwrite",
        show_default=False,
        help="Replace an output that exists, by the new one as soon as that is complete.",
    ),
]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Local folder of a model.", show_default=False)]

models = typer.Typer(
    no_args_is_help=True,
    help="Look at saved models.",
    epilog="Exit codes: 0 done, 1 usage, 2 the folder is missing, damaged or not the expected one.",
)


@contextlib.contextmanager
def reported(log: Log, *, resumable: bool = False) -> Iterator[None]:
    """Turn errors that are a user's to mend into one message and an exit code, and warnings into messages."""
    try:
        with python_warnings_in(log):
            yield
    except ScoringError as error:
        log.error(str(error), code=error.code)
        raise typer.Exit(error.code) from None
    except KeyboardInterrupt:
        log.error("stopped" + ("; --resume goes on from here" if resumable else ""), code=INTERRUPTED)
        raise typer.Exit(INTERRUPTED) from None


def fit(
    input: Inputs = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="FOLDER",
            help="Local folder of the model to make. Required.",
            show_default=False,
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Detector by import path, with literal keyword arguments. Default: anomalib_gen.FlowDetector().",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME", help="Column to use; may be repeated. Default: all."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Column to leave out, such as keys and labels; may be repeated."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Seed of the detector. Default: 0.", show_default=False),
    ] = None,
    overwrite: Overwrite = None,
    config: Config = None,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.text,
) -> None:
    """Fit a detector to files of mostly normal rows and save it as a model folder.

    Text columns are one-hot encoded, and missing numbers filled with the median. Types and ranges of the columns become
    part of the model. The rows have to fit into memory. Prints the model's hash.

    **Exit codes**: 0 done; 1 usage; 2 files that cannot be read or written, or that the detector cannot be fitted to; 5
    internal error.

    **Example**: `anomalib-gen fit history/ --exclude id --model model`
    """
    log = Log(quiet=quiet, as_json=log_format is LogFormat.json)
    with reported(log):
        from anomalib_gen.scoring.config import FitOptions, resolve

        flags = {"input": input, "model": model, "detector": detector, "columns": columns, "exclude": exclude}
        options = resolve(FitOptions, "fit", {**flags, "seed": seed, "overwrite": overwrite}, config)
        require("skops")
        from anomalib_gen.scoring.fitting import fit_files

        typer.echo(fit_files(options, log))


def score(
    input: Inputs = None,
    model: Model = None,
    trusted: Trusted = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File to make (.parquet, .feather, .arrow, .csv, .tsv, text also .gz and the like), or, without an "
            "ending, a folder of Parquet files; scheme://... for an object store, through fsspec. Required.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", "-k", metavar="NAME", help="Column to carry over to the output; may be repeated."
        ),
    ] = None,
    partition_by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Make the output of folders NAME=value/ by this column, a key or one that folders of the input are "
            "named after; may be repeated, for folders in folders.",
            show_default=False,
        ),
    ] = None,
    max_bad_rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Leave out up to so many rows that cannot be scored, listed in the quarantine file; in text also "
            "lines with a quote too many or that are no UTF-8. Default: 0.",
            show_default=False,
        ),
    ] = None,
    max_bad_files: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Leave out up to so many files that cannot be read or do not fit. Default: 0.",
            show_default=False,
        ),
    ] = None,
    quarantine: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Where bad rows go. Default: OUTPUT.quarantine.jsonl.", show_default=False
        ),
    ] = None,
    alert_above: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Leave with code 3 if more than this share of the rows are outliers.",
            show_default=False,
        ),
    ] = None,
    p_values: Annotated[
        bool | None,
        typer.Option(
            "--p-values/--no-p-values",
            show_default=False,
            help="Demand the column p_value, which models of `calibrate --method conformal` always add.",
        ),
    ] = None,
    explain: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="K",
            help="Add the K columns that contribute most to each outlier, with values and contributions, as `explain` "
            "finds them without --background. Default: 0.",
            show_default=False,
        ),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where a run for an object store keeps what is not uploaded yet. Default: .anomalib-gen.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            show_default=False,
            help="Go on where a run over the same files and with the same model was killed; do nothing if it is done.",
        ),
    ] = None,
    overwrite: Overwrite = None,
    config: Config = None,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.text,
) -> None:
    """Score files with a saved model.

    Rows keep their order. The output has the key columns, and for each row its score (lower is more abnormal), label
    (-1 below the threshold, else +1), the threshold and the first 16 digits of the model's hash; of models that make
    p-values also the p-value, and with `--explain` the columns that made outliers look odd. It appears when it is
    complete; OUTPUT.run.json says what it was made from. Memory does not grow with the files. Columns of
    `--partition-by` are in the names of its folders alone, as hive partitions.

    For a nightly job use `--resume --overwrite`: what was killed goes on, what is done is left alone, and other input
    is scored anew. An output of another size than its run wrote is not taken for done.

    **Exit codes**: 0 done; 1 usage, or another run writes to the output; 2 files that cannot be read or written, or do
    not fit the model; 3 more outliers than `--alert-above`; 4 done, but for bad rows or files; 5 internal error.

    **Example**: `anomalib-gen score incoming/ -m model -k id -o scores.parquet`
    """
    log = Log(quiet=quiet, as_json=log_format is LogFormat.json)
    with reported(log, resumable=True):
        from anomalib_gen.scoring.config import ScoreOptions, resolve

        flags: dict[str, Any] = {
            "input": input,
            "model": model,
            "trusted": trusted,
            "output": output,
            "key": key,
            "partition_by": partition_by,
            "max_bad_rows": max_bad_rows,
            "max_bad_files": max_bad_files,
            "quarantine": quarantine,
            "alert_above": alert_above,
            "p_values": p_values,
            "explain": explain,
            "work": work,
            "resume": resume,
            "overwrite": overwrite,
        }
        options = resolve(ScoreOptions, "score", flags, config)
        require()
        from anomalib_gen.scoring.run import score_files

        summary = score_files(options, log)
        log.info(
            f"{options.output}: {count(summary.rows, 'row')} scored, {count(summary.outliers, 'outlier')}; left out: "
            f"{count(summary.bad_rows, 'bad row')}, {count(summary.bad_files, 'bad file')}",
            rows=summary.rows,
            outliers=summary.outliers,
            bad_rows=summary.bad_rows,
            bad_files=summary.bad_files,
            parts=summary.parts,
            parts_resumed=summary.resumed,
            output=options.output,
        )
        raise typer.Exit(summary.code)


def evaluate(
    input: Inputs = None,
    model: Model = None,
    trusted: Trusted = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column with the labels. Required.", show_default=False)
    ] = None,
    anomaly: Annotated[
        str | None,
        typer.Option(
            metavar="VALUE",
            help="Value of that column that marks anomalies. Default: -1.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="JSON file to make.", show_default=False),
    ] = None,
    overwrite: Overwrite = None,
    config: Config = None,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.text,
) -> None:
    """Compare the scores of a saved model with labels, and print the figures as JSON.

    **Exit codes**: 0 done; 1 usage; 2 files that cannot be read or written, do not fit the model or have bad rows or no
    labels; 5 internal error.

    **Example**: `anomalib-gen evaluate labelled.parquet -m model --label fraud --anomaly 1`
    """
    log = Log(quiet=quiet, as_json=log_format is LogFormat.json)
    with reported(log):
        from anomalib_gen.scoring.config import EvaluateOptions, resolve

        flags = {
            "input": input,
            "model": model,
            "trusted": trusted,
            "label": label,
            "anomaly": anomaly,
            "output": output,
        }
        options = resolve(EvaluateOptions, "evaluate", {**flags, "overwrite": overwrite}, config)
        require()
        from anomalib_gen.scoring.evaluation import evaluate_files

        typer.echo(json.dumps(evaluate_files(options, log), indent=2))


def report(
    scores: Annotated[
        str | None,
        typer.Argument(
            metavar="SCORES",
            help="Output of `score`, with its .run.json beside it. Required.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    trusted: Trusted = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Page to make. Default: SCORES.html.", show_default=False
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Anomalies to list and explain. Default: 100.",
            show_default=False,
        ),
    ] = None,
    history: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="SQLite file of `monitor`, for the usual volume and the trend of the last runs; it is only read.",
            show_default=False,
        ),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Series in the history, as for `monitor`.", show_default=False),
    ] = None,
    overwrite: Overwrite = None,
    config: Config = None,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.text,
) -> None:
    """Write one HTML page about a scoring run.

    It shows the scores beside those of training, the most abnormal rows with the columns that make them so, drift,
    data quality and the model card, holds all that it needs, and can be read on a phone and printed. The files that
    were scored are read again; run it in the same folder as `score`. What is an alert, and where the history is,
    `[monitor]` in the configuration says, as it does for `monitor`.

    **Exit codes**: 0 done; 1 usage; 2 scores or model that cannot be read, or do not belong together; 4 done, but parts
    are left out and the page says why, for one because the files have changed; 5 internal error.

    **Example**: `anomalib-gen report scores.parquet -m model -o report.html`
    """
    log = Log(quiet=quiet, as_json=log_format is LogFormat.json)
    with reported(log):
        from anomalib_gen.scoring.config import MonitorOptions, ReportOptions, resolve

        flags: dict[str, Any] = {
            "scores": scores,
            "model": model,
            "trusted": trusted,
            "output": output,
            "top": top,
            "overwrite": overwrite,
        }
        options = resolve(ReportOptions, "report", flags, config)
        given = {"scores": options.scores, "model": options.model, "history": history, "job": job}
        judged = resolve(MonitorOptions, "monitor", given, config)
        require("jinja2", "markdown_it", "matplotlib")
        from anomalib_gen.scoring.reporting import report_run

        raise typer.Exit(report_run(options, log, judged))


def require(*more: str) -> None:
    """Ask for the optional dependencies, and for more modules."""
    from anomalib_gen.scoring._extra import require_scoring_extra

    require_scoring_extra(*more)


@contextlib.contextmanager
def _folder_errors() -> Iterator[None]:
    from anomalib_gen.persistence import ModelFolderError
    from anomalib_gen.scoring.rows import for_command_line

    try:
        with python_warnings_in(Log()):
            yield
    except (ModelFolderError, OSError) as error:
        Log().error(for_command_line(error))
        raise typer.Exit(DATA) from None


@models.command()
def inspect(folder: Folder) -> None:
    """Print what a model folder says of itself, as JSON; the model is not loaded."""
    from anomalib_gen import persistence

    with _folder_errors():
        typer.echo(json.dumps(persistence.inspect(folder), indent=2))


@models.command()
def verify(
    folder: Folder,
    trusted: Trusted = None,
    expected: Annotated[
        str | None, typer.Option("--hash", metavar="HASH", help="Content hash that the model must have.")
    ] = None,
) -> None:
    """Check every file of a model folder, load the model, and print its content hash."""
    from anomalib_gen import persistence

    with _folder_errors():
        found = persistence.verify(folder, trusted=trusted or ())
    typer.echo(found)
    if expected is not None and found != expected:
        Log().error(f"{folder} is sound, but is another model than {expected}")
        raise typer.Exit(DATA)
    raise typer.Exit(DONE)


@models.command()
def card(folder: Folder) -> None:
    """Print a model card in Markdown, made anew from the folder's document."""
    from anomalib_gen import persistence

    with _folder_errors():
        typer.echo(persistence.model_card(persistence.inspect(folder)))


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    from anomalib_gen.scoring import operations

    for function in (fit, score, evaluate, report):
        app.command()(function)
    operations.register(app)
    app.add_typer(models, name="models")
