"""The notebooks: committed without outputs, and each runs whole, with the assertions that its reader sees."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="extra [dev] is not installed")
NotebookClient = pytest.importorskip("nbclient", reason="extra [dev] is not installed").NotebookClient

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """One cache for all notebooks, so that models are trained once, and no settings of the user's Jupyter."""
    base = tmp_path_factory.getbasetemp()
    for name in ("RVLM_CACHE", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(base / name.lower()))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of the Python that runs the tests


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_clean(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA, "save it without the settings of your editor"
    for number, cell in enumerate(notebook.cells):
        assert cell.id == f"{number:02d}" and cell.metadata == {}, f"cell {number} carries metadata, or another id"
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"cell {number} carries outputs: clear them"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_claim_nothing_unchecked(name):
    """A notebook for new users goes through the public face alone, and asserts what it says."""
    cells = [cell for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells if cell.cell_type == "code"]
    source = "\n".join(cell.source for cell in cells)
    assert source.count("assert ") >= 5
    assert not re.search(r"(\.|import )_[a-z]", source), "no private names"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
