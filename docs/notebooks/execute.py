"""Run the notebooks of this folder and store what their cells give: ``python docs/notebooks/execute.py``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook after all cells ran in a new kernel and an empty folder, without what went to stderr.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _told(cell.outputs)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


def _told(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs without stderr; what was printed in a row is one, however the kernel divided it."""
    told: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stdout" and told and told[-1].get("name") == "stdout":
            told[-1].text += output.text
        elif output.get("name") != "stderr":
            told.append(output)
    return told


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        nbformat.write(executed(notebook), notebook)
