import numpy as np
import oracles
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from modules.whitening import ClassMoments, Moments, Whitening, discriminative_whitening, pca_whitening, whiten

N, D = 300, 12


def some_rows(seed: int = 0, n: int = N) -> torch.Tensor:
    """Returns correlated descriptors whose mean is not 0, (n, D) float64."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=random, dtype=torch.float64) * torch.logspace(0, -2, D, dtype=torch.float64)
    return torch.randn(n, D, generator=random, dtype=torch.float64) @ mixing.T + 0.3


def some_labels(n: int = N, classes: int = 20) -> torch.Tensor:
    """Returns descriptors of classes of unequal sizes, unsorted, with labels other than 0, 1, 2."""
    random = torch.Generator().manual_seed(9)
    return 1000 - 7 * (classes * torch.rand(n, generator=random).square()).long()


def gathered(rows: torch.Tensor, labels: torch.Tensor | None = None) -> Moments | ClassMoments:
    return Moments(D).update(rows) if labels is None else ClassMoments(D).update(rows, labels)


def assert_equal_up_to_sign(got: torch.Tensor, expected: np.ndarray, atol: float = 1e-5) -> None:
    expected = torch.from_numpy(expected)
    torch.testing.assert_close(got * (got * expected).sum(dim=0).sign(), expected, atol=atol, rtol=0)


def assert_same_direction(got: torch.Tensor, expected: np.ndarray) -> None:
    """Checks that the axes are equal up to signs and a common factor."""
    assert_equal_up_to_sign((got / got.norm()).T, (expected / np.linalg.norm(expected)).T, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 5, D])
def test_pca_whitening_equals_scikit_learns(dim):
    rows, new = some_rows(), some_rows(seed=1, n=7)
    moments = Moments(D).update(rows)
    whitening = pca_whitening(moments.mean, moments.covariance, dim)
    expected = PCA(dim, whiten=True).fit(rows.numpy()).transform(new.numpy())
    assert_equal_up_to_sign(whiten(new, whitening.mean, whitening.projection), expected)
    assert_equal_up_to_sign(whitening(new), expected / np.linalg.norm(expected, axis=1, keepdims=True))


def test_float32_descriptors_are_whitened_as_scikit_learn_does():
    rows = normalize(some_rows().float(), dim=1)
    moments = Moments(D).update(rows)
    whitening = pca_whitening(moments.mean, moments.covariance, 6)
    expected = PCA(6, whiten=True).fit(rows.double().numpy()).transform(rows.double().numpy())
    got = whiten(rows, whitening.mean, whitening.projection)
    assert got.dtype == torch.float32
    assert_equal_up_to_sign(got.double(), expected)


def test_whitened_descriptors_have_unit_covariance():
    rows = some_rows()
    moments = Moments(D).update(rows)
    whitening = pca_whitening(moments.mean, moments.covariance, 8)
    white = whiten(rows, whitening.mean, whitening.projection)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(8, dtype=torch.float64), atol=1e-9, rtol=0)


def test_within_their_classes_descriptors_have_unit_covariance():
    rows, labels = some_rows(), some_labels()
    moments = ClassMoments(D).update(rows, labels)
    whitening = discriminative_whitening(moments, D)
    white = whiten(rows, whitening.mean, whitening.projection)
    within = ClassMoments(D).update(white, labels).within / (N - len(labels.unique()))
    torch.testing.assert_close(within, torch.eye(D, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_largest_component_of_each_axis_is_positive():
    rows, labels = some_rows(), some_labels()
    moments = Moments(D).update(rows)
    for whitening in (
        pca_whitening(moments.mean, moments.covariance, D),
        discriminative_whitening(ClassMoments(D).update(rows, labels), D),
    ):
        axes = whitening.projection
        assert (axes.amax(dim=1) == axes.abs().amax(dim=1)).all()


@pytest.mark.parametrize("labels", [None, some_labels(5000), some_labels(5000).sort().values])
def test_uneven_blocks_and_shards_give_the_result_of_one_block(labels):
    rows = some_rows(n=5000)  # more than are added at a time
    sizes = [1, 0, 999, 3000, 1000]
    parts = [rows.split(sizes)] if labels is None else [rows.split(sizes), labels.split(sizes)]
    kind, own = (Moments, []) if labels is None else (ClassMoments, [labels])
    one, blocks, shards = kind(D).update(rows, *own), kind(D), [kind(D), kind(D), kind(D)]
    for number, part in enumerate(zip(*parts, strict=True)):
        blocks.update(*part)
        shards[number % 2].update(*part)
    merged = shards[2].merge(shards[0]).merge(shards[1])  # into an empty one
    for other in (blocks, merged, merged.merge(kind(D))):
        assert repr(other) == repr(one)
        torch.testing.assert_close(other.mean, one.mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(other.scatter, one.scatter, atol=0, rtol=1e-9)
        if labels is not None:
            torch.testing.assert_close(other.within, one.within, atol=0, rtol=1e-9)


def test_moments_equal_numpys():
    rows, labels = some_rows(), some_labels()
    moments, classes = Moments(D).update(rows), ClassMoments(D).update(rows, labels)
    within = sum(
        np.cov(rows[labels == label].numpy().T, bias=True) * (labels == label).sum().item() for label in labels.unique()
    )
    for got, expected in [
        (moments.mean, rows.numpy().mean(axis=0)),
        (moments.covariance, np.cov(rows.numpy().T)),
        (classes.mean, rows.numpy().mean(axis=0)),
        (classes.scatter / (N - 1), np.cov(rows.numpy().T)),
        (classes.within, within),
    ]:
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("labels", [None, some_labels()])
def test_a_mean_far_from_0_costs_no_accuracy(labels):
    rows = some_rows().mul(2**20).round() / 2**20  # exact with the offset, too
    offset = 2.0**20
    near, far = gathered(rows, labels), gathered(rows[:100] + offset, labels if labels is None else labels[:100])
    far.update(rows[100:] + offset, *([] if labels is None else [labels[100:]]))
    torch.testing.assert_close(far.mean - offset, near.mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(far.scatter, near.scatter, atol=1e-6, rtol=0)
    if labels is not None:
        torch.testing.assert_close(far.within, near.within, atol=1e-6, rtol=0)


@pytest.mark.parametrize("labels", [None, some_labels()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_descriptors_of_any_dtype_are_added_in_float64(labels, dtype):
    rows = (some_rows() * 300).to(dtype)  # whose squares overflow half precision
    torch.testing.assert_close(gathered(rows, labels).scatter, gathered(rows.double(), labels).scatter)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest storage that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("labelled", [False, True])
def test_memory_does_not_grow_with_the_number_of_descriptors(labelled):
    used = []
    for n in (4096, 12288):
        rows = torch.ones(1, D, dtype=torch.float16).expand(n, D)
        labels = torch.tensor(3).expand(n) if labelled else None
        with LargestTensor() as largest:
            moments = gathered(rows, labels)
        kept = [value for value in vars(moments).values() if isinstance(value, torch.Tensor)]
        used.append((largest.bytes, sum(value.numel() for value in kept)))
    assert used[0] == used[1]


def test_a_constant_dimension_is_not_an_axis():
    rows = some_rows()
    rows[:, 3] = 0.7
    moments = Moments(D).update(rows)
    whitening = pca_whitening(moments.mean, moments.covariance, D - 1)
    torch.testing.assert_close(whitening.projection[:, 3], torch.zeros(D - 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"vary along {D - 1} of their {D} dimensions: dim can be {D - 1} at most"):
        pca_whitening(moments.mean, moments.covariance, D)


def test_few_descriptors_have_fewer_axes():
    moments = Moments(D).update(some_rows(n=5))
    assert pca_whitening(moments.mean, moments.covariance, 4).dim == 4
    with pytest.raises(ValueError, match="dim can be 4 at most, got 5"):
        pca_whitening(moments.mean, moments.covariance, 5)


@pytest.mark.parametrize(
    ("covariance", "dim", "message"),
    [
        (torch.eye(3), 0, "at least 1, got 0"),
        (torch.zeros(3, 3), 1, "dim can be 0 at most, got 1"),
        (torch.eye(2), 1, r"mean of 3 dimensions needs a covariance of \(3, 3\), got \(2, 2\)"),
        (torch.full((3, 3), torch.inf), 1, r"shape \(3, 3\) are not finite"),
    ],
)
def test_pca_whitening_rejects_invalid_input(covariance, dim, message):
    with pytest.raises(ValueError, match=message):
        pca_whitening(torch.zeros(3), covariance, dim)


@pytest.mark.parametrize("dim", [1, 6, D])
def test_discriminative_whitening_is_the_textbooks(dim):
    rows, labels = some_rows(n=90), some_labels(90)
    assert labels.unique(return_counts=True)[1].min() == 1  # also a class of one
    got = discriminative_whitening(ClassMoments(D).update(rows, labels), dim).projection
    assert_same_direction(got, oracles.discriminative_projection(rows.numpy(), labels.numpy(), dim, balanced=True))


def test_in_classes_of_equal_size_it_is_the_papers_formula():
    rows, labels = some_rows(n=75), torch.arange(75) % 15
    got = discriminative_whitening(ClassMoments(D).update(rows, labels), 5).projection
    assert_same_direction(got, oracles.discriminative_projection(rows.numpy(), labels.numpy(), 5, balanced=False))


def test_matching_descriptors_become_more_similar():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 20
    noise = torch.randn(200, D, generator=random) * torch.logspace(1, -1, D)  # largest where classes differ least
    rows = (torch.randn(20, D, generator=random) * torch.logspace(-1, 1, D))[labels] + noise
    white = discriminative_whitening(ClassMoments(D).update(rows, labels), 6)(rows)

    def nearest_match(x):
        return (labels[(x @ x.T).fill_diagonal_(-1).argmax(dim=1)] == labels).float().mean()

    assert nearest_match(normalize(rows, dim=1)) < 0.6 < 0.9 < nearest_match(white)


def test_shrinkage_whitens_where_pairs_are_few():
    rows, labels = some_rows(n=10), torch.arange(10) % 4
    moments = ClassMoments(D).update(rows, labels)
    with pytest.raises(
        ValueError, match=r"4 classes differ along 6 of 12 dimensions.*16 descriptors are needed, got 10"
    ):
        discriminative_whitening(moments, 3)
    whitening = discriminative_whitening(moments, D - 1, shrinkage=0.1)
    intraclass = moments.within / 6
    shrunk = 0.9 * intraclass + 0.1 * intraclass.trace() / D * torch.eye(D, dtype=torch.float64)
    got = whitening.projection @ shrunk @ whitening.projection.T
    torch.testing.assert_close(got, torch.eye(D - 1, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_dimension_that_is_constant_within_classes_is_rejected():
    rows, labels = some_rows(), some_labels()
    rows[:, 3] = labels.double()
    with pytest.raises(ValueError, match="along 11 of 12 dimensions, but must along all; or give a shrinkage above 0"):
        discriminative_whitening(ClassMoments(D).update(rows, labels), 3)


def test_no_more_dimensions_than_classes_differ_in():
    moments = ClassMoments(D).update(some_rows(), some_labels(classes=5))
    assert discriminative_whitening(moments, 4).dim == 4
    assert discriminative_whitening(moments, D).dim == D
    with pytest.raises(ValueError, match=r"dim can be 4 at most \(or all 12, .*\), got 5"):
        discriminative_whitening(moments, 5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        discriminative_whitening(moments, 0)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (torch.zeros(N, dtype=torch.int32), {}, f"got {N} descriptors in 1 classes"),
        (torch.arange(N), {}, f"got {N} descriptors in {N} classes"),
        (some_labels(), {"shrinkage": -0.1}, "between 0 and 1, got -0.1"),
        (some_labels(), {"dim": D + 1, "shrinkage": 0.1}, "dim can be 12 at most, got 13"),
    ],
)
def test_discriminative_whitening_rejects_invalid_input(labels, settings, message):
    with pytest.raises(ValueError, match=message):
        discriminative_whitening(ClassMoments(D).update(some_rows(), labels), **{"dim": 2, **settings})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(N), "integers, got torch.float32"),
        (torch.zeros(N, dtype=torch.bool), "integers, got torch.bool"),
        (torch.zeros(N - 1, dtype=torch.int64), rf"{N} descriptors need as many labels, got shape \({N - 1},\)"),
    ],
)
def test_invalid_labels_are_rejected(labels, message):
    with pytest.raises(ValueError, match=message):
        ClassMoments(D).update(some_rows(), labels)


@pytest.mark.parametrize("labels", [None, some_labels(5000)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_descriptors_that_are_not_finite_are_not_added(labels, value):
    rows = some_rows(n=5000)
    rows[4990, 2] = value
    moments = Moments(D) if labels is None else ClassMoments(D)
    with pytest.raises(ValueError, match=r"Moments.*(NaN|not finite)"):
        moments.update(rows, *([] if labels is None else [labels]))
    assert moments.count == 0


@pytest.mark.parametrize(("kind", "labels"), [(Moments, []), (ClassMoments, [torch.zeros(2, dtype=torch.int64)])])
def test_different_widths_are_rejected(kind, labels):
    with pytest.raises(ValueError, match="Moments of 3 dimensions got descriptors of 4"):
        kind(3).update(torch.ones(2, 4), *labels)
    with pytest.raises(ValueError, match=r"rows of 3.*rows of 4.*dimensions differ"):
        kind(3).merge(kind(4))


def test_too_few_descriptors_have_no_covariance_or_mean():
    with pytest.raises(ValueError, match="at least 2 descriptors, got 1"):
        _ = Moments(D).update(some_rows(n=1)).covariance
    with pytest.raises(ValueError, match="at least 1 descriptor, got 0"):
        _ = ClassMoments(D).mean


def a_whitening() -> Whitening:
    moments = Moments(D).update(some_rows())
    return pca_whitening(moments.mean, moments.covariance, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whitened_descriptors_have_unit_length_and_their_dtype(dtype):
    x, whitening = some_rows(seed=2, n=6).to(dtype), a_whitening()
    out = whitening(x)
    assert (out.shape, out.dtype) == ((6, 4), dtype)
    expected = normalize((x.double() - whitening.mean) @ whitening.projection.T, dim=1)
    torch.testing.assert_close(out, expected.to(dtype), atol=2e-6, rtol=torch.finfo(dtype).eps)
    torch.testing.assert_close(whitening.float()(x), out, atol=2e-5, rtol=torch.finfo(dtype).eps)


def test_half_precision_does_not_overflow():
    whitening = Whitening(torch.zeros(2), torch.tensor([[1e4, 0.0], [0.0, 1e4]]))
    out = whitening(torch.tensor([[300.0, 400.0]], dtype=torch.float16))
    torch.testing.assert_close(out.float(), torch.tensor([[0.6, 0.8]]), atol=1e-3, rtol=0)


def test_autocast_changes_nothing():
    x, whitening = some_rows(seed=2, n=6).float(), a_whitening().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = whitening(x)
    assert torch.equal(inside, whitening(x))


def test_a_descriptor_does_not_depend_on_its_batch_which_may_be_empty():
    x, whitening = some_rows(n=6), a_whitening()
    torch.testing.assert_close(torch.cat([whitening(row[None]) for row in x]), whitening(x))
    assert whitening(x[:0]).shape == (0, 4)


def test_the_mean_becomes_zeros():
    whitening = a_whitening()
    assert torch.equal(whitening(whitening.mean[None]), torch.zeros(1, 4, dtype=torch.float64))


def test_a_whitening_says_its_widths():
    assert repr(a_whitening()) == "Whitening(12 -> 4)"
    with pytest.raises(ValueError, match="Whitening takes descriptors of 12 dimensions, got 13"):
        a_whitening()(torch.ones(2, 13))


def test_a_saved_whitening_is_loaded_unchanged(tmp_path):
    whitening = a_whitening()
    torch.save(whitening.state_dict(), tmp_path / "whitening.pt")
    state = torch.load(tmp_path / "whitening.pt", weights_only=True)
    loaded = Whitening.from_state(state)
    filled = Whitening(torch.zeros(D), torch.zeros(4, D)).double()
    filled.load_state_dict(state)
    x = some_rows(seed=2, n=6)
    assert torch.equal(loaded(x), whitening(x))
    assert torch.equal(filled(x), whitening(x))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.zeros(3)], "must be a dict, got list"),
        ({"mean": torch.zeros(3)}, r"mean and projection, got \['mean'\]"),
        ({"mean": torch.zeros(3), "projection": torch.zeros(2, 3), "P": 1}, r"got \['P', 'mean', 'projection'\]"),
        ({"mean": torch.zeros(3), "projection": [[1.0]]}, r"projection .* tensor \(dim, D\), got list"),
        ({"mean": torch.zeros(1, 3), "projection": torch.zeros(2, 3)}, r"mean .* tensor \(D\), got shape \(1, 3\)"),
        ({"mean": torch.zeros(3), "projection": torch.zeros(0, 3)}, r"non-empty tensor .*got shape \(0, 3\)"),
        ({"mean": torch.zeros(3), "projection": torch.ones(3, 2)}, r"3 dimensions, .* takes 2: .*\(dim, 3\)"),
        ({"mean": torch.zeros(3), "projection": torch.zeros(2, 3).long()}, "a floating-point tensor, got torch.int64"),
        ({"mean": torch.full((3,), torch.inf), "projection": torch.zeros(2, 3)}, "mean .* not finite"),
    ],
)
def test_an_invalid_state_of_a_whitening_is_rejected(state, message):
    with pytest.raises(ValueError, match=message):
        Whitening.from_state(state)
