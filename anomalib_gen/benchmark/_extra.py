"""The optional dependencies of a benchmark, asked for with one clear message."""

from __future__ import annotations

from importlib.util import find_spec

_MODULES = ("filelock", "jinja2", "matplotlib", "pebble", "pyarrow", "scikit_posthocs")


def require_benchmark_extra() -> None:
    """Raise ImportError with the command that helps if a dependency of the benchmark is missing."""
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"This needs packages that are not installed: {', '.join(missing)}. "
            "Install them with: pip install 'anomalib-gen[benchmark]'"
        )
