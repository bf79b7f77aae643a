"""All code for GPUs on a simulated one: results equal the CPU's."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from simulated import DEVICE, OnDevice, SimulatedDevice, simulated_device
from torch import Tensor, nn

from cvnet_rerank import network as cvnet_rerank
from cvnet_rerank.network import CVLearner, CVNetRerank, load_cvnet_rerank
from cvnet_rerank.pair_scores import FeatureMaps
from extraction import batching
from extraction.extract import ImageSet, extract_images
from extraction.hub import ImageDescriptor
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
from modules.pooling import GeM, GeMPlus, RegionalGeM, ScaleGeM
from modules.reciprocal import KReciprocalReranker
from modules.reranking import SuperGlobalReranker
from modules.search import Database, search

# CVNet's ResNet adds biases in another order on a GPU, see model/folding.py.
OTHER_ROUNDING, MAP_ROUNDING = {"atol": 2e-6, "rtol": 1e-5}, {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with simulated_device() as device:
        yield device


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_rows(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1)


# ---- the rules ----


def test_tensors_of_two_devices_do_not_mix(device):
    x = torch.ones(2, 3, device=DEVICE)
    assert (x + torch.tensor(1.0)).sum().item() == 12  # numbers on the CPU are allowed
    for operation in (lambda y: x + y, lambda y: y + x, lambda y: x @ y.T, lambda y: torch.cat([x, y])):
        with pytest.raises(RuntimeError, match="same device"):
            operation(torch.ones(2, 3))
    with pytest.raises(TypeError, match="cpu"):
        x.numpy()


def test_an_asynchronous_copy_arrives_when_its_event_is_waited_for(device):
    x = torch.arange(3.0, device=DEVICE)
    first = torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    second = (x + 1).to("cpu", non_blocking=True)
    assert first.isnan().all()
    event.synchronize()
    assert first.tolist() == [0, 1, 2]
    assert second.isnan().all()
    torch.cuda.synchronize()
    assert second.tolist() == [1, 2, 3]


# ---- networks and poolings ----


def unfused(network: nn.Module) -> nn.Module:
    """Returns the network on the CPU with the arithmetic of the device."""
    for layer in network.modules():
        if isinstance(layer, FoldedConv):
            layer.fused = False
    return network


@torch.inference_mode()
def test_the_papers_network_has_the_cpus_descriptors(device, checkpoint_50):
    pixels = torch.randint(256, (2, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = unfused(Recipe(weights=checkpoint_50).extractor())(pixels)
    found = Recipe(weights=checkpoint_50).extractor(DEVICE)(pixels.to(DEVICE))
    torch.testing.assert_close(found.cpu(), expected, **OTHER_ROUNDING)


def test_an_attached_network_has_the_cpus_descriptors(device):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    attached = attach(nn.Sequential(*layers).eval(), relup="2", projection=(random(5, 8), random(8)))
    x = torch.rand(2, 3, 30, 40)
    expected = attached(x).detach()
    found = attached.to(DEVICE)(x.to(DEVICE))
    assert found.device == DEVICE
    assert torch.equal(found.detach().cpu(), expected)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        *((GeM(p), (2, 6, 7, 9)) for p in (3.0, 30.0)),
        *((module, (2, 6, *size)) for module in (GeMPlus(), RegionalGeM()) for size in ((7, 9), (1, 4))),
        (RegionalGeM(p=20.0, window=3), (2, 6, 7, 9)),
        *((ScaleGeM(p), (3, 2, 8)) for p in (3.0, float("inf"))),
    ],
)
def test_poolings_are_the_cpus(device, module, shape):
    x = torch.rand(shape)
    assert torch.equal(module(x.to(DEVICE)).cpu(), module(x))


# ---- extraction ----


class SmallNetwork(nn.Module):
    """A fast network: normalised images -> unit descriptors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.conv(x).mean(dim=(2, 3)), dim=1)


@pytest.fixture
def extractor() -> NetworkExtractor:
    return NetworkExtractor(SmallNetwork(), Backbone(nn.Identity()).normalise, dim=8, scales=(4.0,))


@pytest.fixture
def images(tmp_path) -> list[ImageFile]:
    """14 images of three sizes."""
    rng = np.random.default_rng(0)
    for number in range(14):
        sides = [(24, 32), (32, 24), (20, 20)][number * number % 3]
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(tmp_path / f"{number:02}.png")
    return [ImageFile(path) for path in sorted(tmp_path.glob("*.png"))]


def extracted(extractor, images: list[ImageFile], path, loading: Loading) -> np.ndarray:
    store = Store(path, extractor.dim, Provenance({}, np.eye(2, dtype=np.float32)))
    extract_images(extractor, ImageSet(path, "test", images), store, np.arange(len(images)), loading)
    return store.rows(Records.of([b""] * len(images), [image.identity() for image in images]).keys)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_extraction_has_the_cpus_descriptors(device, extractor, images, tmp_path, workers, size):
    expected = extracted(extractor, images, tmp_path / "cpu.npy", Loading(batch_size=size))
    rows = extracted(extractor.to(DEVICE), images, tmp_path / "gpu.npy", Loading(workers, True, size))
    np.testing.assert_array_equal(rows, expected)


def test_memory_that_pytorch_reserves_without_using_it_is_free(device, extractor):
    extractor.to(DEVICE)
    device.reserved = 15 << 30
    small = batching.first_batch_size(extractor).pixels
    assert small < batching.GPU_PIXELS
    device.allocated = 15 << 30
    assert batching.first_batch_size(extractor).pixels < small / 10


def test_the_hubs_module_takes_images_and_tensors_of_any_device(device, extractor, images):
    opened = [Image.open(image.path) for image in images[:3]]
    tensors = [torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = ImageDescriptor(extractor)([*opened, *tensors])
    found = ImageDescriptor(extractor.to(DEVICE))([*opened, *(each.to(DEVICE) for each in tensors)])
    assert isinstance(found, OnDevice)
    assert torch.equal(found.cpu(), expected)


# ---- search and reranking ----

ROWS, QUERIES = 900, 4


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns queries, rows (some of them equal), and a list of rows for each query."""
    rows = unit_rows(ROWS, 32, seed=1)
    rows[500:600] = rows[:100]
    listed = [torch.tensor([7, 507, 3 * query, 800]) for query in range(QUERIES - 1)]
    return unit_rows(QUERIES, 32, seed=2), rows, [*listed, torch.empty(0, dtype=torch.int64)]


@pytest.mark.parametrize("queries_on", ["cpu", DEVICE])
@pytest.mark.parametrize("rows_on", ["cpu", DEVICE])
def test_search_finds_what_the_cpu_finds(device, problem, queries_on, rows_on):
    queries, rows, listed = problem
    expected = search(queries, rows, 50, listed)
    found = search(queries.to(queries_on), rows.to(rows_on), 50, listed, device=DEVICE)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=0)
    assert all(map(torch.equal, found.positions, expected.positions))


RERANKERS = (
    SuperGlobalReranker(40, 5),
    SuperGlobalReranker(40, 5, s2="original"),
    QueryExpansion(m=40),
    KReciprocalReranker(40),
    DiffusionReranker(40, 10),
)


@pytest.fixture(scope="module")
def ids(problem) -> Tensor:
    queries, rows, _ = problem
    return (queries @ rows.T).topk(50).indices


def with_absent(ids: Tensor) -> Tensor:
    """Returns ids of which some are absent, some of them between present ones."""
    ids = ids.clone()
    ids[1, 3:] = -1
    ids[2, 5:30:2] = -1
    return ids


@pytest.mark.parametrize("reranker", RERANKERS, ids=str)
@pytest.mark.parametrize("change", [Tensor.clone, with_absent])
@pytest.mark.parametrize("on", ["cpu", DEVICE])
def test_every_reranker_sorts_as_on_the_cpu(device, problem, ids, reranker, change: Callable, on):
    queries, rows, _ = problem
    numbers, moved = change(ids), rows.to(on)
    expected = reranker.rerank(queries, numbers, Database(rows).rows)
    for fetch in (moved.__getitem__, Database(moved).rows):
        found = reranker.rerank(queries.to(on), numbers.to(on), fetch, device=DEVICE)
        assert found.order.device == torch.device(on)
        assert torch.equal(found.order.cpu(), expected.order)
        assert torch.equal(found.scores.cpu(), expected.scores)


def test_queries_are_expanded_and_rows_augmented_as_on_the_cpu(device, problem, ids):
    queries, rows, _ = problem
    on_cpu, on_device = (
        QueryExpansion(m=40).expand(queries, with_absent(ids), Database(rows).rows, device=each)
        for each in ("cpu", DEVICE)
    )
    assert torch.equal(on_device, on_cpu)
    assert torch.equal(augmented_rows(rows, k=3, device=DEVICE), augmented_rows(rows, k=3))


# ---- CVNet-Rerank ----


@pytest.fixture(scope="module")
def pair_network(checkpoint_50) -> CVNetRerank:
    return unfused(load_cvnet_rerank(checkpoint_50, 50))


@torch.inference_mode()
def test_cvnet_rerank_has_the_cpus_maps_and_scores(device, checkpoint_50, pair_network, images):
    maps = random(4, 1024, 3, 4)
    expected = pair_network.score(pair_network.query_inputs(maps[:1]), maps[1:])
    network, maps = load_cvnet_rerank(checkpoint_50, 50, device=DEVICE), maps.to(DEVICE)
    scores = network.score(network.query_inputs(maps[:1]), maps[1:])
    torch.testing.assert_close(scores.cpu(), expected, **OTHER_ROUNDING)
    (_, expected_map), (_, found_map) = (
        next(FeatureMaps(each, {}, None, None, 0).of(images[:1])) for each in (pair_network, network)
    )
    torch.testing.assert_close(found_map, expected_map, **MAP_ROUNDING)


def test_the_batch_of_keys_fits_the_device_even_if_maps_are_on_the_cpu(device):
    network = CVNetRerank.__new__(CVNetRerank)
    nn.Module.__init__(network)
    with torch.device("meta"):
        network.cv_learner, network.dtype = CVLearner(), torch.float32
    query, keys = torch.empty(3, 256, 48, 64), torch.empty(1, 1024, 48, 64)
    on_cpu = network.keys_per_batch(query, keys)
    on_device = network.keys_per_batch(query.to(DEVICE), keys)
    assert on_device == network.keys_per_batch(query.to(DEVICE), keys.to(DEVICE))
    assert on_device > cvnet_rerank._BATCH_BYTES["cuda"] // cvnet_rerank._BATCH_BYTES["cpu"] * on_cpu / 8
