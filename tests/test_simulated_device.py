"""All code for GPUs on a simulated one: results equal the CPU's, and the number of waits for the device is known.

The waits for the device are asserted per function of the project. A wait leaves the GPU idle, so that a new one
needs a good reason, which is documented here.
"""

import runpy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from simulated import DEVICE, OnDevice, SimulatedDevice, simulated_device
from torch import Tensor, nn

from cvnet_rerank import network as cvnet_rerank
from cvnet_rerank.network import CVLearner, CVNetRerank, load_cvnet_rerank
from cvnet_rerank.pair_scores import FeatureMaps
from extraction import batching
from extraction.extract import extract_images
from extraction.hub import ImageDescriptor
from extraction.images import ImageFile
from extraction.loading import Loading
from extraction.store import DescriptorStore
from model.backbone import Backbone
from model.extractor import NetworkExtractor
from model.folding import FoldedConv
from model.recipe import Recipe
from modules import attach
from modules.checks import values_unseen
from modules.diffusion import DiffusionReranker
from modules.expansion import QueryExpansion, augmented_rows
from modules.pooling import GeM, GeMPlus, RegionalGeM, ScaleGeM
from modules.reciprocal import KReciprocalReranker
from modules.reranking import SuperGlobalReranker
from modules.search import GRID, Database, search

# ---- the known waits ----

# A batch of extraction: none, if the images are in pinned memory.
A_BATCH = {}
# Images that are not pinned: each copy waits.
UNPINNED_IMAGE = "<listcomp>"
# In a user's program, the modules look for NaN in their input, the images and the vectors of the scales, and check
# that descriptors are finite. (Regional-GeM and GeM+ are one kernel, which does not check the feature map.)
A_CALL_OF_A_NETWORK = {"check_tensor": 2, "multi_scale_descriptor": 1}
# hub: the range of each tensor on the device; whether all descriptors are finite.
HUB_TENSOR, HUB_CALL = {"_pixels": 1}, {"forward": 1}
# A call of rerank with everything on the device: whether there are ids below 0, and then whether there are any of the
# first m.
RERANK_CALL, RERANK_CALL_ABSENT = {"_by_blocks": 1}, {"_by_blocks": 2}
# Each block of queries: the distinct ids to fetch, whether rows have unit length, whether scores are finite.
RERANK_BLOCK = {"_fetched": 1, "_warn_of_long_rows": 1, "check_finite": 1}
# And if candidates are absent: the present ones are counted, twice.
RERANK_BLOCK_ABSENT = {**RERANK_BLOCK, "_fetched": 3}
# A chunk of search: whether all scores are finite; the next two, which of them may be among the best, follow at once,
# when the device has nothing else to do. (Chunks with listed rows also ask which of these tie.)
SEARCH_CHUNK = {"search": 1, "_places": 2}
# CVNet's ResNet adds biases in another order on a GPU, see model/folding.py.
OTHER_ROUNDING, MAP_ROUNDING = {"atol": 2e-6, "rtol": 1e-5}, {"atol": 2e-5, "rtol": 1e-5}
# Diffusion tests for convergence at every 16th step.
DIFFUSION_STEPS = 16


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with simulated_device() as device:
        yield device


def plus(*counts: dict[str, int]) -> dict[str, int]:
    return {name: sum(each.get(name, 0) for each in counts) for name in {name for each in counts for name in each}}


def times(count: int, counts: dict[str, int]) -> dict[str, int]:
    return {name: count * each for name, each in counts.items()}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_rows(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1)


# ---- the rules ----


def test_tensors_of_two_devices_do_not_mix(device):
    x = torch.ones(2, 3, device=DEVICE)
    assert (x + torch.tensor(1.0)).sum().item() == 12  # numbers on the CPU are allowed
    for operation in (lambda y: x + y, lambda y: y + x, lambda y: x @ y.T, lambda y: torch.cat([x, y])):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            operation(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\) first"):
        x.numpy()


def test_an_asynchronous_copy_arrives_when_its_event_is_waited_for(device):
    x = torch.arange(3.0, device=DEVICE)
    first = torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    second = (x + 1).to("cpu", non_blocking=True)
    third = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x + 2, non_blocking=True)
    assert first.isnan().all()
    event.synchronize()
    assert first.tolist() == [0, 1, 2]
    assert torch.cat([second, third]).isnan().all()
    torch.cuda.synchronize()
    assert torch.cat([second, third]).tolist() == [1, 2, 3, 2, 3, 4]
    assert device.counted() == {}


@pytest.mark.parametrize(
    ("waits", "count"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.unique(), 1),
        (lambda x: x.bincount(), 2),
        (lambda x: torch.tensor([1, 2], device=x.device), 1),
        (lambda x: torch.arange(3).to(x.device), 1),
        (lambda x: torch.arange(3).to(x.device, non_blocking=True), 1),  # from pageable memory
        (lambda x: torch.arange(3).pin_memory().to(x.device, non_blocking=True), 0),
        (lambda x: x.masked_fill_(x > 1, 0), 0),
        (lambda x: torch.zeros_like(x).add_(torch.arange(3, device=x.device)), 0),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_waits_for_the_device_are_counted(device, waits, count, inference):
    x = torch.arange(3, device=DEVICE)
    with torch.inference_mode(inference):
        waits(x)
    assert sum(device.counted().values()) == count


# ---- networks and poolings ----


@pytest.fixture(scope="module")
def recipe(checkpoint_50) -> Recipe:
    return Recipe(checkpoint_50)


def unfused(network: nn.Module) -> nn.Module:
    """Returns the network on the CPU with the arithmetic of the device."""
    for layer in network.modules():
        if isinstance(layer, FoldedConv):
            layer.fused = False
    return network


@pytest.fixture(scope="module")
def on_cpu(recipe) -> NetworkExtractor:
    return unfused(recipe.extractor())


@torch.inference_mode()
def test_the_folded_network_has_the_cpus_descriptors_and_waits_only_where_it_looks_for_nan(device, recipe, on_cpu):
    pixels = torch.randint(256, (2, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = on_cpu(pixels)
    network, given = recipe.extractor(DEVICE), pixels.to(DEVICE)
    device.counted()
    out = network(given)
    assert device.counted() == A_CALL_OF_A_NETWORK
    torch.testing.assert_close(out.cpu(), expected, **OTHER_ROUNDING)
    device.counted()
    with values_unseen():
        network(given)
    assert device.counted() == A_BATCH


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_the_normalisation_of_any_network_waits_for_nothing(device, channels):
    backbone = Backbone(nn.Identity(), channels=channels)
    pixels = torch.randint(256, (1, 8, 9, 3), dtype=torch.uint8)
    expected, given = backbone.normalise(pixels), pixels.to(DEVICE)
    device.counted()
    out = backbone.normalise(given)
    assert device.counted() == {}
    assert torch.equal(out.cpu(), expected)


def test_an_attached_network_has_the_cpus_descriptors(device):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    attached = attach(nn.Sequential(*layers).eval(), relup="2", projection=(random(5, 8), random(8)))
    x = torch.rand(2, 3, 30, 40)
    expected = attached(x).detach()
    out = attached.to(DEVICE)(x.to(DEVICE))
    assert out.device == DEVICE
    assert torch.equal(out.detach().cpu(), expected)


@pytest.mark.parametrize("pooling", [GeM(), GeMPlus(), RegionalGeM(), RegionalGeM(p=20.0, window=3), GeM(p=30.0)])
@pytest.mark.parametrize("size", [(7, 9), (1, 4)])
def test_poolings_are_the_cpus(device, pooling, size):
    x = torch.rand(2, 6, *size)
    assert torch.equal(pooling(x.to(DEVICE)).cpu(), pooling(x))


@pytest.mark.parametrize("p", [float("inf"), 3.0])
def test_scale_gem_is_the_cpus(device, p):
    v = random(3, 2, 8)
    assert torch.equal(ScaleGeM(p)(v.to(DEVICE)).cpu(), ScaleGeM(p)(v))


# ---- extraction ----


class SmallNetwork(nn.Module):
    """A fast extractor: pixels -> unit descriptors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.conv(x).mean(dim=(2, 3)), dim=1)


@pytest.fixture
def images(tmp_path) -> list[ImageFile]:
    """14 images of three sizes."""
    rng = np.random.default_rng(0)
    for number in range(14):
        sides = [(24, 32), (32, 24), (20, 20)][number * number % 3]
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(tmp_path / f"{number:02}.png")
    return [ImageFile(path) for path in sorted(tmp_path.glob("*.png"))]


def extracted(extractor, images: list[ImageFile], path, loading: Loading) -> np.ndarray:
    store = DescriptorStore(path, len(images), extractor.dim, {})
    extract_images(extractor, images, store, store.missing(), "test", loading)
    store.finish()
    return np.load(path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_extraction_waits_for_no_batch_and_has_the_cpus_descriptors(device, images, tmp_path, workers, size):
    extractor = NetworkExtractor(SmallNetwork(), Backbone(nn.Identity()).normalise, dim=8)
    expected = extracted(extractor, images, tmp_path / "cpu.npy", Loading(batch_size=size))
    extractor.to(DEVICE)
    device.counted()
    rows = extracted(extractor, images, tmp_path / "gpu.npy", Loading(workers, True, size))
    assert device.counted() == A_BATCH
    np.testing.assert_array_equal(rows, expected)


def test_images_that_are_not_pinned_are_sent_one_by_one(device, images, tmp_path):
    extractor = NetworkExtractor(SmallNetwork(), Backbone(nn.Identity()).normalise, dim=8).to(DEVICE)
    device.counted()
    extracted(extractor, images, tmp_path / "gpu.npy", Loading(batch_size=4))
    assert device.counted() == {UNPINNED_IMAGE: len(images)}


def test_the_papers_network_extracts_the_cpus_descriptors(device, recipe, on_cpu, images, tmp_path):
    expected = extracted(on_cpu, images[:3], tmp_path / "cpu.npy", Loading())
    network = recipe.extractor(DEVICE)
    device.counted()
    rows = extracted(network, images[:3], tmp_path / "gpu.npy", Loading(pin_memory=True))
    assert device.counted() == A_BATCH
    np.testing.assert_allclose(rows, expected, **OTHER_ROUNDING)


def test_memory_that_pytorch_reserves_without_using_it_is_free(device):
    extractor = NetworkExtractor(SmallNetwork().to(DEVICE), nn.Identity(), dim=8, scales=(4.0,))
    device.reserved = 15 << 30
    small = batching.first_batch_size(extractor).pixels
    assert small < batching.GPU_PIXELS
    device.allocated = 15 << 30
    assert batching.first_batch_size(extractor).pixels < small / 10


def test_the_hubs_module_takes_images_and_tensors_of_any_device(device, images):
    extractor = NetworkExtractor(SmallNetwork(), Backbone(nn.Identity()).normalise, dim=8)
    opened = [Image.open(image.path) for image in images[:3]]
    tensors = [torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = ImageDescriptor(extractor)([*opened, *tensors])
    hub, given = ImageDescriptor(extractor.to(DEVICE)), [*opened, *(each.to(DEVICE) for each in tensors)]
    device.counted()
    out = hub(given)
    assert device.counted() == plus({UNPINNED_IMAGE: len(opened)}, times(len(tensors), HUB_TENSOR), HUB_CALL)
    assert isinstance(out, OnDevice)
    assert torch.equal(out.cpu(), expected)


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


@pytest.mark.parametrize("rows_on", ["cpu", DEVICE])
def test_a_chunk_of_search_waits_no_more_often_than_is_known(device, rows_on):
    """Host rows are copied through pinned memory, which waits for nothing."""
    queries, rows = unit_rows(QUERIES, 4).to(DEVICE), unit_rows(4 * GRID, 4, seed=1)
    listed, counts = [torch.tensor([7, 3 * GRID - 1])] * QUERIES, []
    for chunks in (3, 4):
        part = rows[: chunks * GRID].to(rows_on)
        device.counted()
        search(queries, part, 50, listed, device=DEVICE)
        counts.append(device.counted())
    assert counts[1] == plus(counts[0], SEARCH_CHUNK)


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


def absent(ids: Tensor) -> Tensor:
    """The same with absent candidates, some of them between present ones."""
    out = ids.clone()
    out[1, 3:] = -1
    out[2, 5:30:2] = -1
    return out


@pytest.mark.parametrize("reranker", RERANKERS, ids=str)
@pytest.mark.parametrize("change", [Tensor.clone, absent])
@pytest.mark.parametrize("on", ["cpu", DEVICE])
@pytest.mark.parametrize("own_fetch", [False, True])
def test_every_reranker_sorts_as_on_the_cpu(device, problem, ids, reranker, change, on, own_fetch):
    queries, rows, _ = problem
    numbers = change(ids)
    expected = reranker.rerank(queries, numbers, Database(rows).rows)
    moved = rows.to(on)
    fetch = moved.__getitem__ if own_fetch else Database(moved).rows
    out = reranker.rerank(queries.to(on), numbers.to(on), fetch, device=DEVICE)
    assert out.order.device == torch.device(on)
    assert torch.equal(out.order.cpu(), expected.order)
    assert torch.equal(out.scores.cpu(), expected.scores)


@pytest.mark.parametrize("reranker", RERANKERS, ids=str)
@pytest.mark.parametrize("some", [False, True])
def test_a_block_of_reranking_waits_no_more_often_than_is_known(device, problem, ids, reranker, some, monkeypatch):
    monkeypatch.setattr("modules.candidates._GPU_BYTES", 4 * 40 * 40 * 2)  # two queries in a block
    queries, rows, _ = problem
    queries, rows, numbers = queries.to(DEVICE), rows.to(DEVICE), (absent(ids) if some else ids).to(DEVICE)
    device.counted()
    reranker.rerank(queries, numbers, rows.__getitem__)
    counts = device.counted()
    steps = counts.pop("diffused", 0)
    assert steps <= 2 * (1 + reranker.iterations // DIFFUSION_STEPS if steps else 0)
    call, block = (RERANK_CALL_ABSENT, RERANK_BLOCK_ABSENT) if some else (RERANK_CALL, RERANK_BLOCK)
    assert counts == plus(call, times(QUERIES // 2, block))


def test_queries_are_expanded_and_rows_augmented_as_on_the_cpu(device, problem, ids):
    queries, rows, _ = problem
    expected = QueryExpansion(m=40).expand(queries, absent(ids), Database(rows).rows)
    out = QueryExpansion(m=40).expand(queries, absent(ids), Database(rows).rows, device=DEVICE)
    assert torch.equal(out, expected)
    assert torch.equal(augmented_rows(rows, k=3, device=DEVICE), augmented_rows(rows, k=3))


# ---- CVNet-Rerank ----


@pytest.fixture(scope="module")
def pair_network(checkpoint_50) -> CVNetRerank:
    return unfused(load_cvnet_rerank(checkpoint_50, 50))


@torch.inference_mode()
def test_cvnet_rerank_has_the_cpus_maps_and_scores(device, checkpoint_50, pair_network):
    maps, x = random(4, 1024, 3, 4), torch.rand(1, 3, 32, 48)
    expected = pair_network.score(pair_network.query_inputs(maps[:1]), maps[1:])
    network = load_cvnet_rerank(checkpoint_50, 50, device=DEVICE)
    given = maps.to(DEVICE)
    device.counted()
    scores = network.score(network.query_inputs(given[:1]), given[1:])
    assert device.counted() == {}
    torch.testing.assert_close(scores.cpu(), expected, **OTHER_ROUNDING)
    torch.testing.assert_close(network.feature_map(x.to(DEVICE)).cpu(), pair_network.feature_map(x), **MAP_ROUNDING)


@torch.inference_mode()
def test_feature_maps_come_to_the_cpu(device, checkpoint_50, pair_network, images, tmp_path):
    expected = dict(FeatureMaps(pair_network, {}, None, 0).of(images[:2]))
    network = load_cvnet_rerank(checkpoint_50, 50, device=DEVICE)
    device.counted()
    maps = dict(FeatureMaps(network, {}, None, 0).of(images[:2]))
    assert device.counted() == {"of": 2 * 2}  # there and back
    for number in expected:
        torch.testing.assert_close(maps[number], expected[number], **MAP_ROUNDING)


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


# ---- benchmarks ----


def test_the_benchmark_of_reranking_runs_on_a_device(device, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "rerank.py"))
    on_cpu, on_device = (benchmark["problem"](3, 120, 16, 30, each) for each in (torch.device("cpu"), DEVICE))
    for name in benchmark["RERANKERS"]:
        expected = benchmark["ours"](name, *on_cpu, 4)()
        assert torch.equal(benchmark["ours"](name, *on_device, 4)(), expected)
        assert benchmark["baseline"](name, *on_device, 4).shape == expected.shape
