import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import latest
from torch import Tensor

from cvnet_rerank.network import load_cvnet_rerank
from cvnet_rerank.pair_scores import FeatureMaps, PairScores, pair_probe
from extraction.images import ImageFile, limit_side
from extraction.provenance import Provenance
from model.errors import InputError
from model.recipe import Recipe
from revisitop.layouts import load_dataset

pytestmark = pytest.mark.slow  # CVNet's network on many pairs

CPU = torch.device("cpu")
IDS = torch.tensor([[0, 5, 7, 3], [2, 7, -1, -1], [23, 1, 0, 5]])


@pytest.fixture(scope="module")
def network(checkpoint_50):
    return load_cvnet_rerank(checkpoint_50, 50)


@pytest.fixture
def dataset(layout):
    return load_dataset("roxford5k", layout.data_dir)


@pytest.fixture
def pairs(checkpoint_50, dataset, tmp_path) -> PairScores:
    return PairScores(
        Recipe(weights=checkpoint_50), dataset.queries, dataset.database, tmp_path / "scores.npy", IDS.shape[1]
    )


@torch.inference_mode()
def all_pairs(network, dataset, max_side: int | None = None) -> np.ndarray:
    """Returns the score of each query with each database image, computed pair by pair, (Q, N)."""

    def feature_map(image: ImageFile) -> Tensor:
        pixels = limit_side(torch.from_numpy(image.read()), max_side)
        return network.feature_map(network.normalise(pixels[None]))

    keys = [feature_map(image) for image in dataset.database]
    queries = [network.query_inputs(feature_map(image)) for image in dataset.queries]
    return np.array([[network.score(query, key).item() for key in keys] for query in queries])


@pytest.mark.parametrize("max_side", [None, 50])
def test_scores_are_those_of_each_pair_as_it_is_read(dataset, network, pairs, max_side):
    pairs.recipe = replace(pairs.recipe, max_side=max_side)
    expected = np.take_along_axis(all_pairs(network, dataset, max_side), IDS.clamp(min=0).numpy(), axis=1)
    expected[IDS.numpy() < 0] = 0
    np.testing.assert_allclose(pairs.of(IDS, CPU), expected, atol=1e-6, rtol=0)


def test_scores_are_reused_until_an_image_or_a_setting_changes(layout, pairs):
    first = pairs.of(IDS, CPU).clone()
    written = pairs.path.stat()
    assert torch.equal(replace(pairs).of(IDS, CPU), first)
    assert pairs.path.stat().st_ino == written.st_ino
    layout.image("db_3").write_bytes(layout.image("db_4").read_bytes())
    changed = (replace(pairs).of(IDS, CPU) != first).nonzero().tolist()
    assert changed == [[0, 3]]
    smaller = replace(pairs, recipe=replace(pairs.recipe, max_side=50))
    assert not torch.equal(smaller.of(IDS, CPU)[1], first[1])


class Unreadable(ImageFile):
    """An image during whose decoding the user interrupts the run."""

    def read_identified(self):
        raise KeyboardInterrupt


def test_an_interrupted_run_resumes_at_the_next_query(dataset, pairs, tmp_path):
    whole = pairs.of(IDS, CPU)
    unreadable = [Unreadable(image.path, image.box) for image in dataset.queries]
    interrupted = replace(pairs, path=tmp_path / "again.npy", queries=[*dataset.queries[:2], unreadable[2]])
    with pytest.raises(KeyboardInterrupt):
        interrupted.of(IDS, CPU)
    resumed = replace(interrupted, queries=[*unreadable[:2], dataset.queries[2]])
    torch.testing.assert_close(resumed.of(IDS, CPU), whole, atol=1e-6, rtol=0)  # batches may differ


def test_a_damaged_candidate_is_named(layout, pairs):
    layout.image("db_7").write_bytes(b"x")
    with pytest.raises(InputError, match=r"db_7\.jpg"):
        pairs.of(IDS, CPU)


def test_maps_on_disk_stay_within_their_limit_and_are_reused(dataset, network, tmp_path):
    provenance, images = Provenance({"precision": "fp32"}, pair_probe(network, CPU)), dataset.database

    def maps(limit: int = 1 << 30) -> FeatureMaps:
        return FeatureMaps(network, provenance, None, tmp_path / "maps", limit)

    def files() -> list:
        return sorted((tmp_path / "maps").rglob("*.npz"))

    ((_, first),) = maps().of(images[:1])
    size = files()[0].stat().st_size
    assert 0 < size - first.nbytes <= 512
    limit = 5 * (first.nbytes + 512)
    expected = dict(maps(limit).of(images))
    assert len(files()) == 5

    content = files()[0].read_bytes()
    files()[0].write_bytes(content[: size // 2] + b"damaged" + content[size // 2 + 7 :])
    again = list(maps(limit).of(images))
    assert {number for number, _ in again[:4]} < set(range(5))  # saved maps come first
    for number, each in again:
        torch.testing.assert_close(each, expected[number])
    assert [file.stat().st_size for file in files()] == [size] * 5


def test_maps_that_other_code_computed_are_not_reused(dataset, network, tmp_path):
    def first_map() -> Tensor:
        provenance = Provenance({"precision": "fp32"}, pair_probe(network, CPU))
        maps = FeatureMaps(network, provenance, None, tmp_path / "maps", 1 << 30)
        return next(iter(maps.of(dataset.database[:1])))[1]

    expected = first_map()
    (file,) = (tmp_path / "maps").rglob("*.npz")
    np.savez(file, map=-expected.numpy())
    torch.testing.assert_close(first_map(), -expected)  # what is saved is used
    probe = file.with_name("probe.npy")
    np.save(probe, np.load(probe)[::-1])
    torch.testing.assert_close(first_map(), expected)


# ---- the command ----


def test_numbers_of_candidates_are_an_option_and_need_images(command, layout, checkpoint_50, tmp_path):
    words = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "TEST.RERANKER", "cvnet")
    quick = ("TEST.WEIGHTS", checkpoint_50, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
    outcome = command("test.py", *words, *quick, "TEST.TOPK_LIST", "[6, 400]")
    assert outcome.code == 0, outcome.err
    entry = json.loads((latest(tmp_path / "work" / "output") / "results.json").read_text())["datasets"]["roxford5k"]
    assert {name for name in entry if name.startswith("re")} == {"retrieval", "reranking of 6", "reranking of 400"}
    outcome = command("test.py", *words, "TEST.FEATURES", "x.mat")
    assert (outcome.code, "TEST.FEATURES" in outcome.err) == (2, True)
