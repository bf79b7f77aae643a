import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import ranks
from PIL import Image

from extraction import batching
from extraction.extract import ImageSet, extract_images, extract_sets
from extraction.images import ImageFile
from extraction.loading import Loading, ReadAhead
from extraction.store import DescriptorStore
from model.device import choose_device
from model.errors import InputError
from model.extractor import NetworkExtractor
from model.recipe import Recipe
from modules import attach


@pytest.fixture(scope="module")
def model(checkpoint_50):
    return Recipe(checkpoint_50, scales=(1.0,)).extractor()


def write(folder, name: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options) -> ImageFile:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(folder / name, **options)
    return ImageFile(folder / name)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def store(folder, rows: int, name: str = "rows.npy") -> DescriptorStore:
    return DescriptorStore(folder / name, rows, 2048, {})


def run(model, images: list[ImageFile], into: DescriptorStore, **options) -> np.ndarray:
    on_error = options.pop("on_error", "list")
    extract_images(model, images, into, into.missing(), "test", Loading(**options), on_error)
    into.finish()
    return np.load(into.path)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_every_kind_have_finite_unit_descriptors_in_list_order(model, tmp_path, workers):
    images = [
        write(tmp_path, "one.png", size=(1, 1)),
        write(tmp_path, "line.png", size=(500, 1)),
        write(tmp_path, "stripe.png", size=(2000, 33)),
        *(write(tmp_path, f"{mode}.png", mode) for mode in ("L", "P", "RGBA", "LA", "1")),
        write(tmp_path, "cmyk.jpg", "CMYK"),
        write(tmp_path, "deep.png", "I;16"),
        write(tmp_path, "rotated.jpg", exif=rotated()),
    ]
    rows = run(model, images, store(tmp_path, len(images)), workers=workers)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    alone = run(model, images[-1:], store(tmp_path, 1, "alone.npy"))
    np.testing.assert_allclose(rows[-1], alone[0], atol=2e-6)


@pytest.mark.parametrize(("batch_size", "window", "workers"), [(0, 256, 2), (3, 256, 0), (4, 2, 0)])
def test_rows_do_not_depend_on_the_batches(model, tmp_path, monkeypatch, batch_size, window, workers):
    monkeypatch.setattr(batching, "WINDOW_IMAGES", window)
    sizes = [(40, 30), (30, 40), (33, 33)]
    images = [write(tmp_path, f"{i}.png", size=sizes[(i * i) % 3]) for i in range(20)]
    one_by_one = run(model, images, store(tmp_path, 20, "one.npy"), batch_size=1)
    assert len(np.unique(one_by_one, axis=0)) > 2
    rows = run(model, images, store(tmp_path, 20), batch_size=batch_size, workers=workers)
    np.testing.assert_array_equal(rows, one_by_one)


def test_a_device_that_runs_out_of_memory_gets_smaller_batches(model, tmp_path):
    tried = []

    def small_memory(_, inputs):
        tried.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    images = [write(tmp_path, f"{i}.png") for i in range(9)]
    one_by_one = run(model, images, store(tmp_path, 9, "one.npy"), batch_size=1)
    hook = model.register_forward_pre_hook(small_memory)
    try:
        rows = run(model, images, store(tmp_path, 9))
    finally:
        hook.remove()
    assert max(tried) > 2
    np.testing.assert_array_equal(rows, one_by_one)


def test_an_image_too_large_for_the_memory_is_skipped_or_named(model, tmp_path, caplog):
    def small_memory(_, inputs):
        if max(inputs[0].shape) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    images = [write(tmp_path, f"{i}.png", size=(120, 20) if i == 3 else (40, 30)) for i in range(6)]
    hook = model.register_forward_pre_hook(small_memory)
    try:
        rows = run(model, images, store(tmp_path, 6), on_error="skip")
        with pytest.raises(InputError, match=r"3\.png: the memory of the device is too small for 120 x 20"):
            run(model, images, store(tmp_path, 6, "other.npy"))
    finally:
        hook.remove()
    assert np.flatnonzero(~rows.any(axis=1)).tolist() == [3]
    assert "3.png: the memory of the device is too small" in caplog.text


class DeadlyFile(ImageFile):
    """A file that kills the process that decodes it, as when the system runs out of memory."""

    def read(self) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_reported_with_its_file_and_nothing_is_lost(model, tmp_path):
    images = [write(tmp_path, f"{i}.png") for i in range(12)]
    images[9] = DeadlyFile(images[9].path)
    with pytest.raises(
        InputError, match=r"a process that decodes images died while reading \S*9\.png; check that file"
    ):
        run(model, images, store(tmp_path, 12), workers=1, batch_size=2)
    missing = store(tmp_path, 12).missing().tolist()
    assert missing == list(range(missing[0], 12))
    assert 2 <= missing[0] <= 9


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_transferring_pixels_is_reported_with_its_file(model, tmp_path, monkeypatch, error):
    iterate = ReadAhead.__iter__

    def interrupted(decoded: ReadAhead):
        try:
            yield from iterate(decoded)
        except RuntimeError:
            raise error from None

    monkeypatch.setattr(ReadAhead, "__iter__", interrupted)
    images = [write(tmp_path, "0.png"), DeadlyFile(write(tmp_path, "1.png").path)]
    with pytest.raises(InputError, match=r"a process that decodes images died while reading \S*1\.png; check that"):
        run(model, images, store(tmp_path, 2), workers=1)


def test_a_worker_that_is_not_quite_dead_when_its_connection_ends_is_reported_with_its_file(tmp_path):
    decoded = ReadAhead([write(tmp_path, "0.png")], np.arange(1), Loading(workers=1))
    dying = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.3,))
    dying.start()
    decoded.pixels.reading[0] = torch.tensor([dying.pid, 0])
    assert "died while reading " in str(decoded.death_of_a_worker(EOFError()))


def test_a_descriptor_that_is_not_finite_is_reported_with_its_image_and_possible_reasons(tmp_path):
    class Overflowing:
        dim, device = 4, torch.device("cpu")

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.full((len(pixels), 4), torch.inf)

    images = [write(tmp_path, "a.png")]
    with pytest.raises(InputError, match=r"a\.png: its descriptor is not finite; .*, or the network overflows in fp16"):
        run(Overflowing(), images, DescriptorStore(tmp_path / "rows.npy", 1, 4, {}))


def test_damaged_images_stop_the_run_all_named_and_nothing_is_lost(model, tmp_path, caplog):
    images = [write(tmp_path, f"{i}.png") for i in range(6)]
    for i in (2, 4):
        images[i].path.write_text("no image")
    with pytest.raises(InputError, match=r"2 images cannot be used: .*2\.png: not an image, .*4\.png: not an image"):
        run(model, images, store(tmp_path, 6))
    assert store(tmp_path, 6).missing().tolist() == [2, 3, 4, 5]

    for i in (2, 4):
        write(tmp_path, f"{i}.png")
    whole = run(model, images, store(tmp_path, 6, "whole.npy"))
    np.testing.assert_array_equal(run(model, images, store(tmp_path, 6)), whole)


def test_a_damaged_image_can_be_skipped_with_a_row_of_zeros(model, tmp_path, caplog):
    images = [write(tmp_path, f"{i}.png") for i in range(3)]
    images[1].path.write_text("no image")
    rows = run(model, images, store(tmp_path, 3), on_error="skip")
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 0, 1], atol=1e-5)
    assert "skipped, a row of zeros" in caplog.text
    assert "1.png" in caplog.text


def test_stopping_at_a_damaged_image_keeps_what_came_before(model, tmp_path):
    images = [write(tmp_path, f"{i}.png") for i in range(4)]
    for i in (1, 2):
        images[i].path.write_text("no image")
    with pytest.raises(InputError, match=r"1\.png: not an image.* skip"):
        run(model, images, store(tmp_path, 4), on_error="stop")
    assert store(tmp_path, 4).missing().tolist() == [1, 2, 3]


def test_auto_is_the_gpu_if_there_is_one():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_missing_gpu_is_reported():
    with pytest.raises(InputError, match="cuda:99"):
        choose_device("cuda:99")


# ---- other extractors ----

COLOURS = """
import torch

class MeanColour:
    dim, device = 3, torch.device("cpu")

    def __call__(self, pixels):
        return torch.nn.functional.normalize(pixels.float().mean(dim=(1, 2)), dim=1)

class Colours:
    dim = 3

    def extractor(self, device):
        return MeanColour()

    def provenance(self):
        return {"colours": "mean"}
"""
SHARED = """
import sys
from pathlib import Path
from extraction.processes import Processes
from extraction.extract import ImageSet, extract_shared
from extraction.images import ImageFile

images = [ImageFile(path) for path in sorted(Path(sys.argv[1]).glob("*.png"))]
processes = Processes()
each = ImageSet(Path(sys.argv[2]), "colours", images)
store = extract_shared(each, Colours(), torch.device("cpu"), processes)
if store is not None:
    store.finish()
processes.end()
"""


@pytest.fixture
def colours() -> dict:
    names: dict = {}
    exec(COLOURS, names)
    return names


def mean_colours(images: list[ImageFile]) -> np.ndarray:
    rows = np.stack([image.read().reshape(-1, 3).mean(axis=0) for image in images])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_any_extractor_is_batched_and_resumed(colours, tmp_path):
    images = [write(tmp_path, f"{i}.png", size=[(40, 30), (9, 21)][i % 2]) for i in range(9)]
    begun = ImageSet(tmp_path / "rows.npy", "colours", images).open_store(colours["Colours"]())
    extract_images(colours["MeanColour"](), images, begun, begun.missing()[:4], "colours")

    class Counted(colours["Colours"]):
        seen = 0

        def extractor(self, device):
            inner = colours["MeanColour"]()

            def counting(pixels):
                Counted.seen += len(pixels)
                return inner(pixels)

            counting.dim, counting.device = 3, device
            return counting

    each = ImageSet(tmp_path / "rows.npy", "colours", images)
    (rows,) = extract_sets([each], Counted(), torch.device("cpu"), Loading(batch_size=3))
    np.testing.assert_allclose(rows.numpy(), mean_colours(images), atol=1e-6)
    assert Counted.seen == 5


def test_any_extractor_is_shared_by_the_processes_of_a_torchrun(tmp_path):
    images = [write(tmp_path, f"{i}.png") for i in range(7)]
    (tmp_path / "driver.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{COLOURS}{SHARED}")
    processes = ranks(2, tmp_path / "driver.py", [tmp_path, "shared.npy"], tmp_path)
    assert [process.wait() for process in processes] == [0, 0], [process.err for process in processes]
    np.testing.assert_allclose(np.load(tmp_path / "shared.npy"), mean_colours(images), atol=1e-6)
    assert not list(tmp_path.glob("*.journal*"))


def test_an_attached_network_with_its_normalisation_is_an_extractor(tmp_path):
    torch.manual_seed(0)
    network = attach(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU()).eval(), relup="1")

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.permute(0, 3, 1, 2).float() / 255 - 0.5

    extractor = NetworkExtractor(network, normalise, dim=8)
    images = [write(tmp_path, f"{i}.png", size=[(40, 30), (33, 21)][i % 2]) for i in range(4)]
    rows = run(extractor, images, DescriptorStore(tmp_path / "rows.npy", 4, 8, {}))
    for image, row in zip(images, rows, strict=True):
        expected = network(normalise(torch.from_numpy(image.read())[None]))[0]
        torch.testing.assert_close(torch.from_numpy(row), expected.detach())
