import json

import numpy as np
import pytest
from conftest import ROOT, latest

from config import CommandLine
from revisitop.evaluate import Metrics
from revisitop.protocols import REVISITED_PROTOCOLS
from revisitop.published import find_figures, nearest_reproduction, published
from tools import tables

QUICK = ("TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)


def rows_of(text: str) -> dict[tuple, list[str]]:
    """Returns the cells of the rows of a Markdown table, by network, dataset and setting."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in lines}) == 1
    return {tuple(line[:3]): line[3:] for line in lines[2:]}


def keep_few(layout) -> None:
    """One query and three database images."""
    layout.gnd.update(imlist=layout.gnd["imlist"][:3], qimlist=["query_0"])
    layout.gnd["gnd"] = [{"bbx": [0, 0, 40, 40], "easy": [0], "hard": [1], "junk": [2]}]
    layout.write()


@pytest.fixture
def fast(command, layout, two_layers):
    """Runs the command with a network whose tables take a second."""
    data = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "[roxford5k, rparis6k]")
    return lambda *arguments: command("tools/tables.py", *arguments, *data, *two_layers)


@pytest.fixture
def table(command, layout, checkpoint_50, checkpoint_101, tmp_path):
    keep_few(layout)
    for checkpoint in (checkpoint_50, checkpoint_101):
        (tmp_path / "weights").mkdir(exist_ok=True)
        (tmp_path / "weights" / checkpoint.name).symlink_to(checkpoint)

    def run(*arguments, weights=tmp_path / "weights"):
        return command(
            "tools/tables.py", *arguments, "TEST.WEIGHTS", weights, "TEST.DATA_DIR", layout.data_dir,
            "TEST.DATASET_LIST", "[roxford5k, rparis6k]", *QUICK,
        )  # fmt: skip

    return run


def test_main_has_both_networks_and_says_what_is_missing(table, tmp_path):
    outcome = table("main")
    assert outcome.code == 0, outcome.err
    rows = rows_of(outcome.out)
    for network in ("R50", "R101"):
        assert all(rows[network, "roxford5k", stage][0] for stage in ("retrieval", "reranking"))
        missing = rows[network, "rparis6k", "retrieval, reranking"]
        assert "no dataset rparis6k" in missing[-1]
        assert "python -m tools.download rparis6k" in missing[-1]
        assert f"feats_1m_RN{network[1:]}.pth" in rows[network, "roxford5k", "retrieval, reranking, +1M"][-1]
    assert "Shao et al." in outcome.out
    assert rows_of((latest(tmp_path / "work" / "output") / "main.md").read_text()) == rows


def test_images_are_extracted_once_and_metrics_equal_those_of_test_py(fast, command, layout, two_layers):
    first = fast("main")
    assert first.err.count("images extracted") == 2
    again = fast("rerank")
    assert "images extracted" not in again.err
    rows, usual = rows_of(again.out), "reranking, M = 400, K = 9, beta = 0.15"
    ((network, *_), *_) = rows
    assert rows[network, "roxford5k", usual][:5] == rows_of(first.out)[network, "roxford5k", "reranking"][:5]
    others = (usual.replace("400", "50"), usual.replace("9", "1"), f"{usual}, S2 of the original rows")
    assert {key[2] for key in rows} >= {"retrieval", *others}

    command("test.py", "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", *two_layers)
    results = json.loads((latest(layout.data_dir.parent / "work" / "output") / "results.json").read_text())
    for stage in ("retrieval", "reranking"):
        entry = results["datasets"]["roxford5k"][stage]
        metrics = rows_of(first.out)[network, "roxford5k", stage]
        assert (metrics[0], metrics[1], metrics[4]) == tuple(f"{entry[name]['mAP']:.2f}" for name in "EMH")


def test_ablation_switches_each_module_and_has_both_forms_of_s2_and_other_rerankers(fast):
    outcome = fast("ablation", "SupG.relup_stages", 1, "TEST.RERANKER", "aqe")
    rows = rows_of(outcome.out)
    settings = [key[2] for key in rows if key[1] == "roxford5k"]
    names = ["GeM+", "Regional-GeM", "Scale-GeM", "ReLU+"]
    assert settings == [
        *("retrieval", "reranking", "reranking, S2 of the original rows", "reranking, AQE"),
        *(f"{stage}, without {name}{words}" for name in [*names, "the four"]
          for stage, words in (("retrieval", ""), ("reranking", ""), ("reranking", ", AQE"))),
    ]  # fmt: skip
    assert outcome.err.count("roxford5k database: 24 images extracted") == 6


def test_rerankers_are_compared_from_one_search_with_their_costs(fast):
    outcome = fast("rerankers")
    assert outcome.code == 0, outcome.err
    rows = {key[2]: cells for key, cells in rows_of(outcome.out).items() if key[1] == "roxford5k"}
    names = ("AQE", "alpha-QE", "DBA", "k-reciprocal", "diffusion")
    usual = ("retrieval", "reranking", "reranking, S2 of the original rows")
    assert list(rows) == [*usual, *(f"reranking, {name}" for name in names)]
    assert len({tuple(cells[:3]) for cells in rows.values()}) > 3
    for cells in rows.values():
        assert float(cells[3]) > 0
        assert cells[5] == "64"  # bytes of 16 dimensions
    assert "once for the database" in rows["reranking, DBA"][-1]
    few = rows_of(fast("rerankers", "TEST.RERANKER", "diffusion").out)
    assert [key[2] for key in few if key[1] == "roxford5k"] == [*usual, "reranking, diffusion"]


def test_cvnet_is_listed_if_requested_and_missing_weights_are_reported_in_a_row(table, tmp_path):
    outcome = table("main", "--depth", 50, "TEST.RERANKER", "cvnet", "TEST.TOPK_LIST", "[2, 400]")
    assert outcome.code == 0, outcome.err
    settings = [key[2] for key in rows_of(outcome.out) if key[1] == "roxford5k"]
    assert settings == [
        *("retrieval", "reranking", "reranking of 2, CVNet-Rerank", "reranking of 400, CVNet-Rerank"),
        "retrieval, reranking, +1M",
    ]
    (tmp_path / "none").mkdir()
    outcome = table("main", "--depth", 50, weights=tmp_path / "none")
    assert outcome.code == 0
    assert "ResNet-50" in rows_of(outcome.out)["R50", "roxford5k", "retrieval, reranking"][-1]


@pytest.mark.parametrize("off", [("SupG.rerank", "False"), ("TEST.RERANKER", "none")])
def test_without_reranking_there_are_only_rows_of_retrieval(fast, off):
    outcome = fast("main", *off)
    assert outcome.code == 0, outcome.err
    settings = [key[2] for key in rows_of(outcome.out) if key[1] == "roxford5k"]
    assert settings == ["retrieval", "retrieval, +1M"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("rerank", ("TEST.RERANKER", "none")),
        ("rerank", ("TEST.RERANKER", "cvnet")),
        ("rerank", ("SupG.rerank", "False")),
        ("rerank", ("--depth", 50, "MODEL.DEPTH", 101)),
    ],
)
def test_options_that_a_table_sets_itself_are_refused(command, task, words):
    outcome = command("tools/tables.py", task, *words)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")


def test_published_numbers_are_shown_with_the_difference():
    metrics = {
        protocol.name: Metrics(protocol, value, np.zeros(0), np.zeros(0), np.zeros(0))
        for protocol, value in zip(REVISITED_PROTOCOLS, (0.9, 0.84, 0.67), strict=True)
    }
    row = tables.Row("R50", "roxford5k", "retrieval", REVISITED_PROTOCOLS, metrics, {"M": 83.9, "H": 67.7})
    values = ["90.00", "84.00", "83.9", "+0.10", "67.00", "67.7", "-0.70"]
    cells = [text for _, text in row.cells(with_costs=False)]
    assert cells == ["R50", "roxford5k", "retrieval", *values, "", "", "", ""]


def test_published_numbers_appear_only_for_the_papers_settings():
    def known(*words, reranked=True):
        cfg = CommandLine("").parse([str(word) for word in words]).cfg
        setting = tables.paper_setting(cfg, "roxford5k", reranked)
        return setting and find_figures(published()["figures"], *setting)

    assert known() == {"M": 88.8, "H": 77.1}
    assert known("MODEL.DEPTH", 101, "SupG.onemeval") == {"M": 84.4, "H": 71.1}
    assert known(reranked=False) == known("SupG.rerank_k", 5, reranked=False) == {"M": 83.9, "H": 67.7}
    assert known("SupG.gemp", "False") is None
    assert known("TEST.SCALE_LIST", 5) is None
    assert known("SupG.rerank_k", 5) is None
    assert known("TEST.RERANKER", "diffusion") is None


def test_the_documentation_and_the_data_file_agree():
    text = "".join((ROOT / "docs" / page).read_text() for page in ("reproduce.md", "million.md"))
    for entry in published()["figures"]:
        name = f"ResNet-{entry['depth']}{', reranking' if entry['stage'] == 'reranking' else ''}"
        values = [entry[dataset][protocol] for dataset in ("roxford5k", "rparis6k") for protocol in "MH"]
        assert f"| {name} | {' | '.join(map(str, values))} |" in text


def test_the_nearest_independent_reproduction_stands_beside_the_published_number():
    """Issue 3 of the paper's repository has 73.13 and 50.75 for retrieval among a million distractors."""
    maps = {"E": 0.88, "M": 0.74, "H": 0.5}
    metrics = {
        each.name: Metrics(each, maps[each.name], np.zeros(1), np.zeros(3), np.zeros(101))
        for each in REVISITED_PROTOCOLS
    }
    percent = {name: 100 * value for name, value in maps.items()}
    reproduced = nearest_reproduction(50, "retrieval", True, "roxford5k", percent)
    row = tables.Row(
        "R50", "roxford5k", "retrieval, +1M", REVISITED_PROTOCOLS, metrics, {"M": 74.7, "H": 53.6},
        reproduced=reproduced,
    )  # fmt: skip
    cells = list(row.cells(with_costs=False, with_reproductions=True))
    assert [text for title, text in cells if title == "reproduced by others"] == ["73.13", "50.75"]
    assert [text for title, text in cells if title == "published"] == ["74.7", "53.6"]


def test_main_has_one_network_and_no_distractors_if_options_say_so(table):
    rows = rows_of(table("main", "MODEL.DEPTH", 50, "SupG.onemeval", False, "TEST.RERANKER", "none").out)
    assert {(key[0], key[2]) for key in rows if key[1] == "roxford5k"} == {("R50", "retrieval")}
