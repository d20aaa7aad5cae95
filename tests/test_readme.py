"""The README's Python blocks run as they stand, in order and each in a namespace of its own."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_block_runs(block):
    exec(compile(BLOCKS[block], f"README.md, block {block}", "exec"), {"__name__": "readme"})


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
