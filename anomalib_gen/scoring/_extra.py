"""The optional dependencies of scoring, asked for with one clear message."""

from __future__ import annotations

from importlib.util import find_spec

from anomalib_gen.scoring._errors import UsageError

_MODULES = ("filelock", "prometheus_client", "pyarrow")


def require_scoring_extra(*more: str) -> None:
    """Refuse, with the command that helps, if a dependency of scoring, or one of `more` modules, is missing."""
    missing = [name for name in (*_MODULES, *more) if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"This needs packages that are not installed: {', '.join(missing)}. "
            "Install them with: pip install 'anomalib-gen[scoring]'"
        )
