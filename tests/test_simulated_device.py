"""All code for GPUs on a simulated one: results equal the CPU's."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from simulated import DEVICE, SimulatedDevice, simulated_device
from torch import Tensor, nn
from torch.nn.functional import normalize

from cvnet_rerank.network import load_cvnet_rerank
from extraction.batching import GPU_PIXELS, first_batch_size
from extraction.extract import ImageSet, extract_images
from extraction.images import ImageFile
from extraction.loading import Loading
from extraction.provenance import Provenance
from extraction.store import Records, Store
from model.backbone import Backbone
from model.extractor import NetworkExtractor
from model.folding import FoldedConv
from model.recipe import Recipe
from modules import attach
from modules.diffusion import DiffusionReranker
from modules.expansion import QueryExpansion, augmented_rows
from modules.reciprocal import KReciprocalReranker
from modules.reranking import SuperGlobalReranker
from modules.search import Database, search

pytestmark = pytest.mark.slow  # CVNet's networks

OTHER_ROUNDING = {"atol": 2e-6, "rtol": 1e-5}  # CVNet's ResNet adds biases in another order, see model/folding.py


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with simulated_device() as device:
        yield device


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_devices_do_not_mix_and_a_copy_arrives_when_its_event_is_waited_for(device):
    """The rules that the other tests rely on."""
    x = torch.arange(3.0, device=DEVICE)
    for operation in (lambda y: x + y, lambda y: y @ x, lambda y: torch.cat([x, y])):
        with pytest.raises(RuntimeError, match="same device"):
            operation(torch.ones(3))
    first, event = x.to("cpu", non_blocking=True), torch.cuda.current_stream().record_event()
    second = torch.empty(3, pin_memory=True).copy_(x + 1, non_blocking=True)
    assert first.isnan().all()
    event.synchronize()
    assert (first.tolist(), second.isnan().all()) == ([0, 1, 2], True)


def unfused(network: nn.Module) -> nn.Module:
    """Returns the network on the CPU with the arithmetic of the device."""
    for layer in network.modules():
        if isinstance(layer, FoldedConv):
            layer.fused = False
    return network


@torch.inference_mode()
def test_networks_have_the_cpus_descriptors(device, checkpoint_50):
    pixels = torch.randint(256, (2, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = unfused(Recipe(weights=checkpoint_50).extractor())(pixels)
    found = Recipe(weights=checkpoint_50).extractor(DEVICE)(pixels.to(DEVICE))
    torch.testing.assert_close(found.cpu(), expected, **OTHER_ROUNDING)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    attached, x = attach(layers.eval(), relup="2", projection=(random(5, 8), random(8))), torch.rand(2, 3, 30, 40)
    expected = attached(x)
    assert torch.equal(attached.to(DEVICE)(x.to(DEVICE)).cpu(), expected)


@pytest.fixture
def extractor() -> NetworkExtractor:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).requires_grad_(False)
    return NetworkExtractor(network, Backbone(nn.Identity()).normalise, dim=8, scales=(4.0,))


@pytest.fixture
def images(tmp_path) -> list[ImageFile]:
    """14 images of three sizes."""
    rng = np.random.default_rng(0)
    for number in range(14):
        sides = [(24, 32), (32, 24), (20, 20)][number * number % 3]
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(tmp_path / f"{number:02}.png")
    return [ImageFile(path) for path in sorted(tmp_path.glob("*.png"))]


@pytest.mark.parametrize("size", [1, 5])
def test_extraction_has_the_cpus_descriptors_and_batches_overlap(device, extractor, images, tmp_path, size):
    def extracted(path) -> np.ndarray:
        store = Store(path, extractor.dim, Provenance({}, np.eye(2, dtype=np.float32)))
        extract_images(extractor, ImageSet(path, "test", images), store, np.arange(14), Loading(batch_size=size))
        return store.rows(Records.of([b""] * len(images), [image.identity() for image in images]).keys)

    expected = extracted(tmp_path / "cpu.npy")
    extractor.to(DEVICE)
    np.testing.assert_array_equal(extracted(tmp_path / "gpu.npy"), expected)
    assert device.sent


def test_memory_that_pytorch_reserves_without_using_it_is_free(monkeypatch):
    values = {"mem_get_info": (1 << 30, 16 << 30), "memory_reserved": 15 << 30, "memory_allocated": 0}
    for name in values:
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: values[name])
    free = first_batch_size(SimpleNamespace(device=DEVICE, scales=(4.0,))).pixels
    values["memory_allocated"] = 15 << 30
    assert first_batch_size(SimpleNamespace(device=DEVICE, scales=(4.0,))).pixels < free / 10 < GPU_PIXELS / 10


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """Returns queries and rows, some of which are equal."""
    rows = normalize(random(900, 32, seed=1), dim=1)
    rows[500:600] = rows[:100]
    return normalize(random(4, 32, seed=2), dim=1), rows


@pytest.mark.parametrize("queries_on", ["cpu", DEVICE])
@pytest.mark.parametrize("rows_on", ["cpu", DEVICE])
def test_search_finds_what_the_cpu_finds(device, problem, queries_on, rows_on):
    queries, rows = problem
    listed = [torch.tensor([7, 507, 3 * query, 800][: 4 * (query < 3)], dtype=torch.int64) for query in range(4)]
    expected = search(queries, rows, 50, listed)
    found = search(queries.to(queries_on), rows.to(rows_on), 50, listed, device=DEVICE)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=0)
    assert all(map(torch.equal, found.positions, expected.positions))


RERANKERS = (
    *(SuperGlobalReranker(40, 5), SuperGlobalReranker(40, 5, s2="original")),
    *(QueryExpansion(m=40), KReciprocalReranker(40), DiffusionReranker(40, 10)),
)


@pytest.fixture(params=[False, True], ids=["all present", "some absent"])
def ids(problem, request) -> Tensor:
    ids = (problem[0] @ problem[1].T).topk(50).indices
    if request.param:  # some of them between present ones
        ids[1, 3:], ids[2, 5:30:2] = -1, -1
    return ids


@pytest.mark.parametrize("reranker", RERANKERS, ids=str)
@pytest.mark.parametrize("on", ["cpu", DEVICE])
def test_every_reranker_sorts_as_on_the_cpu(device, problem, ids, reranker, on):
    queries, rows = problem
    expected = reranker.rerank(queries, ids, Database(rows).rows)
    for fetch in (rows.to(on).__getitem__, Database(rows.to(on)).rows):
        found = reranker.rerank(queries.to(on), ids.to(on), fetch, device=DEVICE)
        assert found.order.device == torch.device(on)
        assert torch.equal(found.order.cpu(), expected.order)
        assert torch.equal(found.scores.cpu(), expected.scores)


def test_queries_are_expanded_and_rows_augmented_as_on_the_cpu(device, problem, ids):
    queries, rows = problem
    on_cpu, on_device = (
        QueryExpansion(m=40).expand(queries, ids, Database(rows).rows, device=each) for each in ("cpu", DEVICE)
    )
    assert torch.equal(on_device, on_cpu)
    assert torch.equal(augmented_rows(rows, k=3, device=DEVICE), augmented_rows(rows, k=3))


@torch.inference_mode()
def test_cvnet_rerank_has_the_cpus_scores(device, checkpoint_50):
    maps, network = random(4, 1024, 3, 4), unfused(load_cvnet_rerank(checkpoint_50, 50))
    expected = network.score(network.query_inputs(maps[:1]), maps[1:])
    network, maps = load_cvnet_rerank(checkpoint_50, 50, device=DEVICE), maps.to(DEVICE)
    scores = network.score(network.query_inputs(maps[:1]), maps[1:])
    torch.testing.assert_close(scores.cpu(), expected, **OTHER_ROUNDING)
