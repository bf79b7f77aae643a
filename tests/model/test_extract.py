import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import InputError
from model.extract import choose_device, describe_all
from model.images import ImageFile
from model.store import DescriptorStore
from model.superglobal import build_model


@pytest.fixture(scope="module")
def model(checkpoint_50):
    return build_model(checkpoint_50, 50, scales=(1.0,), relup=0.014, gemp=4.6, rgem=2.5, sgem=float("inf"))


def write(folder, name: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options) -> ImageFile:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        picture = picture.convert(mode)
    picture.save(folder / name, **options)
    return ImageFile(folder / name)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def store(folder, rows: int) -> DescriptorStore:
    return DescriptorStore(folder / "rows.npy", rows, 2048, {})


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_every_kind_have_finite_unit_descriptors_in_list_order(model, tmp_path, workers):
    images = [
        write(tmp_path, "one.png", size=(1, 1)),
        write(tmp_path, "line.png", size=(500, 1)),
        write(tmp_path, "stripe.png", size=(2000, 33)),
        *(write(tmp_path, f"{mode}.png", mode) for mode in ("L", "P", "RGBA", "LA", "1")),
        write(tmp_path, "cmyk.jpg", "CMYK"),
        write(tmp_path, "deep.png", "I;16"),
        write(tmp_path, "rotated.jpg", exif=rotated()),
    ]
    rows = describe_all(model, images, store(tmp_path, len(images)), "test", workers)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    alone = describe_all(model, images[-1:], DescriptorStore(tmp_path / "alone.npy", 1, 2048, {}), "test")
    np.testing.assert_allclose(rows[-1], alone[0], atol=2e-6)


def test_damaged_pictures_stop_the_run_all_named_and_nothing_is_lost(model, tmp_path, caplog):
    images = [write(tmp_path, f"{i}.png") for i in range(6)]
    for i in (2, 4):
        images[i].path.write_text("no picture")
    with pytest.raises(
        InputError, match=r"2 pictures cannot be used: .*2\.png: not a picture, .*4\.png: not a picture"
    ):
        describe_all(model, images, store(tmp_path, 6), "test")
    assert store(tmp_path, 6).missing().tolist() == [2, 3, 4, 5]

    for i in (2, 4):
        write(tmp_path, f"{i}.png")
    whole = describe_all(model, images, DescriptorStore(tmp_path / "whole.npy", 6, 2048, {}), "test")
    np.testing.assert_array_equal(describe_all(model, images, store(tmp_path, 6), "test"), whole)


def test_auto_is_the_gpu_where_there_is_one():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_gpu_that_is_not_there_is_told():
    with pytest.raises(InputError, match=r"TEST.DEVICE cuda:99: PyTorch sees \d+ GPUs here"):
        choose_device("cuda:99")
