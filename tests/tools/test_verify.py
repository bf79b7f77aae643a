"""tools.verify and tools.check: what they tick, and what they find wrong."""

import json

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from config import make_config
from extraction.images import ImageFile
from revisitop.layouts import load_dataset
from tools.check import Finding, check_boxes, check_dataset, check_lists, check_sizes, read_images
from tools.verify import PRODUCT_ERROR, check_datasets, check_weights, product_error


def findings_of(layout) -> list[Finding]:
    """Returns the findings about the small dataset, as if it were a published one."""
    layout.write()
    dataset = load_dataset(layout.name, layout.data_dir)
    headers, _ = read_images([image.path for image in dataset.images()])
    known = {"queries": 3, "images": 24}
    return [*check_lists(dataset, known), check_boxes(dataset, headers), check_sizes(dataset, headers, 80)]


def change(layout, names, make) -> None:
    for name in names:
        path = layout.image(name)
        make(Image.open(path)).save(path)


def test_a_complete_dataset_gets_ticks_that_rule_mistakes_out(layout):
    found = findings_of(layout)
    assert all(finding.ok for finding in found)
    assert {mistake for finding in found for mistake in finding.mistakes} == {"junk", "no crop", "resized"}


def remove_junk(layout):
    for truth in layout.gnd["gnd"]:
        truth["junk"] = []


def widen_boxes(layout):
    for truth in layout.gnd["gnd"]:
        truth["bbx"] = [0, 0, 80, 60]


def remove_an_image(layout):
    layout.gnd["imlist"].append("another")


def rotate_queries(layout):
    for truth in layout.gnd["gnd"]:
        truth["bbx"] = [4, 3, 75, 50]
    change(layout, layout.gnd["qimlist"], lambda image: image.rotate(90, expand=True))


def halve_images(layout):
    change(layout, layout.gnd["qimlist"] + layout.gnd["imlist"], lambda image: image.reduce(2))


@pytest.mark.parametrize(
    ("harm", "mistake"),
    [(remove_junk, "junk"), (widen_boxes, "no crop"), (rotate_queries, "EXIF"), (halve_images, "resized"),
     (remove_an_image, None)],
)  # fmt: skip
def test_a_mistake_in_the_data_is_found(layout, harm, mistake):
    harm(layout)
    wrong = [finding for finding in findings_of(layout) if not finding.ok]
    assert wrong
    assert mistake is None or mistake in {name for finding in wrong for name in finding.mistakes}


def test_other_counts_than_the_published_ones_are_wrong(layout):
    first = next(check_dataset(load_dataset(layout.name, layout.data_dir)))
    assert first.ok is False
    assert "4,993" in first.text


def test_damaged_images_are_named_and_turned_ones_counted(layout):
    turned, cut = layout.image("db_3"), layout.image("db_5")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(turned).save(turned, exif=exif)
    cut.write_bytes(cut.read_bytes()[:-20])
    headers, damaged = read_images([layout.image(name) for name in layout.gnd["imlist"]])
    assert headers[turned][:2] == ImageFile(turned).read().shape[1::-1] == (60, 80)
    assert sum(header.turned for header in headers.values()) == 1
    assert [str(cut) in problem for problem in damaged] == [True]


def test_images_that_a_run_reads_without_their_end_are_no_problem(layout, command):
    cut = layout.image("db_5")
    cut.write_bytes(cut.read_bytes()[:-20])
    words = ("roxford5k", "TEST.DATA_DIR", layout.data_dir)
    refused, read = (command("tools/check.py", *words, *more) for more in ((), ("DATA_LOADER.TRUNCATED",)))
    assert str(cut) in refused.out
    assert "cannot be used" not in read.out


def test_published_descriptors_check_the_ground_truth(layout):
    rows = np.random.default_rng(0).standard_normal((27, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    path = layout.data_dir / "roxford5k_resnet_rsfm120k_gem.mat"
    scipy.io.savemat(path, {"Q": rows[:3].T, "X": rows[3:].T})
    cfg = make_config([("TEST.DATA_DIR", str(layout.data_dir)), ("TEST.DATASET_LIST", "roxford5k")])
    (found,) = [finding for finding in check_datasets(cfg) if path.name in finding.text]
    assert found.ok is False
    assert "84.81 / 64.67 / 38.47" in found.text


def test_checkpoints_are_loaded_with_their_depth_and_power(checkpoint_50):
    cfg = make_config([("TEST.WEIGHTS", str(checkpoint_50.parent))])
    known, missing = check_weights(cfg)
    assert known.ok
    assert "ResNet-50" in known.text
    assert "3.000" in known.text
    assert missing.ok is None
    assert check_weights(make_config([("TEST.WEIGHTS", str(checkpoint_50))])) == [known]


def test_a_checkpoint_of_another_network_or_a_damaged_one_is_wrong(checkpoint_50, tmp_path):
    (tmp_path / "CVPR2022_CVNet_R50.pyth").write_bytes(b"damaged")
    (tmp_path / "CVPR2022_CVNet_R101.pyth").symlink_to(checkpoint_50)
    right, wrong = check_weights(make_config([("TEST.WEIGHTS", str(tmp_path))]))
    assert right.ok  # R50, under the other's name
    assert wrong.ok is False
    (tmp_path / "CVPR2022_CVNet_R101.pyth").unlink()
    damaged, missing = check_weights(make_config([("TEST.WEIGHTS", str(tmp_path))]))
    assert damaged.ok is False
    assert missing.ok is None


def test_products_in_less_than_float32_are_noticed():
    cpu = torch.device("cpu")
    assert product_error(cpu) < PRODUCT_ERROR
    with torch.autocast("cpu", torch.bfloat16):
        assert product_error(cpu) > 1e-4


@pytest.mark.slow  # draws a checkpoint, and computes descriptors in three precisions
def test_a_new_machine_gets_ticks_without_data_and_weights(command):
    outcome = command("tools/verify.py", "--json")
    assert outcome.code == 0, outcome.err
    sections = json.loads(outcome.out)
    for name in ("descriptors", "protocol", "environment"):
        assert all(finding["ok"] for finding in sections[name]), sections[name]
    assert all(finding["ok"] is None for name in ("datasets", "weights") for finding in sections[name])
