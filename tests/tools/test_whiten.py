"""A command learns whitening, and an option applies it to descriptors."""

import json

import numpy as np
import oracles
import pytest
import torch
from conftest import kept, latest
from sklearn.decomposition import PCA
from torch.utils._python_dispatch import TorchDispatchMode

from model.errors import InputError
from model.whitening import load_whitening
from tools.whiten import class_moments, discriminative_whitening, pca_whitening, save_whitening

N, D = 300, 12


def some_rows(n: int = N, offset: float = 0.3) -> torch.Tensor:
    """Returns correlated descriptors whose mean is not 0, (n, D) float64."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=random, dtype=torch.float64) * torch.logspace(0, -2, D, dtype=torch.float64)
    return torch.randn(n, D, generator=random, dtype=torch.float64) @ mixing.T + offset


def some_classes(n: int = N, most: int = 20) -> torch.Tensor:
    """Returns classes of unequal sizes, one of a single descriptor, unsorted."""
    numbers = (most * torch.rand(n, generator=torch.Generator().manual_seed(9)).square()).long()
    numbers[7] = most
    return numbers.unique(return_inverse=True)[1]


def assert_axes_equal(got: torch.Tensor, expected: np.ndarray, atol: float) -> None:
    """Checks axes (dim, D) up to signs, which change no similarity."""
    expected = expected * np.sign((got.numpy() * expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float16, 0.3), (torch.float32, 0.3), (torch.float64, 0.3), (torch.float64, 2.0**20)]
)
@pytest.mark.parametrize("dim", [1, 5, D])
def test_pca_whitening_equals_scikit_learns(dim, dtype, offset):
    rows = some_rows(5000, offset).to(dtype)  # more than are added at a time
    whitening = pca_whitening(rows, dim)
    expected = PCA(dim, whiten=True, svd_solver="full").fit(rows.double().numpy())
    np.testing.assert_allclose(whitening.mean, expected.mean_, rtol=1e-12)
    axes = expected.components_ / np.sqrt(expected.explained_variance_)[:, None]
    assert_axes_equal(whitening.projection, axes, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 6, D])
@pytest.mark.parametrize("balanced", [True, False])
def test_discriminative_whitening_is_the_textbooks(dim, balanced):
    """In classes of equal size (not balanced), it is the paper's formula, too."""
    rows, classes = some_rows(90), some_classes(90) if balanced else torch.arange(90) % 15
    whitening = discriminative_whitening(rows, classes, dim)
    axes = whitening.projection / whitening.projection.norm()  # the oracle is without a factor
    expected = oracles.discriminative_projection(rows.numpy(), classes.numpy(), dim, balanced)
    assert_axes_equal(axes, expected / np.linalg.norm(expected), atol=1e-8)
    np.testing.assert_allclose(whitening.mean, rows.mean(dim=0), atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0, 0.1])
def test_within_their_classes_whitened_descriptors_have_unit_covariance(shrinkage):
    rows, classes = some_rows(), some_classes()
    members = [rows[classes == each].numpy() for each in range(classes.max() + 1)]
    within = sum(len(each) * np.cov(each.T, bias=True) for each in members) / (N - len(members))
    within = (1 - shrinkage) * within + shrinkage * np.trace(within) / D * np.eye(D)
    axes = discriminative_whitening(rows, classes, D, shrinkage).projection.numpy()
    np.testing.assert_allclose(axes @ within @ axes.T, np.eye(D), atol=1e-9)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest storage that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [each for each in (out if isinstance(out, tuple | list) else [out]) if isinstance(each, torch.Tensor)]
        self.bytes = max([self.bytes, *(each.untyped_storage().nbytes() for each in tensors)])
        return out


def test_memory_does_not_grow_with_the_number_of_descriptors():
    used = []
    for n in (4096, 12288):
        with LargestTensor() as largest:
            class_moments(torch.ones(1, D, dtype=torch.float16).expand(n, D), torch.tensor(1).expand(n))
        used.append(largest.bytes)
    assert used[0] == used[1]


def test_no_more_dimensions_are_kept_than_the_descriptors_vary_along():
    rows = some_rows()
    rows[:, 3] = 0.7
    assert pca_whitening(rows, D - 1).projection[:, 3].abs().max() < 1e-9
    assert pca_whitening(some_rows(5), 4).dim == 4
    for few, dim in ((rows, D), (some_rows(5), 5), (some_rows(1), 1), (torch.ones(9, D), 1), (rows, 0)):
        with pytest.raises(InputError):
            pca_whitening(few, dim)


def test_no_more_dimensions_are_kept_than_classes_differ_in():
    rows, few = some_rows(), some_classes(most=4)
    assert [discriminative_whitening(rows, few, dim).dim for dim in (4, D)] == [4, D]
    assert discriminative_whitening(rows, few, 5, shrinkage=0.1).dim == 5
    for dim, shrinkage in ((0, 0), (5, 0), (D + 1, 0), (D + 1, 0.1)):
        with pytest.raises(InputError, match="dim"):
            discriminative_whitening(rows, few, dim, shrinkage)


def test_shrinkage_whitens_where_pairs_are_few():
    rows, classes = some_rows(10), torch.arange(10) % 4
    with pytest.raises(InputError, match=r"6 of 12 .*shrinkage"):
        discriminative_whitening(rows, classes, 3)
    assert discriminative_whitening(rows, classes, D - 1, shrinkage=0.1).dim == D - 1
    for useless in (torch.zeros(10, dtype=torch.int64), torch.arange(10)):
        with pytest.raises(InputError, match="classes"):
            discriminative_whitening(rows, useless, 3, shrinkage=0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_descriptor_that_is_not_finite_is_named(value):
    rows = some_rows(5000)
    rows[4990, 2] = value
    with pytest.raises(InputError, match="4990"):
        pca_whitening(rows, 2)


def test_a_saved_whitening_and_its_provenance_are_loaded_unchanged(tmp_path):
    whitening = pca_whitening(some_rows(), 4)
    for name in ("a.pth", "b.pth"):
        save_whitening(tmp_path / name, whitening, {"kind": "PCA"})
    loaded, learnt_from = load_whitening(tmp_path / "a.pth")
    assert torch.equal(loaded(some_rows()), whitening(some_rows()))
    assert learnt_from == {"kind": "PCA"}
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    with pytest.raises(InputError):
        save_whitening(tmp_path / "none" / "a.pth", whitening, {})


@pytest.fixture
def words(layout, two_layers) -> tuple:
    return ("TEST.DATA_DIR", layout.data_dir, *two_layers)


def test_a_whitening_of_a_dataset_is_pca_applied_and_labelled(command, words, tmp_path):
    output = tmp_path / "work" / "output"
    learn = ("tools/whiten.py", "--from", "roxford5k", "--out", "w.pth", *words)
    outcome = command(*learn, "--dim", 8)
    assert outcome.code == 0, outcome.err
    for wrong in (("--dim", 100), ("--dim", 0), ("--dim", 8, "--discriminative"), ("--dim", 8, "--shrinkage", 0.1)):
        assert command(*learn, *wrong).code == 2
    words = (*words, "TEST.DATASET_LIST", "roxford5k")
    assert command("test.py", *words).out.count(": reused") == 1  # the database's descriptors
    plain = np.load(kept(output, "roxford5k") / "roxford5k_db.npy")
    outcome = command("test.py", *words, "MODEL.WHITENING", "w.pth")
    assert outcome.code == 0, outcome.err
    assert "was learnt on the database of roxford5k itself" in outcome.out
    rows = np.load(kept(output, "roxford5k") / "roxford5k_db.npy")
    expected = PCA(8, whiten=True, svd_solver="full").fit_transform(plain.astype(np.float64))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(rows * np.sign((rows * expected).sum(axis=0)), expected, atol=1e-4)
    entry = json.loads((latest(output) / "results.json").read_text())["datasets"]["roxford5k"]
    assert entry["whitening"]["learnt_on_the_test_set"] is True
    table = command("tools/tables.py", "main", *words, "MODEL.WHITENING", "w.pth")
    assert "whitening learnt on this database itself" in table.out


def test_a_file_of_descriptors_and_one_of_classes_make_a_discriminative_whitening(command, tmp_path, words):
    rng = np.random.default_rng(0)
    classes = np.arange(200) % 40
    noise = rng.standard_normal((200, 20)) * np.logspace(0.5, -1.5, 20)  # largest where classes differ least
    rows = (rng.standard_normal((40, 20)) * np.logspace(-1, 0.5, 20))[classes] + noise
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    (tmp_path / "classes.txt").write_text("".join(f"class {each}\n" for each in classes))
    learn = ("tools/whiten.py", "--from", tmp_path / "rows.npy", "--out", "w.pth", "--dim", 6)
    outcome = command(*learn, "--labels", tmp_path / "classes.txt")
    assert outcome.code == 0, outcome.err
    white, learnt_from = load_whitening(tmp_path / "work" / "w.pth")
    assert (learnt_from["kind"], learnt_from["count"]) == ("discriminative", 200)

    def nearest_match(x):
        return (classes[(x @ x.T - 9 * np.eye(200)).argmax(axis=1)] == classes).mean()

    assert nearest_match(rows) < 0.8 < 0.9 < nearest_match(white(torch.from_numpy(rows)).numpy())
    outcome = command("test.py", *words, "TEST.DATASET_LIST", "roxford5k", "MODEL.WHITENING", "w.pth")
    assert outcome.code == 2
    assert "w.pth" in outcome.err
    (tmp_path / "classes.txt").write_text("one\n")
    outcome = command(*learn, "--labels", tmp_path / "classes.txt")
    assert outcome.code == 2
    assert "classes.txt" in outcome.err
