"""The notebook runs from the first cell to the last, and was committed with its outputs.

To renew the outputs: `jupyter nbconvert --to notebook --execute --inplace notebooks/tour.ipynb`.
"""

import os
import re

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # executes a notebook

TOUR = ROOT / "notebooks" / "tour.ipynb"


def shown(notebook) -> list[tuple[str, int]]:
    """Returns the text of each cell, without digits, which depend on the machine, and its number of figures.

    Progress bars are left out. A kernel may send the text in several pieces.
    """
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(each.text for each in own if each.get("name") == "stdout") for own in outputs]
    return [
        (re.sub(r"\d+", "0", text), sum("data" in each for each in own))
        for text, own in zip(texts, outputs, strict=True)
    ]


@pytest.fixture
def nbformat():
    return pytest.importorskip("nbformat", reason="nbformat is not installed")


def test_the_tour_runs_on_toy_with_the_committed_outputs(nbformat, toy_data, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "revisitop").symlink_to(toy_data)
    (tmp_path / "notebooks").mkdir()
    committed, fresh = (nbformat.read(TOUR, as_version=4) for _ in range(2))
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3", resources=place).execute()
    assert shown(fresh) == shown(committed)
    assert sum(figures for _, figures in shown(fresh)) == 7


def test_the_committed_notebook_is_small_and_from_one_run(nbformat):
    assert TOUR.stat().st_size < 300_000
    cells = [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
