"""MODEL.NAME works in every command."""

import shutil

import numpy as np
import pytest
import torch
from conftest import kept

from extraction.extract import extract_batch
from model.recipe import Recipe
from revisitop.layouts import load_dataset

pytestmark = pytest.mark.slow  # runs commands on a ResNet

ANY = ("TEST.WEIGHTS", "untrained", "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
RESNET = ("MODEL.NAME", "torchvision:resnet18", *ANY)


@pytest.fixture
def data(layout) -> tuple:
    return ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")


def test_a_run_has_the_networks_descriptors_and_its_distractors(command, layout, data, tmp_path):
    million = layout.data_dir / "revisitop1m"
    (million / "jpg").mkdir(parents=True)
    for number in range(3):
        shutil.copy(layout.image(f"db_{number}"), million / "jpg" / f"{number}.jpg")
    (million / "revisitop1m.txt").write_text("0.jpg\n1.jpg\n2.jpg\n")
    for words in (("extract_rop1m.py", *RESNET, "--data-dir", million), ("test.py", *data, *RESNET, "SupG.onemeval")):
        outcome = command(*words)
        assert outcome.code == 0, outcome.err
    rows = np.load(kept(tmp_path / "work" / "output", "roxford5k") / "roxford5k_db.npy")
    far = torch.load(tmp_path / "work" / "feats_1m_torchvision_resnet18.pth")
    np.testing.assert_allclose(far.numpy(), rows[:3], atol=1e-6)
    dataset = load_dataset("roxford5k", layout.data_dir)
    extractor = Recipe("torchvision:resnet18", "untrained", scales=(1.0,)).extractor()
    images = [torch.from_numpy(dataset.database[number].read()) for number in range(3)]
    np.testing.assert_allclose(extract_batch(extractor, images).numpy(), rows[:3], atol=2e-6)
    other = command("test.py", *data, *RESNET, "SupG.onemeval", "SupG.rgem", "False")
    assert (other.code, "rgem_p: 2.5 before, off now" in other.err) == (2, True)


def test_pretrained_weights_without_a_connection_are_reported(command, data, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    outcome = command("test.py", *data, "MODEL.NAME", "torchvision:resnet18")
    assert (outcome.code, str(tmp_path / "hub" / "checkpoints") in outcome.err) == (2, True)


def test_cvnet_reranks_with_its_own_network(command, data):
    outcome = command("test.py", *data, *RESNET, "TEST.RERANKER", "cvnet")
    assert (outcome.code, "CVNet" in outcome.err) == (2, True)
