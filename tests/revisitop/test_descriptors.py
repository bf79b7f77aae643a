"""Saved descriptors with as many dimensions as images, some damaged, or with unit length along both axes."""

import numpy as np
import pytest
import scipy.io

from model.errors import InputError
from revisitop.dataset import Dataset
from revisitop.descriptors import load_descriptors
from revisitop.layouts import load_dataset

N = 24  # database images of the layout, and dimensions


@pytest.fixture
def dataset(layout) -> Dataset:
    return load_dataset("roxford5k", layout.data_dir)


def unit_rows(n: int) -> np.ndarray:
    rows = np.random.default_rng(n).standard_normal((n, N)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("bad", [0, np.nan, np.inf])
def test_a_damaged_image_of_a_square_array_is_named_for_rows_and_columns(dataset, tmp_path, bad):
    rows = unit_rows(N)
    rows[5] = bad
    for values in (rows, rows.T):
        np.savez(tmp_path / "features.npz", Q=unit_rows(3), X=values)
        with pytest.raises(InputError, match=r"database descriptors of .*: image 5 \(from 0\) has a zero or a number"):
            load_descriptors(tmp_path / "features.npz", dataset)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_rows_of_a_square_array_in_another_precision_are_recognised(dataset, tmp_path, dtype):
    rows = unit_rows(N)
    for values in (rows, rows.T):
        np.savez(tmp_path / "features.npz", Q=unit_rows(3), X=values.astype(dtype))
        np.testing.assert_allclose(load_descriptors(tmp_path / "features.npz", dataset)[1], rows, atol=1e-3)


def test_a_square_array_of_unit_length_both_ways_is_refused_and_read_after_the_advice(dataset, tmp_path):
    path, (rows, _) = tmp_path / "features.mat", np.linalg.qr(unit_rows(N))
    scipy.io.savemat(path, {"Q": unit_rows(3).T, "X": rows.T})
    with pytest.raises(InputError, match="both are of unit length, add a dimension of zeros"):
        load_descriptors(path, dataset)
    wider = [np.pad(each, ((0, 0), (0, 1))) for each in (unit_rows(3), rows)]
    scipy.io.savemat(path, {"Q": wider[0].T, "X": wider[1].T})
    np.testing.assert_array_equal(load_descriptors(path, dataset)[1], wider[1])
