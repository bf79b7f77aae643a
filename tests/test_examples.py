import io
import re
import runpy
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import requests
from conftest import ROOT
from PIL import Image

pytestmark = pytest.mark.slow  # installs the package and runs the examples

EXPECTED = {
    "delg_cirtorch.py": r"(?s)DELG-pytorch: \(2, 32\).*s3.1: ends in ReLUPlus.*cirtorch, whitened: \(2, 24\)",
    "faiss_index.py": r"mAP, reranked: +(?P<after>[\d.]+)",
    "lancedb_store.py": r"reranked: (?P<after>\d+) of the first 15 are right",
    "milvus_store.py": r"reranked: (?P<after>\d+) of the first 15 are right",
    "fine_tuning.py": r"(?s)average: recall.*SuperGlobal: recall@1 (?P<before>[\d.]+) before, (?P<after>[\d.]+) after",
    "hloc_extractor.py": r"80 of 80 pairs show the same place",
    "metric_learning_postprocessor.py": r"after: precision@10 (?P<after>[\d.]+), distances ascend: True",
    "video_text.py": r"reranked: mAP of frames (?P<after>[\d.]+)",
    "vpr_evaluation.py": r"RerankedIndex: R@1: [\d.]+, R@5: (9|100)",
    "timm_model.py": r"(?s)resnet18: \(2, 512\).*layer3.1: ends in ReLUPlus.*vit_tiny_patch16_224: \(2, 192\)",
    "torchvision_resnet.py": r"(?s)layer1.0.relu: ReLU\(inplace=True\) -> ReLUPlus.*descriptors: \(2, 2048\)",
}
BEFORE = {
    "faiss_index.py": r"mAP, index: +(?P<before>[\d.]+)",
    "lancedb_store.py": r"hits: (?P<before>\d+) of",
    "milvus_store.py": r"hits: (?P<before>\d+) of",
    "fine_tuning.py": r"SuperGlobal: recall@1 (?P<before>[\d.]+) before",
    "metric_learning_postprocessor.py": r"before: precision@10 (?P<before>[\d.]+)",
    "video_text.py": r"search: mAP of frames (?P<before>[\d.]+)",
}


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*EXPECTED, "service.py"}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs_with_the_installed_package(name, site, monkeypatch, capsys):
    if name == "fine_tuning.py":
        pytest.importorskip("pytorch_metric_learning", reason="optional")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    out = capsys.readouterr().out
    found = re.search(EXPECTED[name], out)
    assert found, out
    if name in BEFORE:  # reranking finds more of a drawn landmark
        assert float(found["after"]) > float(re.search(BEFORE[name], out)["before"])


@contextmanager
def served(application, path):
    """Serves the application on a free port of localhost, and yields its address."""
    uvicorn = pytest.importorskip("uvicorn", reason="optional")
    server = uvicorn.Server(uvicorn.Config(application(str(path)), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_service_keeps_images_over_a_restart(site, monkeypatch, tmp_path):
    pytest.importorskip("fastapi", reason="optional")
    monkeypatch.syspath_prepend(site)
    application = runpy.run_path(str(ROOT / "examples" / "service.py"))["application"]
    random, images = np.random.default_rng(0), []
    for _ in range(5):
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((80, 60)).save(file := io.BytesIO(), "png")
        images.append(file.getvalue())
    with served(application, tmp_path / "images.faiss") as url:
        assert requests.post(f"{url}/search", data=images[0], timeout=60).json() == []
        for number, image in enumerate(images):
            assert requests.put(f"{url}/images/{10 * number}", data=image, timeout=60).json() == {"replaced": 0}
        assert requests.put(f"{url}/images/40", data=images[4], timeout=60).json() == {"replaced": 1}
        assert requests.delete(f"{url}/images/30", timeout=60).json() == {"deleted": 1}
    with served(application, tmp_path / "images.faiss") as url:
        for rerank in (True, False):
            found = requests.post(f"{url}/search?rerank={rerank}", data=images[2], timeout=60).json()
            assert sorted(each["id"] for each in found) == [0, 10, 20, 40]
            assert [each["score"] for each in found] == sorted((each["score"] for each in found), reverse=True)
        assert found[0]["id"] == 20  # the query itself; reranking averages all four, of which another may be nearer
        assert found[0]["score"] == pytest.approx(1, abs=1e-5)
        for body in (b"", b"no image", images[0][:100]):
            for method, path in (("PUT", "images/7"), ("POST", "search")):
                answer = requests.request(method, f"{url}/{path}", data=body, timeout=60)
                assert answer.status_code == 400
                assert "image" in answer.json()["detail"]
        assert len(requests.post(f"{url}/search?top=2", data=images[2], timeout=60).json()) == 2
