"""Where two images match: the maps of a recipe, and the command."""

import numpy as np
import pytest
import torch
from PIL import Image

from assembly import match_images
from model.recipe import Recipe
from revisitop.toy import draw_facade


def scene(landmark: int, place: tuple[int, int], ground: tuple[int, int, int]) -> np.ndarray:
    """Returns a plain image with a building at this place."""
    building, image = draw_facade(landmark).resize((120, 120)), Image.new("RGB", (300, 200), ground)
    image.paste(building, place, building)
    return np.array(image)


PLACES = ((10, 20), (90, 120, 150)), ((170, 70), (170, 160, 120))


@pytest.mark.slow  # gradients of CVNet's network
def test_the_maps_of_cvnet_sum_to_the_cosine_of_its_descriptors(checkpoint_50):
    recipe = Recipe(weights=checkpoint_50, scales=(0.7071, 1.0))
    images = [scene(landmark, *place) for landmark, place in enumerate(PLACES)]
    match = match_images(recipe, torch.device("cpu"), *images)
    extractor = recipe.extractor()
    with torch.inference_mode():
        first, second = (extractor(torch.from_numpy(image)[None])[0] for image in images)
    for positions, constant in zip(match.maps, match.constants, strict=True):
        assert float(positions.sum()) + constant == pytest.approx(float(first @ second), abs=1e-5)


@pytest.fixture
def paths(tmp_path):
    for name, place in zip("ab", PLACES, strict=True):
        Image.fromarray(scene(0, *place)).save(tmp_path / f"{name}.png")
    return tmp_path / "a.png", tmp_path / "b.png"


def test_both_images_are_drawn_with_their_maps(command, paths, two_layers, tmp_path):
    outcome = command("tools/match.py", *paths, "--out", tmp_path / "new" / "pair.png", *two_layers[:4])
    assert outcome.code == 0, outcome.err
    assert "cosine of" in outcome.out
    pixels = np.asarray(Image.open(tmp_path / "new" / "pair.png").convert("RGB")).astype(int)
    assert pixels.shape[1] > 2 * pixels.shape[0]
    assert (pixels[..., 0] - pixels[..., 2]).max() > 100  # the colours of a match


def test_what_cannot_be_matched_is_one_line(command, paths, tmp_path):
    out = ("--out", tmp_path / "pair.png")
    for words, noun in (
        ((*paths, "--out", tmp_path / "pair.jpg"), "PNG"),
        ((paths[0], tmp_path / "none.jpg", *out), "none.jpg"),
        ((*paths, *out, "--weights", tmp_path / "none.pyth"), "none.pyth"),
    ):
        outcome = command("tools/match.py", *words)
        assert outcome.code == 2
        assert noun in outcome.err.splitlines()[-1]
