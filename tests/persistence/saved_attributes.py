"""Attributes of saved classes, against those that folders of the present format had when it was new."""

import json
from pathlib import Path

from sklearn.base import BaseEstimator

from anomalib_gen.persistence import _document
from anomalib_gen.persistence._allowed import find
from anomalib_gen.persistence._requests import ATTRIBUTE
from anomalib_gen.persistence._tree import _new_parameters

ATTRIBUTES = Path(__file__).parent / "attributes"


def attributes_of(document):
    """Attributes of each class of this package in a document, but for those that have a default without it."""
    found = {}
    for node in _document._objects(document["model"]):
        if not node["class"].startswith("anomalib_gen."):
            continue
        cls = find(node["class"], frozenset())
        names = set(node["state"])
        names |= {name for kind in ("parameters", "buffers", "modules") for name, _ in node.get(kind, ())}
        if issubclass(cls, BaseEstimator):
            # Requests are scikit-learn's, and none are as good as those of the class.
            names -= {*_new_parameters(cls), ATTRIBUTE}
        names = {name for name in names if not name.isdigit() and not hasattr(cls, name)}
        found.setdefault(node["class"], set()).update(names)
    return found


def new_attributes(document):
    """Those that folders of this format did not have when it was new."""
    path = ATTRIBUTES / f"format-{_document.VERSION}.json"
    if not path.is_file():
        return {path.name: ["is missing: list there what classes have in the new format"]}
    known = json.loads(path.read_text())
    return {
        name: sorted(attributes - set(known.get(name, ())))
        for name, attributes in attributes_of(document).items()
        if attributes - set(known.get(name, ()))
    }
