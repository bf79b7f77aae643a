import io
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from extraction.identity import NO_STAT
from extraction.images import (
    ImageError,
    ImageFile,
    ReadingLimits,
    image_suffixes,
    limit_side,
    read_image,
    set_reading_limits,
)
from extraction.loading import Loading, ReadAhead

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_8_bit_rgb(tmp_path, mode):
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image = Image.fromarray(RGB).convert(mode)
    image.save(path)
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_not_blended(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.dstack([RGB, np.zeros((20, 30), np.uint8)])).save(path)
    np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_16_bit_images_are_reduced_to_the_upper_8_bits(tmp_path, name):
    values = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat((values >> 8)[:, :, None], 3, axis=2))


def test_jpeg_files_intact_or_damaged_are_decoded_as_by_pillow(tmp_path, monkeypatch):
    """simplejpeg decodes intact files, and damaged ones in which it detects no damage."""
    pytest.importorskip("simplejpeg")
    random, path, outcomes = np.random.default_rng(1), tmp_path / "x.jpg", []
    smooth = Image.fromarray(RGB).resize((67, 45), Image.Resampling.BICUBIC)

    def outcome():
        try:
            return read_image(path).tobytes()
        except ImageError as error:
            return str(error)

    for number in range(200):
        file = io.BytesIO()
        smooth.save(file, "JPEG", quality=80, subsampling=number % 3, progressive=number % 5 == 0)
        data = bytearray(file.getvalue())
        for _ in range(number % 4):
            data[random.integers(len(data))] = random.integers(256)
        path.write_bytes(data[: random.integers(len(data)) if number % 7 == 0 else None])
        outcomes.append(outcome())
        with monkeypatch.context() as patch:
            patch.setattr("extraction.images.decoded_jpeg", lambda image: None)
            assert outcome() == outcomes[-1], number
    assert 100 < sum(isinstance(each, bytes) for each in outcomes) < 200


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_an_image_is_turned_upright_by_its_exif(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{kind}"
    Image.fromarray(RGB).save(path, exif=exif)
    stored = np.asarray(Image.open(path))
    flipped = (stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1])
    upright = (*flipped, *(flipped[number].transpose(1, 0, 2) for number in (0, 3, 2, 1)))
    np.testing.assert_array_equal(read_image(path), upright[orientation - 1])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((2, 3, 10, 12), RGB[3:12, 2:10]),
        ((2.9, 3.9, 10.9, 12.9), RGB[3:12, 2:10]),
        ((-5, -0.5, 100, 100), RGB),
    ],
)
def test_a_box_is_truncated_half_open_and_clipped(tmp_path, box, expected):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    np.testing.assert_array_equal(ImageFile(tmp_path / "x.png", box).read(), expected)


@pytest.mark.parametrize("box", [(40, 3, 50, 12), (5, 5, 5, 9), (9, 5, 3, 9), (-9, -9, -1, -1), (5.2, 1, 5.8, 9)])
def test_a_box_without_a_pixel_is_an_error(tmp_path, box):
    Image.fromarray(RGB).save(tmp_path / "query_7.png")
    with pytest.raises(ImageError, match=r"query_7\.png"):
        ImageFile(tmp_path / "query_7.png", box).read()


def test_damaged_images_are_reported(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(RGB).resize((300, 200)).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    for path in (cut, text, tmp_path / "none.jpg"):
        with pytest.raises(ImageError, match=path.name):
            read_image(path)


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)])
def test_images_without_an_8_bit_equivalent_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(ImageError, match="8 or 16 bits"):
        read_image(tmp_path / "x.tiff")


def test_the_longer_side_is_limited_where_an_image_is_read(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path)
    whole = torch.from_numpy(RGB)
    smaller = torch.nn.functional.interpolate(
        whole.permute(2, 0, 1)[None] / 255, (7, 11), mode="bilinear", antialias=True
    )
    ((pixels, identity),) = ReadAhead([ImageFile(path)], np.arange(1), Loading(), max_side=11)
    torch.testing.assert_close(pixels, smaller[0].permute(1, 2, 0), atol=1e-6, rtol=0)
    assert identity.key == ImageFile(path).identity().key  # that of the file
    for side in (None, 30, 1000):
        assert torch.equal(limit_side(whole, side), whole)


def test_only_formats_that_pillow_decodes_itself_are_opened(tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ImageError, match=r"x\.jpg"):
        read_image(path)
    assert ".eps" not in image_suffixes()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif"} <= image_suffixes()


def test_files_that_are_not_regular_are_rejected_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name in ("pipe.jpg", "folder.jpg", "loop.jpg"):
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / name)


def test_an_image_whose_header_claims_too_many_pixels_is_rejected(tmp_path):
    path = tmp_path / "bomb.png"
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    framed = [
        (len(each) - 4).to_bytes(4, "big") + each + zlib.crc32(each).to_bytes(4, "big") for each in (header, b"IDAT")
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    with pytest.raises(ImageError, match="2,500,000,000 pixels"):
        read_image(path)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif")[0, 0].tolist() == [255, 0, 0]


def test_a_jpeg_whose_end_is_missing_is_read_only_on_request(tmp_path, caplog):
    whole, path = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8))).save(whole, quality=90)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(ImageError, match="truncated"):
        read_image(path)
    set_reading_limits(ReadingLimits(truncated=True))
    try:
        pixels, identity = ImageFile(path).read_identified()
        assert whole.name not in caplog.text
        with pytest.raises(ImageError):
            read_image(tmp_path / "cut.png")
        assert ImageFile(whole).read_identified()[1].key == ImageFile(whole).identity().key
    finally:
        set_reading_limits(ReadingLimits())
    expected = read_image(whole)
    assert pixels.shape == expected.shape
    np.testing.assert_array_equal(pixels[:40], expected[:40])
    assert (pixels[-1] == 128).all()
    assert path.name in caplog.text
    # Its row is not taken for that of the file by a run that refuses the file.
    assert identity.key != ImageFile(path).identity().key
    assert identity.stat == NO_STAT


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "32.tiff", "colour.png"])
def test_8_bits_that_were_saved_as_16_or_32_are_refused_and_not_black(tmp_path, name):
    path, values = tmp_path / name, np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint16)
    if name == "colour.png":
        rows = np.repeat(values[:, :, None], 3, axis=2).astype(">u2")
        chunks = [b"IHDR" + (30).to_bytes(4, "big") + (20).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])]
        chunks += [b"IDAT" + zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)), b"IEND"]
        framed = [(len(e) - 4).to_bytes(4, "big") + e + zlib.crc32(e).to_bytes(4, "big") for e in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    else:
        Image.fromarray(values.astype(np.int32) if name == "32.tiff" else values).save(path)
    with pytest.raises(ImageError, match=r"8 (bits|or 16 bits)"):
        read_image(path)
