"""MODEL.NAME works in every command."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import kept

from extraction.extract import extract_batch
from model.network_recipe import NetworkRecipe
from revisitop.layouts import load_dataset

NETWORK = ("MODEL.NAME", "torchvision:resnet18", "TEST.WEIGHTS", "untrained", "TEST.SCALE_LIST", 1)
QUICK = (*NETWORK, "DATA_LOADER.NUM_WORKERS", 0)


@pytest.fixture
def data(layout) -> tuple:
    return ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")


def test_a_run_has_the_networks_descriptors_and_its_distractors(command, layout, data, tmp_path):
    million = layout.data_dir / "revisitop1m"
    (million / "jpg").mkdir(parents=True)
    for number in range(3):
        shutil.copy(layout.image(f"db_{number}"), million / "jpg" / f"{number}.jpg")
    (million / "revisitop1m.txt").write_text("0.jpg\n1.jpg\n2.jpg\n")
    outcome = command("extract_rop1m.py", *QUICK, "--data-dir", million)
    assert outcome.code == 0, outcome.err
    outcome = command("test.py", *data, *QUICK, "SupG.onemeval")
    assert outcome.code == 0, outcome.err
    rows = np.load(kept(tmp_path / "work" / "output", "roxford5k") / "roxford5k_db.npy")
    far = torch.load(tmp_path / "work" / "feats_1m_torchvision_resnet18.pth")
    np.testing.assert_allclose(far.numpy(), rows[:3], atol=1e-6)
    dataset = load_dataset("roxford5k", layout.data_dir)
    extractor = NetworkRecipe("torchvision:resnet18", "untrained", (1.0,)).extractor()
    images = [torch.from_numpy(dataset.database[number].read()) for number in range(3)]
    np.testing.assert_allclose(extract_batch(extractor, images).numpy(), rows[:3], atol=2e-6)
    other = command("test.py", *data, *QUICK, "SupG.onemeval", "SupG.rgem", "False")
    assert (other.code, "was extracted with other settings (rgem: 2.5 before, off now)" in other.err) == (2, True)


def test_tables_and_search_support_other_networks(command, layout, data):
    outcome = command("tools/tables.py", "main", *data, *QUICK)
    assert outcome.code == 0, outcome.err
    assert "| torchvision_resnet18 | roxford5k | reranking |" in outcome.out
    words = ("--database", layout.folder / "jpg", "--queries", layout.image("db_3"), "--weights", "untrained", "--json")
    outcome = command("tools/search.py", *words, *(word for word in QUICK if word not in ("TEST.WEIGHTS", "untrained")))
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["queries"][0]["results"][0]["file"] == "db_3.jpg"


def test_unsupported_settings_of_a_network_are_refused_and_the_advice_works(command, data):
    words = [*data, "MODEL.NAME", "timm:vit_tiny_patch16_224", "TEST.WEIGHTS", "untrained", "TEST.SCALE_LIST", 1]
    for advice, option in (("average pooling", ["MODEL.POOLING", "average"]), ("Regional-GeM", ["SupG.rgem", "False"])):
        outcome = command("test.py", *words, "DATA_LOADER.NUM_WORKERS", 0)
        assert outcome.code == 2
        assert advice in outcome.err
        words += option
    assert command("test.py", *words, "DATA_LOADER.NUM_WORKERS", 0).code == 0


def test_pretrained_weights_without_a_connection_are_reported(command, data, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    outcome = command("test.py", *data, "MODEL.NAME", "torchvision:resnet18")
    assert outcome.code == 2
    line = outcome.err.splitlines()[-1]
    assert "its pretrained weights cannot be downloaded" in line
    assert str(tmp_path / "hub" / "checkpoints") in line


def test_cvnet_reranks_with_its_own_network(command, data):
    outcome = command("test.py", *data, *QUICK, "TEST.RERANKER", "cvnet")
    assert (outcome.code, "needs CVNet's own network" in outcome.err) == (2, True)
