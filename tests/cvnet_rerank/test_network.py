import numpy as np
import pytest
import torch
from torch import Tensor

from cvnet_rerank import network as cvnet_rerank
from cvnet_rerank.network import CVNetRerank, load_cvnet_rerank
from model.errors import InputError


@pytest.fixture(scope="module")
def network(checkpoint_50) -> CVNetRerank:
    return load_cvnet_rerank(checkpoint_50, 50)


@pytest.fixture(scope="module")
def maps(network, reference) -> list[Tensor]:
    """The feature maps of image_0 and image_1, (1, 1024, 12, 18) and (1, 1024, 17, 11)."""
    return [feature_map(network, reference[f"image_{i}"]) for i in (0, 1)]


def feature_map(network: CVNetRerank, pixels: np.ndarray) -> Tensor:
    with torch.inference_mode():
        return network.feature_map(network.normalise(torch.from_numpy(pixels)[None]))


@torch.inference_mode()
def score(network: CVNetRerank, query: Tensor, keys: Tensor) -> np.ndarray:
    return network.score(network.query_inputs(query), keys).numpy()


def random_maps(count: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1024, h, w, generator=torch.Generator().manual_seed(seed))


def test_the_feature_map_is_the_papers(reference, maps):
    assert maps[0].shape == (1, 1024, 12, 18)
    assert maps[0].min() < 0
    expected = reference["cvnet_featuremap_image_0_channels_0_7"]
    np.testing.assert_allclose(maps[0][0, :8].numpy(), expected, atol=1e-4, rtol=0)


def test_scores_are_the_papers_for_each_order_of_the_pair(network, reference, maps):
    out = np.array([[score(network, query, key)[0] for key in maps] for query in maps])
    np.testing.assert_allclose(out, reference["cvnet_scores"], atol=1e-6, rtol=0)
    assert abs(out[0, 1] - out[1, 0]) > 0.04


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_the_score_does_not_depend_on_how_the_work_is_cut(network, reference, maps, monkeypatch, limit):
    monkeypatch.setitem(cvnet_rerank._PART_BYTES, "cpu", limit)
    monkeypatch.setitem(cvnet_rerank._BATCH_BYTES, "cpu", limit)
    np.testing.assert_allclose(score(network, *maps), reference["cvnet_scores"][0, 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("sides", [(6, 9), (9, 5), (1, 7)])
def test_a_keys_score_does_not_depend_on_its_batch(network, sides, maps, monkeypatch):
    keys = torch.cat([random_maps(3, *sides), maps[0][:, :, : sides[0], : sides[1]]])
    assert network.keys_per_batch(network.query_inputs(maps[1]), keys) > 1
    together = score(network, maps[1], keys)
    alone = np.concatenate([score(network, maps[1], key[None]) for key in keys])
    assert np.ptp(together) > 1e-4
    np.testing.assert_allclose(together, alone, atol=1e-6, rtol=0)
    monkeypatch.setattr(network, "keys_per_batch", lambda query, keys: 3)
    np.testing.assert_allclose(score(network, maps[1], keys), alone, atol=1e-6, rtol=0)
    assert score(network, maps[1], keys[:0]).shape == (0,)


@pytest.mark.parametrize("grows", ["query", "key", "both"])
def test_memory_is_bounded_by_fewer_keys_at_a_time(network, grows):
    def count(side: int) -> int:
        query, key = (side if grows in (name, "both") else 16 for name in ("query", "key"))
        return network.keys_per_batch(torch.empty(3, 256, query, query), torch.empty(1, 1024, key, key))

    counts = [count(side) for side in (4, 16, 32, 64, 256)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[2]
    assert counts[-1] == 1


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (1, 200)])
def test_the_smallest_images_have_a_score(network, maps, size):
    tiny = feature_map(network, np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    for query, key in ((tiny, maps[0]), (maps[0], tiny), (tiny, tiny), (maps[0], torch.zeros(1, 1024, 4, 4))):
        out = score(network, query, key)
        assert out.shape == (1,)
        assert 0 <= out[0] <= 1


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_moves_a_score_by_little(checkpoint_50, reference, precision):
    network = load_cvnet_rerank(checkpoint_50, 50, precision=precision)
    maps = [feature_map(network, reference[f"image_{i}"]) for i in (0, 1)]
    out = score(network, maps[0], maps[1].to(torch.float16))
    assert out.dtype == np.float32
    assert 1e-7 < abs(out[0] - reference["cvnet_scores"][0, 1]) < 5e-3


def test_depth_101_loads(checkpoint_101):
    assert len(load_cvnet_rerank(checkpoint_101, 101).encoder.blocks) == 3 + 4 + 23


@pytest.fixture(scope="module")
def seeded_state(checkpoint_50) -> dict[str, Tensor]:
    return torch.load(checkpoint_50)["model_state"]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("conv2ds.1.weight", lambda value: None),
        ("cv_learner.mlp.0.bias", lambda value: torch.zeros(64)),
        ("cv_learner.mlp.2.bias", lambda value: value * torch.nan),
    ],
)
def test_a_state_that_does_not_fit_is_rejected(tmp_path, seeded_state, key, change):
    changed = {**seeded_state, key: change(seeded_state.get(key))}
    path = tmp_path / "changed.pyth"
    torch.save({name: value for name, value in changed.items() if value is not None}, path)
    with pytest.raises(InputError, match=key):
        load_cvnet_rerank(path, 50)


def test_a_checkpoint_is_found_behind_module_and_rejected_without_the_reranker(tmp_path, seeded_state, reference, maps):
    torch.save({f"module.{key}": value for key, value in seeded_state.items()}, tmp_path / "parallel.pyth")
    out = score(load_cvnet_rerank(tmp_path / "parallel.pyth", 50), *maps)
    np.testing.assert_allclose(out, reference["cvnet_scores"][0, 1], atol=1e-6, rtol=0)
    torch.save({key: seeded_state[key] for key in seeded_state if "encoder_q." in key}, tmp_path / "encoder.pyth")
    with pytest.raises(InputError, match="CVNet-Rerank"):
        load_cvnet_rerank(tmp_path / "encoder.pyth", 50)


def test_shapes_that_do_not_fit_are_rejected(network):
    query = network.query_inputs(random_maps(1, 3, 3))
    for call, shape in (
        (lambda: network.query_inputs(random_maps(2, 3, 3)), r"\(2, 1024, 3, 3\)"),
        (lambda: network.score(query, random_maps(4, 3, 3)[:, :512]), r"\(4, 512, 3, 3\)"),
        (lambda: network.score(random_maps(1, 3, 3), random_maps(1, 3, 3)), r"\(1, 1024, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=shape):
            call()


def test_a_pair_that_does_not_fit_into_memory_is_reported(network, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    query = network.query_inputs(random_maps(1, 3, 4))
    monkeypatch.setattr(network.cv_learner, "forward", full)
    with pytest.raises(InputError, match="4 x 3 and 6 x 5"):
        network.score(query, random_maps(1, 5, 6))
