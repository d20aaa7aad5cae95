"""Options from flags and one TOML file, checked with messages that name the key.

The file has a table for each command, and keys that are called like the flags, with or without dashes:

    [score]
    model = "model"
    input = ["incoming/*.parquet"]
    output = "scores.parquet"
    key = ["id"]
    max-bad-rows = 100

A flag wins over the file; what the file switches on, ``--no-...`` switches off. Paths in a file are relative to the
folder that the command runs in, like those of flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from anomalib_gen.scoring._errors import UsageError

MISSING = dataclasses.MISSING
METHODS = ("false-positive-rate", "tail", "contamination", "conformal", "keep")
"""How ``calibrate`` may set a threshold."""


def option(
    kind: str,
    default: Any = MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    among: tuple[str, ...] | None = None,
) -> Any:
    """Declare an option of a command.

    Parameters
    ----------
    kind : {"text", "texts", "integer", "number", "flag"}
    default : object, optional
        Without one the option must be given.
    least, most : float, optional
        Range of a number.
    among : tuple of str, optional
        Texts that are known.
    """
    extra = {"kind": kind, "least": least, "most": most, "among": among}
    return dataclasses.field(default=default, metadata=extra)


Options = TypeVar("Options")
COMMANDS: dict[str, type[Any]] = {}


def command(name: str) -> Any:
    """Register a dataclass as the options of a command."""

    def register(cls: type[Options]) -> type[Options]:
        made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        COMMANDS[name] = made
        return made

    return register


@command("fit")
class FitOptions:
    """Options of ``fit``."""

    input: tuple[str, ...] = option("texts")
    model: str = option("text")
    detector: str = option("text", "anomalib_gen.FlowDetector()")
    columns: tuple[str, ...] = option("texts", ())
    exclude: tuple[str, ...] = option("texts", ())
    seed: int = option("integer", 0, least=0, most=2**32 - 1)
    overwrite: bool = option("flag", False)


@command("score")
class ScoreOptions:
    """Options of ``score``."""

    input: tuple[str, ...] = option("texts")
    model: str = option("text")
    trusted: tuple[str, ...] = option("texts", ())
    output: str = option("text")
    key: tuple[str, ...] = option("texts", ())
    partition_by: tuple[str, ...] = option("texts", ())
    quarantine: str | None = option("text", None)
    max_bad_rows: int = option("integer", 0, least=0)
    max_bad_files: int = option("integer", 0, least=0)
    alert_above: float | None = option("number", None, least=0, most=1)
    p_values: bool = option("flag", False)
    explain: int = option("integer", 0, least=0, most=100)
    work: str | None = option("text", None)
    resume: bool = option("flag", False)
    overwrite: bool = option("flag", False)


@command("evaluate")
class EvaluateOptions:
    """Options of ``evaluate``."""

    input: tuple[str, ...] = option("texts")
    model: str = option("text")
    trusted: tuple[str, ...] = option("texts", ())
    label: str = option("text")
    anomaly: str = option("text", "-1")
    output: str | None = option("text", None)
    overwrite: bool = option("flag", False)


@command("report")
class ReportOptions:
    """Options of ``report``."""

    scores: str = option("text")
    model: str = option("text")
    trusted: tuple[str, ...] = option("texts", ())
    output: str | None = option("text", None)
    top: int = option("integer", 100, least=1, most=1000)
    overwrite: bool = option("flag", False)


@command("calibrate")
class CalibrateOptions:
    """Options of ``calibrate``."""

    input: tuple[str, ...] = option("texts")
    model: str = option("text")
    trusted: tuple[str, ...] = option("texts", ())
    output: str | None = option("text", None)
    method: str = option("text", "false-positive-rate", among=METHODS)
    rate: float = option("number", 0.05, least=1e-12, most=0.5)
    confidence: float | None = option("number", None, least=0.01, most=0.9999)
    tail_fraction: float = option("number", 0.1, least=0.001, most=0.5)
    overwrite: bool = option("flag", False)


@command("explain")
class ExplainOptions:
    """Options of ``explain``."""

    input: tuple[str, ...] = option("texts")
    model: str = option("text")
    trusted: tuple[str, ...] = option("texts", ())
    output: str = option("text")
    key: tuple[str, ...] = option("texts", ())
    top: int = option("integer", 100, least=1, most=1_000_000)
    flagged: bool = option("flag", False)
    features: int | None = option("integer", None, least=1)
    background: tuple[str, ...] = option("texts", ())
    method: str = option(
        "text", "auto", among=("auto", "integrated-gradients", "score", "reconstruction", "conditional")
    )
    overwrite: bool = option("flag", False)


@command("monitor")
class MonitorOptions:
    """Options of ``monitor``."""

    scores: str = option("text")
    model: str = option("text")
    input: tuple[str, ...] = option("texts", ())
    key: tuple[str, ...] = option("texts", ())
    job: str | None = option("text", None)
    run: str | None = option("text", None)
    history: str | None = option("text", None)
    keep_days: float = option("number", 400, least=1)
    output: str | None = option("text", None)
    json: bool = option("flag", False)
    prometheus: str | None = option("text", None)
    webhook: str | None = option("text", None)
    webhook_timeout: float = option("number", 10, least=0.01, most=600)
    webhook_retries: int = option("integer", 3, least=0, most=10)
    webhook_backoff: float = option("number", 1, least=0, most=60)
    ignore: tuple[str, ...] = option("texts", ())
    alpha: float = option("number", 0.01, least=1e-9, most=1)
    distance: float = option("number", 0.2, least=0, most=1)
    psi: float = option("number", 0.2, least=0)
    wasserstein: float = option("number", 0.5, least=0)
    missing: float = option("number", 0.05, least=0, most=1)
    unseen: float = option("number", 0.01, least=0, most=1)
    alert_rate: float = option("number", 2, least=1)
    volume: float = option("number", 2, least=1)
    min_runs: int = option("integer", 5, least=1)


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file and check its tables and keys.

    Raises
    ------
    UsageError
        If it cannot be read, or names a table or a key that is unknown.
    """
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The configuration {path} is no TOML: {error}.") from None
    for table, values in content.items():
        if table not in COMMANDS:
            raise UsageError(f"{path}: {table!r} is unknown.{_guess(table, COMMANDS)}")
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {table!r} must be a table, [{table}].")
        known = [field.name.replace("_", "-") for field in dataclasses.fields(COMMANDS[table])]
        for key in values:
            if key.replace("_", "-") not in known:
                raise UsageError(f"{path}: {table}.{key} is unknown.{_guess(key.replace('_', '-'), known)}")
            if "_" in key and key.replace("_", "-") in values:
                raise UsageError(
                    f"{path}: {table}.{key} and {table}.{key.replace('_', '-')} are one option. Keep one."
                )
    return content


def _guess(name: str, known: Any, otherwise: str = " Known: {}.") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else otherwise.format(", ".join(sorted(known)))


def resolve(cls: type[Options], name: str, flags: Mapping[str, Any], config: Path | None) -> Options:
    """Options of a command from its flags, and from a file for those that were not given.

    Parameters
    ----------
    cls : dataclass of options
    name : str
        The command, a table of the file.
    flags : mapping of str to object
        Values of flags; None and an empty list stand for one that was not given.
    config : Path, optional

    Raises
    ------
    UsageError
        If a value is of the wrong kind or out of range, or a needed one is missing; the message names the key.
    """
    table: dict[str, Any] = {}
    if config is not None:
        table = {key.replace("-", "_"): value for key, value in read_config(config).get(name, {}).items()}
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        flag = flags.get(field.name)
        if flag is not None and flag != []:
            values[field.name] = _check(flag, field, f"--{field.name.replace('_', '-')}")
        elif field.name in table and (table[field.name] != [] or field.default is not MISSING):
            values[field.name] = _check(
                table[field.name], field, f"{config}: {name}.{field.name.replace('_', '-')}"
            )
        elif field.default is MISSING:
            shown = {"input": "an INPUT", "scores": "SCORES"}.get(
                field.name, f"--{field.name.replace('_', '-')}"
            )
            raise UsageError(f"{name} needs {shown}, as an argument or as {field.name!r} in a configuration.")
    return cls(**values)


def _check(value: Any, field: dataclasses.Field[Any], key: str) -> Any:
    kind, least, most = (field.metadata[part] for part in ("kind", "least", "most"))
    if kind == "texts" and isinstance(value, str):
        value = [value]
    good = {
        "text": isinstance(value, str) and value != "",
        "texts": isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "flag": isinstance(value, bool),
    }[kind]
    words = {
        "text": "text",
        "texts": "a list of texts",
        "integer": "a whole number",
        "number": "a number",
        "flag": "true or false",
    }
    if not good:
        raise UsageError(f"{key} must be {words[kind]}, got {value!r}.")
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        span = f"at least {least:g}" if most is None else f"from {least:g} to {most:g}"
        raise UsageError(f"{key} must be {span}, got {value!r}.")
    among = field.metadata["among"]
    if among is not None and value not in among:
        raise UsageError(f"{key} must be one of {', '.join(among)}, got {value!r}.{_guess(value, among, '')}")
    return tuple(value) if kind == "texts" else value
