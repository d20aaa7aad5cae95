"""The command ``anomalib-gen``.

Nothing heavy is imported before a command runs. Exit codes: 0 done, 1 usage, 2 data that cannot be found, read or
written, 3 an alert was raised, 4 done in part (some cells of a benchmark failed, bad rows were left out), 5 internal
error, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from enum import IntEnum, StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from anomalib_gen.scoring._log import Log
from anomalib_gen.scoring.commands import register

MOST_SEEDS = 1000
"""Seeds of one range at most: more are a slip of the hand."""

# Newer versions of typer carry their own copy of click, so the class is taken from where typer itself has it.
_UsageError: Any = typer.BadParameter.__mro__[1]


class ExitCode(IntEnum):
    """What the command tells the shell."""

    DONE = 0
    USAGE = 1
    DATA = 2
    ALERT = 3
    PARTIAL = 4
    INTERNAL = 5
    INTERRUPTED = 130


class Suite(StrEnum):
    """Benchmark protocols."""

    clean = "clean"
    clean_unsupervised = "clean-unsupervised"
    published = "published"
    images = "images"
    images_full = "images-full"


class _Group(TyperGroup):
    """Commands with our exit codes."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        # What goes wrong before a command runs, or in a way that it does not know, is said in its format all the same.
        given = sys.argv[1:] if args is None else list(args)
        as_json = "--log-format=json" in given or ("--log-format", "json") in pairwise(given)
        try:
            if as_json:
                raise SystemExit(super().main(args, *more, **{**options, "standalone_mode": False}))
            return super().main(args, *more, **options)
        except _UsageError as error:
            Log(as_json=True).error(error.format_message(), code=int(ExitCode.USAGE))
            raise SystemExit(int(ExitCode.USAGE)) from None
        except SystemExit as error:
            # The parser leaves with 2 on wrong usage; here 2 means data.
            if isinstance(error.__context__, _UsageError):
                raise SystemExit(int(ExitCode.USAGE)) from None
            raise
        except Exception as error:  # whatever it is, a scheduler is to see the code of an internal error
            if as_json:
                Log(as_json=True).error(
                    f"internal error, {type(error).__name__}: {error}. This is a bug; please report it.",
                    code=int(ExitCode.INTERNAL),
                    traceback=traceback.format_exc(),
                )
            else:
                traceback.print_exc()
                Log().error("internal error. This is a bug; please report it with the lines above.")
            raise SystemExit(int(ExitCode.INTERNAL)) from None


app = typer.Typer(
    cls=_Group,
    name="anomalib-gen",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Anomaly detection with generative models.",
    epilog="Exit codes: 0 done, 1 usage, 2 data that cannot be found, read or written, 3 alert, 4 done in part, "
    "5 internal error, 130 stopped with Ctrl-C.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"anomalib-gen {version('anomalib-gen')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("anomalib-gen-demo"),
) -> None:
    """Compare a flow with three well-known detectors on real tables that ship with scikit-learn.

    Takes a minute or two, needs no network and no files. Prints a table and writes one page with the scores
    of every detector.
    """
    _require_extra()
    from anomalib_gen.benchmark.demo import run_demo

    try:
        run_demo(output)
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None


@app.command()
def benchmark(
    suite: Annotated[
        Suite,
        typer.Option(
            metavar="NAME", help="Protocol: clean, clean-unsupervised, published, images or images-full."
        ),
    ] = Suite.clean,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Detector by import path, with literal keyword arguments and a name if you like. "
            "May be repeated.",
        ),
    ] = None,
    library: Annotated[
        bool,
        typer.Option(
            "--library",
            help="Add every family of the library, and every transform, denoiser, objective and anomaly, on images "
            "those of images, too (hours).",
        ),
    ] = False,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Add 11 shallow detectors of scikit-learn and pyod at their defaults; in the suites of images 5, "
            "which see pixels or their principal components.",
        ),
    ] = False,
    deep_peers: Annotated[
        bool, typer.Option("--deep-peers", help="Add 3 deep detectors of pyod at their defaults (slow).")
    ] = False,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Data sets, separated by commas: ADBench names, builtin:breast_cancer, builtin:digits, "
            "builtin:wine, or npz files with X and y (+1 normal, -1 anomaly); image tasks such as mnist:not-1 or "
            "cifar10:only-0 for the suites of images. May be repeated. "
            "Default: every ADBench table on this machine; in the suites of images MNIST with a digit held out and "
            "with one against the rest, and CIFAR-10 with one class against the rest and against other sources.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Seeds, such as 0-4 or 0,1,2.")] = "0-4",
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes; they share the cores evenly.")] = 1,
    time_limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Wall time for one cell; longer ones are recorded as failures."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results. Default: one by suite below anomalib-gen-benchmark.",
            show_default=False,
        ),
    ] = None,
    data_home: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the ADBench files. Default: ANOMALIB_GEN_DATA, then the download cache."
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells again that are stored as failures.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; write the report of the folder anew.")
    ] = False,
) -> None:
    """Compare detectors over data sets and seeds under a fixed protocol.

    Every finished cell (one detector, data set and seed) is stored at once. Stop whenever you like, by Ctrl-C
    or worse: the same command resumes. Failures are recorded with their reason and never counted as numbers.

    **Protocols**

    - *clean*: one-class detection; equal rows are kept once, half of the normal rows train.
    - *clean-unsupervised*: the rows are halved without labels, so anomalies stay in training.
    - *published*: as in DTE (ICLR 2024), with its defects, for comparison with published figures only.
    - *images*: MNIST and CIFAR-10 in their own split; at most 4,000 normal images train and 2,000 test. The files must
      be on this machine.
    - *images-full*: the same with all images; a GPU helps.

    **Examples**

    - `anomalib-gen benchmark --detector anomalib_gen.FlowDetector --peers --datasets cardio,thyroid`
    - `anomalib-gen benchmark --library --peers --deep-peers --time-limit 600`: everything, as in docs/benchmark.md
    - `anomalib-gen benchmark --detector 'maf=anomalib_gen.FlowDetector(transform="maf")' --seeds 0,1`
    - `anomalib-gen benchmark --suite images --detector anomalib_gen.DiffusionDetector --peers --datasets mnist:not-1
      --seeds 0`
    """
    _require_extra()
    folder = output or Path("anomalib-gen-benchmark") / suite.value
    if report_only:
        raise typer.Exit(_report(folder, failed=0))
    sets = {"library": library, "peers": peers, "deep-peers": deep_peers}
    chosen = [*(detector or []), *(name for name, wanted in sets.items() if wanted)]
    if not chosen:
        raise typer.BadParameter("name at least one --detector, or add --library, --peers or --deep-peers")
    names = [name.strip() for text in datasets or [] for name in text.split(",") if name.strip()]
    seed_list = _parse_seeds(seeds)

    from anomalib_gen.benchmark import BenchmarkInterrupted, DataError, run_benchmark

    try:
        results = run_benchmark(
            chosen,
            suite=suite.value,
            datasets=None if datasets is None else names,  # "" names none, and is not to mean all
            seeds=seed_list,
            jobs=jobs,
            time_limit=time_limit,
            output=folder,
            data_home=data_home,
            retry_failed=retry_failed,
        )
    except BenchmarkInterrupted as stopped:
        typer.echo(
            f"Stopped. {stopped.finished} of {stopped.total} cells are stored in {folder}. "
            "Run the same command again to resume.",
            err=True,
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except DataError as error:
        raise typer.Exit(_complain(error, ExitCode.DATA)) from None
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        raise typer.Exit(_complain(error, ExitCode.USAGE)) from None
    failed = int((results["status"] != "ok").sum())
    raise typer.Exit(_report(folder, failed=failed))


def _report(folder: Path, *, failed: int) -> ExitCode:
    from anomalib_gen.benchmark.report import write_report

    try:
        page = write_report(folder)
    except (FileNotFoundError, ValueError) as error:
        return _complain(error, ExitCode.DATA)
    typer.echo(f"\nReport: {page.resolve()}")
    if failed:
        typer.echo(
            f"{failed} cell{'s' if failed > 1 else ''} of this run failed and stay failed; "
            "--retry-failed runs them again.",
            err=True,
        )
        return ExitCode.PARTIAL
    return ExitCode.DONE


def _complain(error: Exception, code: ExitCode) -> ExitCode:
    typer.echo(f"anomalib-gen: {error}", err=True)
    return code


def _parse_seeds(text: str) -> list[int]:
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if dash and int(last) - int(first) >= MOST_SEEDS:
                raise typer.BadParameter(f"--seeds {text!r} has a range of more than {MOST_SEEDS:,}")
            seeds += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        seeds = []
    if not seeds:
        raise typer.BadParameter(f"--seeds {text!r} is no list of seeds; write 0-4 or 0,1,2")
    return seeds


def _require_extra() -> None:
    from anomalib_gen.benchmark._extra import require_benchmark_extra

    try:
        require_benchmark_extra()
    except ImportError as error:
        raise typer.Exit(_complain(error, ExitCode.USAGE)) from None


register(app)


if __name__ == "__main__":
    app()
