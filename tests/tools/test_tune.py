import itertools
import json
import re

import numpy as np
import pytest
from conftest import latest
from drawn_descriptors import draw_descriptors
from oracles import all_protocols, dense_reranking, full_ranking

pytestmark = pytest.mark.slow  # runs of many settings

GRID = ("--try", "SupG.rerank_k", "2,5,9", "--try", "SupG.rerank_beta", "0.15,2")


@pytest.fixture
def sets(tmp_path):
    """Two datasets with saved descriptors."""
    where = tmp_path / "data", tmp_path / "features"
    return {name: draw_descriptors(*where, name, seed) for seed, name in enumerate(("val", "new"))}


@pytest.fixture
def tune(command, sets, tmp_path):
    def run(*arguments):
        features = () if "TEST.FEATURES" in arguments else ("TEST.FEATURES", tmp_path / "features")
        return command("tools/tune.py", *arguments, "TEST.DATA_DIR", tmp_path / "data", *features)

    return run


def results(tmp_path) -> dict:
    return json.loads((latest(tmp_path / "work" / "output") / "results.json").read_text())


def by_the_book(tmp_path, name: str, truth: dict, k: int, beta: float, query: int | None = None) -> dict[str, float]:
    """Returns the mAP of the reranked rankings in percent, or the AP of one query."""
    queries, rows = (np.load(tmp_path / "features" / f"{name}_{kind}.npy") for kind in ("query", "db"))
    rankings = [
        ranking[dense_reranking(query.astype(float), rows[ranking].astype(float), k, beta)]
        for query, ranking in zip(queries, full_ranking(queries, rows), strict=True)
    ]
    chosen = slice(None) if query is None else slice(query, query + 1)
    return all_protocols(np.array(rankings)[chosen], truth["gnd"][chosen])


def test_the_best_of_the_validation_set_is_chosen_and_judged_beside_the_defaults(tune, sets, tmp_path):
    outcome = tune("--on", "val", "--test", "new", *GRID)
    assert outcome.code == 0, outcome.err
    pairs = list(itertools.product((2, 5, 9), (0.15, 2.0)))
    expected = {pair: by_the_book(tmp_path, "val", sets["val"], *pair) for pair in pairs}
    metrics = {pair: (each["M"] + each["H"]) / 2 for pair, each in expected.items()}
    content = results(tmp_path)
    tuning = content["tuning"]
    listed = {(each["SupG.rerank_k"], each["SupG.rerank_beta"]): each["figure"] for each in tuning["settings"]}
    assert listed == pytest.approx(metrics, abs=1e-6)
    best = max(metrics, key=metrics.get)
    assert tuning["chosen"] == dict(zip(("SupG.rerank_k", "SupG.rerank_beta"), best, strict=True))
    for stage, pair in (("default", (9, 0.15)), ("chosen", best)):
        entry = content["datasets"]["new"][f"reranking with the {stage} values"]
        for name, value in by_the_book(tmp_path, "new", sets["new"], *pair).items():
            assert entry[name]["mAP"] == pytest.approx(value, abs=1e-6)
    assert re.search(r"\| M \| mAP \| [\d.]+ \| [\d.]+ \| [+-][\d.]+ \| [+-][\d.]+ to [+-][\d.]+ \|", outcome.out)
    page = (latest(tmp_path / "work" / "output") / "report" / "index.html").read_text()
    assert "Heat map of SupG.rerank_k and SupG.rerank_beta" in page


def test_the_test_set_is_read_only_after_the_choice(tune, tmp_path):
    path = tmp_path / "data" / "new" / "gnd_new.pkl"
    path.write_bytes(b"raises when it is read")
    outcome = tune("--on", "val", "--test", "new", *GRID)
    assert outcome.code == 2
    assert "chosen on val: " in outcome.out
    assert str(path) in outcome.err


def test_a_missing_test_set_is_reported_before_the_work(tune):
    outcome = tune("--on", "val", "--test", "newer", *GRID)
    assert outcome.code == 2
    assert "did you mean new?" in outcome.err
    assert "chosen on" not in outcome.out


def test_with_folds_each_query_uses_the_best_setting_of_the_others(tune, sets, tmp_path):
    assert tune("--folds", 12, "--test", "new", *GRID).code == 0  # a fold for each query
    pairs = [(9, 0.15), *(pair for pair in itertools.product((2, 5, 9), (0.15, 2.0)) if pair != (9, 0.15))]
    aps = np.array(  # (pairs, queries, E M H)
        [[list(by_the_book(tmp_path, "new", sets["new"], *pair, q).values()) for q in range(12)] for pair in pairs]
    )
    content = results(tmp_path)
    chosen = content["datasets"]["new"]["reranking with the chosen values"]
    for query in range(12):
        others = np.delete(aps[:, :, 1:], query, axis=1).mean(axis=(1, 2))
        for place, name in enumerate("EMH"):
            ap = chosen[name]["AP"][f"new_query_{query}"]
            assert ap == pytest.approx(aps[others.argmax(), query, place], abs=1e-6)
    assert len({tuple(each.values()) for each in content["tuning"]["by fold"]}) > 1  # otherwise the test shows nothing


def test_a_gain_within_the_interval_is_reported_as_possible_chance(tune, tmp_path):
    outcome = tune("--on", "val", "--test", "new", "--try", "SupG.rerank_k", "9,8")
    assert outcome.code == 0, outcome.err
    content = results(tmp_path)
    assert ("may be chance" in outcome.out) == (content["tuning"]["chosen"] != content["tuning"]["default"])
    assert ("as good as the defaults" in outcome.out) != ("may be chance" in outcome.out)
    stages = content["datasets"]["new"]
    lost = any(
        stages["reranking with the chosen values"][name]["mAP"] < stages["retrieval"][name]["mAP"] for name in "EMH"
    )
    assert ("TEST.RERANKER none" in outcome.out) == lost


def test_queries_of_one_usage_choose_for_those_of_the_other(command, tmp_path):
    content = draw_descriptors(tmp_path / "plain", tmp_path / "features", "lm", 0)
    folder = tmp_path / "data" / "lm"
    folder.mkdir(parents=True)
    for name, ids in (("queries", content["qimlist"]), ("index", content["imlist"])):
        (folder / f"{name}.csv").write_text("\n".join(["id", *ids, ""]))
    lines = ["id,images,Usage"]
    for number, (query, truth) in enumerate(zip(content["qimlist"], content["gnd"], strict=True)):
        found = " ".join(content["imlist"][i] for i in truth["easy"])
        lines.append(f"{query},{found},{'Private' if number % 2 else 'Public'}")
    (folder / "solution.csv").write_text("\n".join([*lines, ""]))
    where = ("TEST.DATA_DIR", tmp_path / "data", "TEST.FEATURES", tmp_path / "features")
    outcome = command("tools/tune.py", "--on", "lm:Public", "--test", "lm:Private", *GRID, *where)
    assert outcome.code == 0, outcome.err
    assert "| Private | " in outcome.out
    assert "| Public | " not in outcome.out
    outcome = command("tools/tune.py", "--on", "lm:Secret", "--test", "lm:Private", *GRID, *where)
    assert outcome.code == 2
    assert "Secret" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "noun"),
    [
        (("--on", "new", "--test", "new"), "--folds"),
        (("--test", "new"), "--on"),
        (("--folds", 13, "--test", "new"), "--folds 13"),
        (("--try", "SupG.onemeval", "True"), "SupG.onemeval"),
        (("--try", "SupG.rerank_k", "2,x"), "SupG.rerank_k"),
        (("--try", "RERANK.K1", "20,9"), "RERANK.K1 9"),
        (("--try", "SupG.gemp_p", "4.6,3"), "TEST.FEATURES"),
        (("TEST.RERANKER", "cvnet"), "cvnet"),
        (("TEST.RERANKER", "none"), "--try"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tune, arguments, noun):
    outcome = tune(*(() if "--test" in arguments else ("--on", "val", "--test", "new")), *arguments)
    assert outcome.code == 2
    assert noun in outcome.err


def test_another_reranker_and_options_of_the_network_are_tuned(command, layout, two_layers, tmp_path):
    words = ("--folds", 2, "--test", "roxford5k", "--try", "SupG.gemp_p", "4.6,3", "TEST.RERANKER", "aqe")
    words += ("--try", "RERANK.QE_N", "2,5", "TEST.DATA_DIR", layout.data_dir)
    outcome = command("tools/tune.py", *words, *two_layers)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("roxford5k database: 24 images extracted") == 2
    assert outcome.out.count("descriptors: ") == 2  # a recipe for the validation, and one for the test
    assert len(results(tmp_path)["tuning"]["settings"]) == 6  # including the one with the paper's 10 results


def test_a_misspelt_usage_of_the_test_set_is_reported_before_the_work(tune):
    outcome = tune("--folds", 2, "--test", "new:Privat")
    assert outcome.code == 2
    assert "Privat" in outcome.err
    assert "settings of" not in outcome.out


def test_the_columns_of_the_settings_are_their_options_in_any_order(tune):
    words = ("--folds", "2", "--test", "new", "--try", "SupG.rerank_m", "9,10", "--try", "SupG.rerank_k", "3,4")
    outcome = tune(*words)
    assert outcome.code == 0, outcome.err
    lines = [line.strip("| ").split(" | ") for line in outcome.out.splitlines() if line.startswith("| ")]
    heading, *rows = lines[0], *[line for line in lines[2:] if len(line) >= 3 and line[0].isdigit()]
    for row in rows:
        setting = dict(zip(heading, row, strict=False))
        assert int(setting["SupG.rerank_m"]) in (9, 10, 400)
        assert int(setting["SupG.rerank_k"]) in (3, 4, 9)
    assert len(rows) > 3
