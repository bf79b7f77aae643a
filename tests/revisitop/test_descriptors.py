"""Saved descriptors: their shapes and lengths, and whether they belong to the images of the dataset."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from model.errors import InputError
from revisitop.dataset import Dataset
from revisitop.descriptors import load_features
from revisitop.layouts import load_dataset

N = 24  # database images of the layout, and dimensions


@pytest.fixture
def dataset(layout) -> Dataset:
    return load_dataset("roxford5k", layout.data_dir)


def unit_rows(n: int) -> np.ndarray:
    rows = np.random.default_rng(n).standard_normal((n, N)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("bad", [0, np.nan, np.inf])
def test_a_damaged_image_is_named(dataset, tmp_path, bad):
    rows = unit_rows(N)
    rows[5] = bad
    np.savez(tmp_path / "features.npz", Q=unit_rows(3), X=rows)
    with pytest.raises(InputError, match="row 5"):
        load_features(tmp_path / "features.npz", dataset)


def test_a_square_array_has_rows_but_columns_in_matlab_and_is_refused_otherwise(dataset, tmp_path):
    rows = unit_rows(N)
    np.savez(tmp_path / "rows.npz", Q=unit_rows(3), X=rows.astype(np.float16))
    scipy.io.savemat(tmp_path / "columns.mat", {"Q": unit_rows(3).T, "X": rows.T})
    for name in ("rows.npz", "columns.mat"):
        np.testing.assert_allclose(load_features(tmp_path / name, dataset)[1], rows, atol=1e-3)
    np.savez(tmp_path / "columns.npz", Q=unit_rows(3), X=rows.T)
    with pytest.raises(InputError, match="unit length"):
        load_features(tmp_path / "columns.npz", dataset)


@pytest.fixture
def saved(dataset, tmp_path) -> Path:
    """A folder of descriptors with the labels of their images."""
    for kind, images in (("query", dataset.queries), ("db", dataset.database)):
        path = tmp_path / f"roxford5k_{kind}.npy"
        np.save(path, unit_rows(len(images)))
        np.savez(f"{path}.images.npz", labels=np.array([image.label(dataset.folder) for image in images]))
    return tmp_path


def test_descriptors_of_the_same_images_and_boxes_are_read(dataset, saved):
    database = load_features(saved, dataset).database
    np.testing.assert_array_equal(database, unit_rows(N))
    assert np.load(saved / "roxford5k_query.npy.images.npz")["labels"][1] == b"jpg/query_1.jpg|4,3,60,51"


@pytest.mark.parametrize(
    ("change", "noun"),
    [
        (lambda gnd: gnd["imlist"].reverse(), "image 0 .*db_0.*db_23"),
        (lambda gnd: gnd["imlist"].append("query_0"), "image 24 .*none.*query_0"),
        (lambda gnd: gnd["gnd"][2].update(bbx=[4, 3, 60, 50]), "image 2 "),
    ],
)
def test_descriptors_of_a_reordered_or_changed_list_are_refused(layout, saved, change, noun):
    change(layout.gnd)
    layout.write()
    with pytest.raises(InputError, match=noun):
        load_features(saved, load_dataset("roxford5k", layout.data_dir))


def test_queries_that_are_database_images_need_no_file_of_their_own(tmp_path):
    for name in ("a/0", "a/1", "b/0", "b/1", "b/2", "c/0"):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    rows = unit_rows(6)
    np.save(tmp_path / "pets_db.npy", rows)
    dataset = load_dataset("pets", tmp_path)
    for path in (tmp_path, tmp_path / "pets_db.npy"):
        found = load_features(path, dataset)
        np.testing.assert_allclose(found.database, rows, atol=1e-7)
        np.testing.assert_allclose(found.queries, rows[:5], atol=1e-7)
