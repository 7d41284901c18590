"""Make the notebooks of the tutorials from their scripts: executed, with pictures, and without what changes from run to run.

    python tools/notebooks.py                     # all of them, about three minutes on one core
    python tools/notebooks.py 4_plain_pytorch     # one
    python tools/notebooks.py --check             # do the committed notebooks have the cells of the scripts?

The scripts in ``docs/tutorials`` are the source. A notebook stands beside its script. The extras ``[docs]`` and ``[demo]``
bring what this needs. The extra ``[docs]`` alone is enough for ``--check``.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tutorials"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
TIMEOUT = 600  # seconds that one cell may take


def read_script(name: str) -> Any:
    """Return the cells of a script as a notebook, with numbers for ids, which jupytext would draw at random."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    notebook.metadata = nbformat.from_dict(KERNEL)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(notebook: Any) -> str:
    """Execute all cells in a new kernel, in a copy of the clone's folders, so that no file is left behind.

    Args:
        notebook: It gets the outputs.

    Returns:
        What the cells wrote to stderr: log messages and warnings. The outputs do not have it.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "docs", "tutorials")
        folder.mkdir(parents=True)
        shutil.copytree(ROOT / "examples", Path(scratch, "examples"))
        resources = {"metadata": {"path": str(folder)}}
        client = NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources, coalesce_streams=True
        )
        client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return _normalise(notebook)


def _normalise(notebook: Any) -> str:
    """Take away times, the kernel's version, stderr, and the names of figures. Return stderr."""
    said = []
    notebook.metadata = nbformat.from_dict(KERNEL)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        said += [output.text for output in cell.outputs if output.get("name") == "stderr"]
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data = nbformat.from_dict({"image/png": output.data["image/png"].replace("\n", "")})
                output.metadata = nbformat.from_dict({})
    return "".join(said)


def differs(name: str) -> bool:
    """Say whether the committed notebook lacks a cell of its script, or has another one."""
    path = FOLDER / f"{name}.ipynb"
    if not path.exists():
        return True
    pairs = [(cell.cell_type, cell.source, cell.metadata) for cell in nbformat.read(path, as_version=4).cells]
    return pairs != [(cell.cell_type, cell.source, cell.metadata) for cell in read_script(name).cells]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the notebooks, or check them. Return 1 if one differs from its script, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(NAMES)} (all)")
    parser.add_argument("--check", action="store_true", help="write nothing, and name the notebooks that differ")
    options = parser.parse_args(arguments)
    names = options.names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"Expected names among {', '.join(NAMES)}, got {', '.join(unknown)}.")
    if options.check:
        different = [name for name in names if differs(name)]
        for name in different:
            print(f"docs/tutorials/{name}.ipynb differs: run `python tools/notebooks.py {name}`", file=sys.stderr)
        return bool(different)
    for name in names:
        notebook = read_script(name)
        print(execute(notebook), file=sys.stderr)
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
