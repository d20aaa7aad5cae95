"""What can be wrong with a model folder."""

from __future__ import annotations


class ModelFolderError(ValueError):
    """A model cannot be written to, or read from, a folder; the message says why and what to do."""
