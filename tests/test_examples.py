import re
import runpy
import sys

import pytest
from conftest import ROOT

EXPECTED = {
    "delg_cirtorch.py": r"(?s)DELG-pytorch: \(2, 32\).*s3.1: ends in ReLUPlus.*cirtorch, whitened: \(2, 24\)",
    "faiss_index.py": r"mAP, reranked: +(?P<after>[\d.]+)",
    "lancedb_store.py": r"reranked: (?P<after>\d+) of the first 15 are right",
    "milvus_store.py": r"reranked: (?P<after>\d+) of the first 15 are right",
    "text_queries.py": r"mAP, superglobal: +(?P<after>[\d.]+)",
    "timm_model.py": r"(?s)resnet18: \(2, 512\).*layer3.1: ends in ReLUPlus.*vit_tiny_patch16_224: \(2, 192\)",
    "torchvision_resnet.py": r"(?s)layer1.0.relu: ReLU\(inplace=True\) -> ReLUPlus.*descriptors: \(2, 2048\)",
}
BEFORE = {
    "faiss_index.py": r"mAP, index: +(?P<before>[\d.]+)",
    "lancedb_store.py": r"hits: (?P<before>\d+) of",
    "milvus_store.py": r"hits: (?P<before>\d+) of",
    "text_queries.py": r"mAP, none: +(?P<before>[\d.]+)",
}


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs_with_the_installed_package(name, site, monkeypatch, capsys):
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    out = capsys.readouterr().out
    found = re.search(EXPECTED[name], out)
    assert found, out
    if name in BEFORE:  # reranking finds more of a drawn landmark
        assert float(found["after"]) > float(re.search(BEFORE[name], out)["before"])
