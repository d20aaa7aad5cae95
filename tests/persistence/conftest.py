"""What the tests of model folders share."""

import json

import pytest
from saved_attributes import new_attributes

from anomalib_gen.persistence import _document


@pytest.fixture
def no_attribute_is_new(tmp_path):
    """Check every folder that a test saved."""
    yield
    for path in sorted(tmp_path.rglob("model.json")):
        document = json.loads(path.read_text())
        new = new_attributes(document)
        assert not new, (
            f"Saved classes have attributes that folders of version {_document.VERSION} do not: {new}. A folder that "
            "was written before does not tell them. Give the class a default of that name, or raise VERSION in "
            "persistence/_document.py, write an upgrade, keep a folder of the new format in tests/persistence/folders, "
            "and list the attributes in a new file in tests/persistence/attributes; the old files stay as they are."
        )
