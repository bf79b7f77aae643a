import json
import re
import shutil

import numpy as np
import pytest
from conftest import latest
from drawn_descriptors import draw_descriptors


@pytest.fixture
def evaluate(command, tmp_path):
    """Evaluates saved descriptors of a dataset and returns the folder of the run."""
    where = (tmp_path / "data", tmp_path / "features")
    draw_descriptors(*where, "new", 0)
    draw_descriptors(*where, "other", 1)

    def run(*arguments, name="new"):
        words = ("TEST.DATASET_LIST", name, "TEST.DATA_DIR", where[0], "TEST.FEATURES", where[1])
        outcome = command("test.py", *words, *arguments)
        assert outcome.code == 0, outcome.err
        return latest(tmp_path / "work" / "output").resolve()

    return run


def aps(run, stage: str) -> dict[str, dict[str, float]]:
    entry = json.loads((run / "results.json").read_text())["datasets"]["new"][stage]
    return {name: entry[name]["AP"] for name in "EMH"}


def test_differences_are_those_of_the_queries(command, evaluate):
    a, b = evaluate(), evaluate("SupG.rerank_beta", 2, "SupG.rerank_k", 3)
    outcome = command("tools/compare.py", a, b)
    assert outcome.code == 0, outcome.err
    assert "SupG.rerank_k: A 9, B 3" in outcome.out
    for name in "EMH":
        before, after = (np.array(list(aps(run, "reranking")[name].values())) for run in (a, b))
        (cells,) = re.findall(rf"\| new \| {name} \| mAP \| (.*) \|", outcome.out)
        cells = cells.split(" | ")
        assert cells[:3] == [f"{before.mean():.2f}", f"{after.mean():.2f}", f"{(after - before).mean():+.2f}"]
        assert list(map(int, cells[4:7])) == [(after > before).sum(), (after < before).sum(), (after == before).sum()]
        low, high = map(float, cells[3].split(" to "))
        assert low < (after - before).mean() < high
        assert ("may be chance" in cells[7]) == (low <= 0 <= high)
    before, after = (aps(run, "reranking")["M"] for run in (a, b))
    assert f"new, M, better most: {max(after, key=lambda query: after[query] - before[query])} " in outcome.out


def test_stages_of_one_run_are_compared_and_the_page_has_both_rankings(command, evaluate, tmp_path):
    run = evaluate()
    newest = latest(tmp_path / "work" / "output")
    outcome = command("tools/compare.py", f"{run}:retrieval", newest)
    assert outcome.code == 0, outcome.err
    page = re.search(r"the page is (\S+)", outcome.out)[1]
    text = (tmp_path / "work" / page).read_text()
    assert f"A: retrieval of {run.name}" in text
    assert f"B: reranking of {run.name}" in text
    first = np.load(run / "new_retrieval_ranks.npy")[:, 0]
    assert all(f"new_{number}" in text for number in first)
    assert newest.resolve() == run  # a comparison is not a run


def test_runs_that_cannot_be_compared_are_refused(command, evaluate, tmp_path):
    run, other = evaluate(), evaluate(name="other")
    shutil.copytree(run, tmp_path / "changed")
    path = tmp_path / "changed" / "results.json"
    content = json.loads(path.read_text())
    for entry in content["datasets"]["new"]["reranking"].values():
        if isinstance(entry, dict):
            entry["AP"]["another"] = entry["AP"].pop("new_query_0")
    path.write_text(json.dumps(content))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text("{")
    for second, noun in (
        (other, "no dataset"),
        (f"{run}:diffusion", "diffusion"),
        (tmp_path, "results.json"),
        (tmp_path / "changed", "queries of new"),
        (tmp_path / "damaged", "damaged"),
    ):
        outcome = command("tools/compare.py", run, second)
        assert (outcome.code, outcome.err[:7]) == (2, "error: ")
        assert noun in outcome.err


def test_without_the_dataset_there_is_a_table_but_no_page(command, evaluate, tmp_path):
    run = evaluate()
    shutil.rmtree(tmp_path / "data" / "new")
    outcome = command("tools/compare.py", f"{run}:retrieval", run)
    assert outcome.code == 0, outcome.err
    assert "| new | M |" in outcome.out
    assert "new is not on the page" in outcome.out
