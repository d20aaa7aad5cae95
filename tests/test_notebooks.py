"""The notebooks run from top to bottom on small settings, and are stored without outputs."""

import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks extra is not installed")
for name in ("ipykernel", "matplotlib", "nbclient", "pyarrow", "skops"):
    pytest.importorskip(name, reason="the notebooks extra is not installed")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def runner():
    specification = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_there_are_five():
    assert [path.stem[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]


@each
def test_is_valid_and_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            mend = f"jupyter nbconvert --clear-output --inplace {path.name}"
            assert not cell.outputs, mend
            assert cell.execution_count is None, mend


@each
def test_runs_on_small_settings(path, runner):
    notebook = runner.execute(path, fast=True, timeout=600)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    # Whoever reads a notebook should meet figures, and no warnings.
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


def test_a_failing_cell_is_reported(runner, tmp_path):
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        runner.execute(tmp_path / "bad.ipynb", fast=True)
