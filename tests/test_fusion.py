"""Several networks or saved descriptors at once: a cosine is the weighted mean of theirs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import latest

from config import CommandLine, fusion_parts, make_config, used_options
from model.errors import InputError
from revisitop.fusion import fused


def unit(rng, *shape: int) -> np.ndarray:
    rows = rng.standard_normal(shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def saved(tmp_path) -> list[str]:
    """Descriptors of the fixture `layout` by two networks, in files."""
    rng, paths = np.random.default_rng(0), []
    for dim in (16, 40):
        paths.append(str(tmp_path / f"{dim}.npz"))
        np.savez(paths[-1], Q=unit(rng, 3, dim), X=unit(rng, 24, dim))
    return paths


def results(work: Path) -> dict:
    return json.loads((latest(work / "output") / "results.json").read_text())["datasets"]["roxford5k"]


def metrics(work: Path) -> dict:
    return {
        stage: {name: each for name, each in content.items() if name != "seconds"}
        for stage, content in results(work).items()
        if isinstance(content, dict) and "seconds" in content
    }


def test_the_cosine_of_fused_rows_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    for _ in range(50):
        dims, weights = rng.integers(2, 300, 3), rng.random(3)
        weights /= weights.sum()
        queries, rows = ([torch.from_numpy(unit(rng, count, dim)) for dim in dims] for count in (4, 30))
        found = fused(queries, weights.tolist()) @ fused(rows, weights.tolist()).T
        expected = sum(w * (q.double() @ x.double().T) for w, q, x in zip(weights, queries, rows, strict=True))
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="30, 29"):
        fused([rows[0], rows[1][:29]], [0.5, 0.5])


def test_weights_1_and_0_give_the_metrics_of_the_first(command, layout, saved, tmp_path):
    words = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "TEST.RERANKER", "superglobal,aqe")
    found = []
    for more in (
        ("TEST.FEATURES", saved[0]),
        ("TEST.FUSION", ",".join(saved), "TEST.FUSION_WEIGHTS", "1,0", "TEST.INDEX", "Flat"),
        ("TEST.FUSION", ",".join(saved), "TEST.FUSION_WEIGHTS", "0.3,0.7", "TEST.REPORT"),
    ):
        outcome = command("test.py", *words, *more)
        assert outcome.code == 0, outcome.err
        found.append(metrics(tmp_path / "work"))
    assert found[0] == found[1] != found[2]
    facts = results(tmp_path / "work")["fusion"]
    assert [(each["weight"], each["features"]) for each in facts] == [(0.3, saved[0]), (0.7, saved[1])]
    page = (latest(tmp_path / "work" / "output") / "report" / "index.html").read_text()
    assert f"0.3 of {saved[0]}" in page


@pytest.mark.slow  # runs of many settings
def test_weights_are_tuned(command, layout, saved, tmp_path):
    words = ("TEST.DATA_DIR", layout.data_dir, "--test", "roxford5k", "--folds", 2, "TEST.FUSION", ",".join(saved))
    outcome = command("tools/tune.py", *words)
    assert outcome.code == 0, outcome.err
    content = json.loads((latest(tmp_path / "work" / "output") / "results.json").read_text())["tuning"]
    assert [each["TEST.FUSION_WEIGHTS"] for each in content["settings"]] == [
        [], *([step / 10, (10 - step) / 10] for step in range(11))
    ]  # fmt: skip
    assert "TEST.FUSION_WEIGHTS" in outcome.out.partition("to use it: ")[2].partition("\n")[0]
    same = command("tools/tune.py", *words[:-1], f"{saved[0]},{saved[0]}")  # all weights are as good
    assert same.code == 0, same.err
    assert "FUSION_WEIGHTS" not in same.out.partition("to use it: ")[2].partition("\n")[0]


def test_a_part_is_a_file_of_the_options_of_a_network(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("MODEL: {NAME: 'timm:x', POOLING: none}\nSupG: {rgem: False}\n")
    second.write_text("MODEL: {DEPTH: 101}\n")

    def parts(*weights: float):
        names = [str(first), "saved/", str(second)]
        return fusion_parts(make_config([("TEST.FUSION", names), ("TEST.FUSION_WEIGHTS", list(weights))]))

    (a, one), (b, two), (c, three) = parts()
    assert a == b == c == pytest.approx(1 / 3)
    assert (one.MODEL.NAME, one.MODEL.POOLING, one.SupG.rgem) == ("timm:x", "none", False)
    assert two.TEST.FEATURES == "saved/"
    assert (three.MODEL.NAME, three.MODEL.DEPTH) == ("cvnet", 101)
    assert [weight for weight, _ in parts(3, 0, 1)] == [0.75, 0.25]
    with pytest.raises(InputError, match="2 weights"):
        parts(1, 1)
    for text, noun in (("TEST: {DEVICE: cpu}", "DEVICE"), ("a", "YAML")):
        first.write_text(text)
        with pytest.raises(InputError, match=noun):
            parts()


@pytest.mark.slow
def test_networks_are_fused_in_tables_and_with_distractors(command, layout, tmp_path):
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file, more in zip(files, ("", "SupG: {gemp: False}\n"), strict=True):
        file.write_text(f"MODEL: {{NAME: 'torchvision:resnet18'}}\n{more}")
    rows = torch.from_numpy(unit(np.random.default_rng(0), 50, 512))
    torch.save(rows, tmp_path / "far.pth")
    words = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "TEST.WEIGHTS", "untrained")
    words = (*words, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0, "TEST.FUSION", ",".join(map(str, files)))
    table = command("tools/tables.py", "main", *words, "TEST.DISTRACTORS", tmp_path / "far.pth")
    assert table.code == 0, table.err
    lines = [line for line in table.out.splitlines() if line.startswith("| a+b | roxford5k |")]
    assert len(lines) == 4
    assert "+1M" in lines[-1]


def test_options_of_a_network_apply_to_fused_networks_and_those_of_none_are_not_listed():
    cfg = CommandLine("").parse(["TEST.FUSION", "a.yaml,b.yaml", "SupG.relup_stages", "1", "MODEL.SIZE", "322"]).cfg
    assert {"SupG.relup_stages", "MODEL.SIZE"} <= used_options(cfg).keys()
    assert "MODEL.NAME" not in used_options(cfg)
