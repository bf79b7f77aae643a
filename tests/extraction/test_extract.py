import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from extraction import batching
from extraction.extract import ImageSet, extract_images, extract_sets
from extraction.identity import Identity, stat_record
from extraction.images import ImageFile
from extraction.loading import Loading
from extraction.provenance import Provenance
from extraction.store import Records, Store
from model.errors import InputError
from model.extractor import NetworkExtractor
from modules import attach

PROBE = np.eye(2, dtype=np.float32)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 255 - 0.5


@pytest.fixture(scope="module")
def model() -> NetworkExtractor:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ReLU()).eval()
    return NetworkExtractor(attach(network, relup="1"), normalise, dim=8)


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


def run(model, images: list[ImageFile], on_error: str = "stop", **options) -> dict[str, np.ndarray]:
    """Extracts the images, and returns the rows by file name."""
    folder = images[0].path.parent
    number = len(list(folder.glob("*.blocks")))
    store = Store(folder / f"rows{number}.npy", model.dim, Provenance({}, PROBE))
    each = ImageSet(store.path, "test", images, folder)
    try:
        extract_images(model, each, store, np.arange(len(images)), Loading(**options), on_error=on_error)
    finally:
        records = store.records
        run.rows = dict(zip(np.char.decode(records.labels), store.rows(records.keys), strict=True))
    return run.rows


def test_images_of_every_kind_have_the_networks_unit_descriptors(model, tmp_path):
    images = [
        write(tmp_path, "one.png", size=(1, 1)),
        write(tmp_path, "line.png", size=(500, 1)),
        write(tmp_path, "stripe.png", size=(2000, 33)),
        *(write(tmp_path, f"{mode}.png", mode) for mode in ("L", "P", "RGBA", "LA", "1")),
        write(tmp_path, "cmyk.jpg", "CMYK"),
        write(tmp_path, "deep.png", "I;16"),
        write(tmp_path, "rotated.jpg", exif=rotated()),
    ]
    rows = run(model, images, workers=1)
    assert set(rows) == {image.path.name for image in images}
    np.testing.assert_allclose(np.linalg.norm([*rows.values()], axis=1), 1, atol=1e-5)
    for image in images:
        expected = model.network(normalise(torch.from_numpy(image.read())[None]))[0]
        torch.testing.assert_close(torch.from_numpy(rows[image.path.name]), expected.detach(), atol=1e-6, rtol=0)


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, row in found.items():
        np.testing.assert_allclose(row, expected[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("batch_size", "window", "workers"), [(0, 256, 2), (3, 256, 0), (4, 2, 0)])
def test_rows_do_not_depend_on_the_batches(model, tmp_path, monkeypatch, batch_size, window, workers):
    monkeypatch.setattr(batching, "WINDOW_IMAGES", window)
    sizes = [(40, 30), (30, 40), (33, 33)]
    images = [write(tmp_path, f"{i}.png", size=sizes[(i * i) % 3]) for i in range(20)]
    one_by_one = run(model, images, batch_size=1)
    assert len(np.unique([*one_by_one.values()], axis=0)) > 2
    assert_close(run(model, images, batch_size=batch_size, workers=workers), one_by_one)


def test_an_image_too_large_for_the_memory_is_skipped_or_named(model, tmp_path, caplog):
    def small_memory(_, inputs):
        if max(inputs[0].shape) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    images = [write(tmp_path, f"{i}.png", size=(120, 20) if i == 3 else (40, 30)) for i in range(6)]
    hook = model.register_forward_pre_hook(small_memory)
    try:
        rows = run(model, images, on_error="skip")
        with pytest.raises(InputError, match=r"3\.png"):
            run(model, images)
    finally:
        hook.remove()
    assert sorted(rows) == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    assert "3.png" in caplog.text


class DeadlyFile(ImageFile):
    """A file that kills the process that decodes it, as when the system runs out of memory."""

    def read_identified(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_reported_with_its_file_and_nothing_is_lost(model, tmp_path):
    images = [write(tmp_path, f"{i}.png") for i in range(12)]
    images[9] = DeadlyFile(images[9].path)
    with pytest.raises(InputError, match=r"9\.png"):
        run(model, images, workers=1, batch_size=2)
    assert 2 <= len(run.rows) <= 9


class FaultyFile(ImageFile):
    """A file whose decoder has a fault."""

    def read_identified(self):
        raise RuntimeError("a fault of the decoder")


def test_a_fault_in_a_worker_is_not_taken_for_its_death(model, tmp_path):
    images = [FaultyFile(write(tmp_path, "a.png").path)]
    with pytest.raises(RuntimeError, match="a fault of the decoder"):
        run(model, images, workers=1)


def test_a_descriptor_that_is_not_finite_is_reported_with_its_image_and_possible_reasons(tmp_path):
    class Overflowing:
        dim, device = 4, torch.device("cpu")

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.full((len(pixels), 4), torch.inf)

    with pytest.raises(InputError, match=r"a\.png"):
        run(Overflowing(), [write(tmp_path, "a.png")])
    assert run.rows == {}


def test_damaged_images_are_all_named_after_the_others_were_extracted(model, tmp_path):
    images = [write(tmp_path, f"{i}.png") for i in range(6)]
    for i in (2, 4):
        images[i].path.write_text("no image")
    with pytest.raises(InputError, match=r"2\.png: not an image.*4\.png"):
        run(model, images)
    assert sorted(run.rows) == ["0.png", "1.png", "3.png", "5.png"]


# ---- other extractors ----


class MeanColour:
    """An extractor that is no network."""

    dim, device = 3, torch.device("cpu")

    def __init__(self, recipe):
        self.recipe = recipe

    def __call__(self, pixels):
        self.recipe.seen += len(pixels)
        return torch.nn.functional.normalize(pixels.float().mean(dim=(1, 2)), dim=1)


class Colours:
    dim, precision, max_side, seen = 3, "fp32", None, 0

    def extractor(self, device):
        return MeanColour(self)

    def provenance(self):
        return {"colours": "mean"}


@pytest.fixture
def colours() -> Colours:
    return Colours()


PROBES = 2  # images of the probe


def mean_colours(images: list[ImageFile]) -> np.ndarray:
    rows = np.stack([image.read().reshape(-1, 3).mean(axis=0) for image in images])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def extracted(recipe, images: list[ImageFile], **options) -> np.ndarray:
    folder = images[0].path.parent
    (rows,) = extract_sets(
        [ImageSet(folder / "rows.npy", "colours", images, folder)], recipe, torch.device("cpu"), **options
    )
    return rows.numpy().copy()


def test_any_extractor_is_batched_and_resumed(colours, tmp_path):
    images = [write(tmp_path, f"{10**i}.png", size=[(40, 30), (9, 21)][i % 2]) for i in range(9)]
    extracted(colours, images[:4])
    colours.seen = 0
    np.testing.assert_allclose(
        extracted(colours, images, loading=Loading(batch_size=3)), mean_colours(images), atol=1e-6
    )
    assert colours.seen == 5 + PROBES


def test_damaged_images_have_zeros_whole_ones_are_tried_again_and_rows_of_deleted_ones_are_kept(colours, tmp_path):
    images = [write(tmp_path, f"{i}.png") for i in range(3)]
    whole = images[1].path.read_bytes()
    images[1].path.write_text("no image")
    np.testing.assert_allclose(np.linalg.norm(extracted(colours, images, on_error="skip"), axis=1), [1, 0, 1])
    images[1].path.write_bytes(whole)
    expected = mean_colours(images)
    np.testing.assert_allclose(extracted(colours, images, on_error="skip"), expected, atol=1e-6)
    images[2].path.unlink()
    np.testing.assert_allclose(extracted(colours, images), expected, atol=1e-6)
    images[1].path.write_text("no image")  # its old row is not used
    assert extracted(colours, images, on_error="skip").any(axis=1).tolist() == [True, False, True]


def exchange(a, b) -> None:
    a.rename(a.with_suffix(".old"))
    b.rename(a)
    a.with_suffix(".old").rename(b)


def replace_at_the_same_size_and_time(path) -> None:
    stat = path.stat()
    Image.fromarray(np.random.default_rng(99).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("settled", [True, False], ids=["old files", "files as young as the run"])
@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda images: replace_at_the_same_size_and_time(images[2].path), 1),
        (lambda images: exchange(images[0].path, images[4].path), 0),
        (lambda images: images.reverse(), 0),
        (lambda images: images.insert(0, images.pop()), 0),
        (lambda images: images.__setitem__(1, ImageFile(images[1].path, (3, 4, 30, 20))), 1),
    ],
    ids=["replaced at the same size and time", "exchanged", "reversed", "moved in the list", "given a box"],
)
def test_a_second_run_equals_a_first_one_and_extracts_only_new_images(
    colours, tmp_path, monkeypatch, settled, change, count
):
    if settled:
        monkeypatch.setattr("extraction.identity._STEP_NS", -1)
    images = [write(tmp_path, f"{'image' * (i + 1)}.bmp") for i in range(5)]
    extracted(colours, images)
    change(images)
    colours.seen = 0
    np.testing.assert_allclose(extracted(colours, images), mean_colours(images), atol=1e-6)
    assert colours.seen == count + PROBES


def test_equal_names_in_two_folders_never_meet(colours, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    images = [write(tmp_path / "a", "0.bmp"), write(tmp_path / "b", "0.bmp")]
    replace_at_the_same_size_and_time(images[1].path)
    sets = [ImageSet(tmp_path / "rows.npy", "colours", images, tmp_path)]
    for _ in range(2):
        (rows,) = extract_sets(sets, colours, torch.device("cpu"))
        np.testing.assert_allclose(rows.numpy(), mean_colours(images), atol=1e-6)


def test_an_inode_of_64_bits_fits_into_the_records(tmp_path):
    stat = SimpleNamespace(st_size=1, st_mtime_ns=2, st_ctime_ns=3, st_ino=2**64 - 1)
    assert Records.of([b"a"], [Identity(bytes(16), stat_record(stat))]).stats.tolist() == [[1, 2, 3, 2**63 - 1]]
