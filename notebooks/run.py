"""Execute the notebooks beside this file from top to bottom, and write them with their figures as HTML.

    python notebooks/run.py FOLDER [NAME ...]

FOLDER receives NAME.html and NAME.ipynb for each notebook, or for those named. Full settings take minutes on two cores;
with the environment variable ANOMALIB_GEN_NOTEBOOK_FAST set the notebooks make everything small, as the tests do.
Kernels run in the interpreter that runs this file, and read no settings from elsewhere.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
FAST = "ANOMALIB_GEN_NOTEBOOK_FAST"


class ThisInterpreter(KernelSpecManager):
    """One kernel: the interpreter that is running, wherever else kernels of that name are registered."""

    def get_kernel_spec(self, kernel_name):
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )


def execute(path, *, fast=False, timeout=1800):
    """Run a notebook in a fresh kernel and an empty working folder; return it with its outputs.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        With the cell and the traceback, if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment.pop(FAST, None)
    if fast:
        environment[FAST] = "1"
    with tempfile.TemporaryDirectory() as folder:
        private = Path(folder) / "jupyter"
        work = Path(folder) / "work"
        private.mkdir()
        work.mkdir()
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            environment[name] = str(private)

        class Manager(AsyncKernelManager):
            def __init__(self, **options):
                super().__init__(
                    **options,
                    kernel_spec_manager=ThisInterpreter(),
                    connection_file=str(private / "kernel.json"),
                    # No port that somebody else may take or listen to, where there is another way.
                    transport="ipc" if os.name == "posix" else "tcp",
                )

        client = NotebookClient(
            notebook,
            kernel_manager_class=Manager,
            timeout=timeout,
            resources={"metadata": {"path": str(work)}},
        )
        return client.execute(env=environment)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="as 01 or 01_first_look; all if none is given")
    options = parser.parse_args()
    from nbconvert import HTMLExporter

    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = [p for p in NOTEBOOKS if not options.names or any(p.stem.startswith(n) for n in options.names)]
    if not chosen:
        parser.error(f"no notebook is named {options.names}; there are {[p.stem for p in NOTEBOOKS]}")
    for path in chosen:
        start = time.monotonic()
        notebook = execute(path, fast=FAST in os.environ)
        nbformat.write(notebook, options.folder / path.name)
        html, _ = HTMLExporter().from_notebook_node(notebook)
        (options.folder / f"{path.stem}.html").write_text(html, encoding="utf-8")
        print(f"{path.stem}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
