"""Execute docs/notebook.ipynb, and keep it with its outputs in another file: the notebook itself is kept without any.

    python docs/run_notebook.py build/notebook.ipynb made=build samples=16

Each NAME=VALUE replaces a value of the notebook's first cell of code: `made`, the folder with the cache and the runs,
or JSON, such as a number. Needs the extra `docs`.
"""

import json
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "notebook.ipynb"


def executed(made: Path, timeout: int = 600, **values) -> nbformat.NotebookNode:
    """Execute the notebook in this folder with other values for its parameters; return it with its outputs.

    made: the folder with the cache and the runs. timeout: seconds for each cell. Raises KeyError for a parameter that
    is not there, CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    at = next(at for at, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    lines = {name: f"{name} = {value!r}" for name, value in values.items()}
    lines["made"] = f"made = Path({str(made.resolve())!r})"
    for name in lines:
        if not any(line.startswith(f"{name} = ") for line in notebook.cells[at].source.splitlines()):
            raise KeyError(name)
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(lines.values())))
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    del notebook.cells[at + 1]
    return notebook


def main(out: str, *words: str) -> None:
    pairs = dict(word.split("=", 1) for word in words)
    made = Path(pairs.pop("made", "build"))
    nbformat.write(executed(made, **{name: json.loads(value) for name, value in pairs.items()}), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
