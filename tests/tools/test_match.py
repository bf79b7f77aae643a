"""Where two images match: the command, and what its maps show of drawn buildings."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from assembly import match_images
from model.extractor import NetworkExtractor
from model.recipe import Recipe
from modules import Whitening, attach, match_maps
from revisitop.toy import draw_facade


def scene(landmark: int, place: tuple[int, int], ground: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns a plain image with a building at this place, and the mask of the building."""
    building = draw_facade(landmark).resize((120, 120))
    image, mask = Image.new("RGB", (300, 200), ground), Image.new("L", (300, 200))
    image.paste(building, place, building)
    mask.paste(building.getchannel("A"), place)
    return np.array(image), np.array(mask) / np.float32(255)


PLACES = ((10, 20), (90, 120, 150)), ((170, 70), (170, 160, 120))


@pytest.mark.parametrize("landmark", [0, 1, 3])
def test_most_of_the_map_lies_on_the_common_building(landmark):
    torchvision = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    extract = attach(nn.Sequential(OrderedDict([*torchvision.resnet18().named_children()][:6])).eval(), relup="layer1")
    images, masks = zip(*(scene(landmark, *each) for each in PLACES), strict=True)
    match = match_maps(extract, *(torch.from_numpy(each).permute(2, 0, 1)[None] / 60 - 2 for each in images))
    for positions, mask in zip(match.maps, masks, strict=True):
        inside = torch.from_numpy(np.array(Image.fromarray(mask).resize(positions.shape[::-1], Image.Resampling.BOX)))
        assert inside.mean() < 0.25
        assert (inside * positions).sum() > 0.6 * match.cosine


@pytest.mark.parametrize("scales", [(1.0,), (0.7071, 1.0)])
def test_the_maps_of_cvnet_sum_to_the_cosine_of_its_descriptors(checkpoint_50, scales):
    recipe = Recipe(weights=checkpoint_50, scales=scales)
    images = [scene(landmark, *place)[0] for landmark, place in enumerate(PLACES)]
    match = match_images(recipe, torch.device("cpu"), *images)
    extractor = recipe.extractor()
    with torch.inference_mode():
        first, second = (extractor(torch.from_numpy(image)[None])[0] for image in images)
    for positions, constant in zip(match.maps, match.constants, strict=True):
        assert float(positions.sum()) + constant == pytest.approx(float(first @ second), abs=1e-5)


def test_a_whitening_is_a_part_of_the_match():
    torch.manual_seed(0)
    whitening = Whitening(torch.rand(8) / 9, torch.randn(4, 8))
    network = nn.Sequential(attach(nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU()).eval()), whitening)
    extractor = NetworkExtractor(network, lambda pixels: pixels.permute(0, 3, 1, 2) / 255, 4)
    first, second = (torch.from_numpy(scene(number, *place)[0]) for number, place in enumerate(PLACES))
    cosine = (extractor(first[None])[0] @ extractor(second[None])[0]).item()
    assert extractor.match(first, second).cosine == pytest.approx(cosine, abs=1e-6)


@pytest.fixture
def paths(tmp_path):
    for name, place in zip("ab", PLACES, strict=True):
        Image.fromarray(scene(0, *place)[0]).save(tmp_path / f"{name}.png")
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
