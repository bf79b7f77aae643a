"""Whitening of descriptors: PCA whitening, and discriminative whitening, which is learnt from labels.

Learning has two steps. `Moments` or `ClassMoments` accumulate statistics of blocks of descriptors, in float64
and in memory that does not grow with their number; `pca_whitening` or `discriminative_whitening` then returns
a `Whitening`, a module that maps descriptors to shorter ones of unit length.
Shapes: N descriptors, D dimensions, C classes; dim is the number of dimensions that are kept.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_tensor, values_can_be_seen

_BLOCK = 2048  # descriptors that are converted to float64 at a time
# Axes whose variance is below this share of the largest (a standard deviation below 1e-5 of it) are rounding errors.
_FLOOR = 1e-10


def whiten(x: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
    """Returns P (x - mean) for each descriptor x, not normalised. (N, D), (D,), (dim, D) -> (N, dim).

    It is computed in float32, also under autocast, or in the dtype of x if that is wider; the result has the
    dtype of x.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return whiten(x, mean, projection)
    work = torch.promote_types(x.dtype, torch.float32)
    centred = (x.to(work) - mean).to(work)  # a float64 mean is subtracted in float64
    return F.linear(centred, projection.to(work)).to(x.dtype)


class Whitening(nn.Module):
    """Maps descriptors to P (x - mean), L2-normalised, see :func:`whiten`. (N, D) -> (N, dim).

    A descriptor equal to the mean becomes all zeros. The tensors keep their dtype, which is float64 from
    :func:`pca_whitening` and :func:`discriminative_whitening`; ``.float()`` halves their memory.

    Args:
        mean: (D,), subtracted from each descriptor.
        projection: P, (dim, D), one axis per row.

    Raises:
        ValueError: if the shapes do not fit, or the values are not finite floating-point numbers.

    >>> import torch
    >>> Whitening(torch.zeros(3), torch.eye(3)[:2])(torch.tensor([[3.0, 4.0, 5.0]]))
    tensor([[0.6000, 0.8000]])
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, mean: Tensor, projection: Tensor):
        super().__init__()
        _check_finite(mean, "the mean of a whitening", "D")
        _check_finite(projection, "the projection of a whitening", "dim, D")
        if projection.shape[1] != len(mean):
            raise ValueError(
                f"the mean has {len(mean)} dimensions, but the projection takes {projection.shape[1]}: "
                f"its shape must be (dim, {len(mean)}), got {tuple(projection.shape)}"
            )
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("projection", projection.detach().clone())

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Whitening":
        """Returns the whitening of a state dict, as ``torch.load(file, weights_only=True)`` returns it.

        Args:
            state: exactly the tensors "mean" (D,) and "projection" (dim, D).

        Raises:
            ValueError: if there are other names, or the tensors do not form a whitening.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of a whitening must be a dict, got {type(state).__name__}")
        if set(state) != {"mean", "projection"}:
            raise ValueError(f"the state of a whitening must have mean and projection, got {sorted(map(str, state))}")
        return cls(state["mean"], state["projection"])

    @property
    def dim(self) -> int:
        """The number of dimensions of a whitened descriptor."""
        return self.projection.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(x, "Whitening", "N, D")
        if x.shape[1] != len(self.mean):
            raise ValueError(f"Whitening takes descriptors of {len(self.mean)} dimensions, got {x.shape[1]}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a length may overflow half precision
        return F.normalize(whiten(wide, self.mean, self.projection), dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.mean)} -> {self.dim}"


class Moments:
    """Accumulates the number, mean and covariance of descriptors block by block, in float64.

    The memory is D^2, independent of the number of descriptors. Each block is centred on its own mean before
    it is added, so that a mean far from 0 costs no accuracy.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.

    Args:
        dim: D.
        device: where the sums are computed and kept; it must support float64.

    >>> import torch
    >>> moments = Moments(dim=2).update(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).update(torch.tensor([[2.0, 3.0]]))
    >>> moments.mean
    tensor([2., 1.], dtype=torch.float64)
    >>> moments.covariance
    tensor([[1., 0.],
            [0., 3.]], dtype=torch.float64)
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)  # (D,)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean) (x - mean)^T

    def __repr__(self) -> str:
        return f"Moments({self.count} rows of {self.dim})"

    def update(self, rows: Tensor) -> "Moments":
        """Adds descriptors (n, D) of any floating dtype, and returns itself.

        Raises:
            ValueError: if the width is not D, or a value is not finite; nothing is added then.
        """
        _check_rows(rows, self.dim, "Moments")
        for block in rows.split(_BLOCK):
            block = block.to(self.mean.device, torch.float64)
            mean = block.mean(dim=0)
            centred = block - mean
            self._add(len(block), mean, centred.T @ centred)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Adds the moments of other descriptors, for example of another shard, and returns itself.

        Raises:
            ValueError: if the widths differ.
        """
        _check_widths(self, other)
        self._add(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))
        return self

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:  # an empty block has no mean
            return
        delta, share = mean - self.mean, count / (self.count + count)
        self.scatter += scatter + self.count * share * torch.outer(delta, delta)
        self.mean = self.mean + share * delta
        self.count += count

    @property
    def covariance(self) -> Tensor:
        """(D, D): the sum of (x - mean) (x - mean)^T, divided by N - 1.

        Raises:
            ValueError: if there are fewer than two descriptors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 descriptors, got {self.count}")
        return self.scatter / (self.count - 1)


class ClassMoments:
    """Accumulates the number and mean of each class's descriptors, and their scatter within classes, in float64.

    Descriptors and labels are added in blocks, in any order. The memory is D^2 + C D: it grows with the number
    of classes, not of descriptors. The accuracy is that of :class:`Moments`, class by class.

    Args:
        dim: D.
        device: where the sums are computed and kept; it must support float64.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 0.0], [5.0, 1.0], [3.0, 0.0]])
    >>> moments = ClassMoments(dim=2).update(rows, torch.tensor([7, 9, 7]))
    >>> moments
    ClassMoments(3 rows of 2 in 2 classes)
    >>> moments.within
    tensor([[2., 0.],
            [0., 0.]], dtype=torch.float64)
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.dim = dim
        self.within = torch.zeros(
            dim, dim, dtype=torch.float64, device=device
        )  # sum of (x - m) (x - m)^T, m its class's
        self.means = self.within.new_zeros(0, dim)  # (C, D)
        self.counts = self.within.new_zeros(0)  # (C,)
        self.places: dict[int, int] = {}  # the row of means and counts of each label

    def __repr__(self) -> str:
        return f"ClassMoments({self.count} rows of {self.dim} in {len(self.places)} classes)"

    def update(self, rows: Tensor, labels: Tensor) -> "ClassMoments":
        """Adds descriptors (n, D) of any floating dtype with integer labels (n,), and returns itself.

        Raises:
            ValueError: if the width is not D, a value is not finite, or the labels are not one integer per
                descriptor; nothing is added then.
        """
        _check_rows(rows, self.dim, "ClassMoments")
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"{len(rows)} descriptors need as many labels, got shape {tuple(labels.shape)}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        for block, own in zip(rows.split(_BLOCK), labels.split(_BLOCK), strict=True):
            block = block.to(self.means.device, torch.float64)
            names, inverse, counts = own.to(block.device).unique(return_inverse=True, return_counts=True)
            means = block.new_zeros(len(names), self.dim).index_add_(0, inverse, block) / counts[:, None]
            centred = block - means[inverse]
            self._add(names.tolist(), counts.to(means.dtype), means, centred.T @ centred)
        return self

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """Adds the moments of other descriptors, say of another shard; equal labels are one class. Returns itself.

        Raises:
            ValueError: if the widths differ.
        """
        _check_widths(self, other)
        gathered = [each.to(self.means.device) for each in (other.counts, other.means, other.within)]
        self._add(list(other.places), *gathered)
        return self

    def _add(self, labels: list[int], counts: Tensor, means: Tensor, within: Tensor) -> None:
        places = [self.places.setdefault(label, len(self.places)) for label in labels]
        fresh = len(self.places) - len(self.means)
        self.means = torch.cat([self.means, self.means.new_zeros(fresh, self.dim)])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(fresh)])
        place = torch.tensor(places, dtype=torch.int64, device=self.means.device)
        delta, share = means - self.means[place], (counts / (self.counts[place] + counts))[:, None]
        self.within += within + (delta * share * self.counts[place, None]).T @ delta
        self.means[place] += share * delta
        self.counts[place] += counts

    @property
    def count(self) -> int:
        """N, the number of descriptors of all classes."""
        return int(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        """(D,): the mean of all descriptors, each with the same weight.

        Raises:
            ValueError: if there is no descriptor.
        """
        if not self.count:
            raise ValueError("a mean needs at least 1 descriptor, got 0")
        return self.counts @ self.means / self.count

    @property
    def scatter(self) -> Tensor:
        """(D, D): the sum of (x - mean) (x - mean)^T over all descriptors, within and between classes."""
        centred = self.means - self.mean
        return self.within + (self.counts[:, None] * centred).T @ centred


def pca_whitening(mean: Tensor, covariance: Tensor, dim: int) -> Whitening:
    """Learns PCA whitening: P = diag(l)^(-1/2) E^T, with l the dim largest eigenvalues of the covariance, descending.

    E (D, dim) holds their eigenvectors. P (x - mean) has unit covariance over the descriptors behind the given
    covariance, as in scikit-learn's ``PCA(dim, whiten=True)``. The largest component of each axis is positive.

    Jégou and Chum, "Negative Evidences and Co-occurrences in Image Retrieval: the Benefit of PCA and Whitening",
    ECCV 2012.

    Args:
        mean: (D,).
        covariance: (D, D), divided by N - 1, as `Moments.covariance`.
        dim: number of dimensions that are kept.

    Raises:
        ValueError: if the shapes do not fit, a value is not finite, or dim is not between 1 and the number of
            axes along which the descriptors vary (with a variance above 1e-10 of the largest).

    >>> import torch
    >>> pca_whitening(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), dim=1).projection
    tensor([[0.4082, 0.4082]], dtype=torch.float64)
    """
    _check_finite(mean, "pca_whitening", "D")
    _check_finite(covariance, "pca_whitening", "D, D")
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"a mean of {len(mean)} dimensions needs a covariance of ({len(mean)}, {len(mean)}), "
            f"got {tuple(covariance.shape)}"
        )
    _check_dim(dim)
    values, axes = torch.linalg.eigh(covariance.double())  # ascending
    rank = _rank(values)
    if dim > rank:
        raise ValueError(
            f"the descriptors vary along {rank} of their {len(mean)} dimensions: dim can be {rank} at most, got {dim}"
        )
    values, axes = values.flip(0)[:dim], axes.flip(1)[:, :dim]
    return Whitening(mean.double(), _oriented((axes / values.sqrt()).T))


def discriminative_whitening(moments: ClassMoments, dim: int, shrinkage: float = 0.0) -> Whitening:
    """Learns the whitening of Radenović et al.: within classes, descriptors vary equally in all directions.

    The directions that are kept are those in which the descriptors then differ most.

    P = U^T C_S^(-1/2), with the eigenvectors U (D, dim) of C_S^(-1/2) C_D C_S^(-1/2) that have the largest
    eigenvalues, descending, and

        C_S = 1 / (N - C) * sum over matching pairs i < j of (x_i - x_j) (x_i - x_j)^T / n(i)
        C_D = 1 / N^2 * sum over all pairs i < j of (x_i - x_j) (x_i - x_j)^T

    A pair matches if both are of one class; n(i) is the size of that class. C_S equals the scatter within the
    classes, divided by N - C, and C_D the total scatter, divided by N, so that no pairs are needed to compute
    them. P (x - mean) has unit covariance within the classes. The largest component of each axis is positive.

    The paper sums over given pairs; with labels, a class of n descriptors has n (n - 1) / 2 pairs. Dividing by n
    gives the class the weight of its n descriptors, so that a large class does not dominate. C_D is over all
    pairs, as in the authors' own code. For classes of equal size the result equals the paper's formula, which
    sums C_D over the pairs that do not match: the two differ by a multiple of C_S, which leaves the axes
    unchanged, and by a factor, which the normalisation removes. A class of one descriptor has no matching pair
    and counts only in the mean and C_D.

    Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, sec. 3.4, after
    Mikolajczyk and Matas, "Improving Descriptors for Fast Tree Matching by Optimal Linear Projection", ICCV 2007.

    Args:
        moments: the moments of the descriptors and their classes.
        dim: number of dimensions that are kept. Without shrinkage at most C - 1, or D: classes differ in C - 1
            directions, and the choice among the others would be arbitrary.
        shrinkage: C_S becomes (1 - shrinkage) C_S + shrinkage tr(C_S) / D * I. If it is above 0, C_S is
            invertible even with fewer matching pairs than dimensions.

    Raises:
        ValueError: if there are fewer than two classes, no matching pair, or shrinkage is not in [0, 1]; if C_S
            is not invertible (it needs N - C >= D, or shrinkage); or if dim is out of range.

    >>> import torch
    >>> rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 0.0], [9.0, 0.0], [8.0, 2.0], [8.0, 0.0]])
    >>> moments = ClassMoments(dim=2).update(rows, torch.tensor([0, 0, 0, 1, 1, 1]))
    >>> discriminative_whitening(moments, dim=1)
    Whitening(2 -> 1)
    """
    count, classes, width = moments.count, len(moments.places), moments.dim
    if classes < 2 or count == classes:
        raise ValueError(
            "discriminative whitening needs at least two classes, and a class of more than one descriptor, "
            f"got {count} descriptors in {classes} classes"
        )
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be between 0 and 1, got {shrinkage}")
    _check_dim(dim)
    most = width if shrinkage else min(classes - 1, width)
    if dim > width or most < dim < width:
        others = f" (or all {width}, or give a shrinkage above 0)" if most < width else ""
        raise ValueError(
            f"{classes} classes of {width}-dimensional descriptors: dim can be {most} at most{others}, got {dim}"
        )
    intraclass = moments.within / (count - classes)  # C_S
    variance = intraclass.trace() / width
    intraclass = (1 - shrinkage) * intraclass + shrinkage * variance * torch.eye(width).to(intraclass)
    values, axes = torch.linalg.eigh(intraclass)
    rank = _rank(values)
    if rank < width:
        few = f" ({width + classes} descriptors are needed, got {count})" if count - classes < width else ""
        raise ValueError(
            f"matching pairs of {classes} classes differ along {rank} of {width} dimensions, but must along all{few}; "
            f"or give a shrinkage above {shrinkage:g}, such as 0.01"
        )
    inverse_root = (axes / values.sqrt()) @ axes.T  # C_S^(-1/2)
    _, axes = torch.linalg.eigh(inverse_root @ (moments.scatter / count) @ inverse_root)
    return Whitening(moments.mean, _oriented(axes.flip(1)[:, :dim].T @ inverse_root))


def _rank(values: Tensor) -> int:
    """Returns how many of the ascending eigenvalues are above rounding errors."""
    return int((values > _FLOOR * values[-1].clamp(min=0)).sum())


def _oriented(projection: Tensor) -> Tensor:
    """Returns the axes (dim, D), each with the sign that makes its largest component positive."""
    largest = projection.gather(1, projection.abs().argmax(dim=1, keepdim=True))
    return projection * largest.sign()


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")


def _check_finite(x: Tensor, taker: str, letters: str) -> None:
    check_tensor(x, taker, letters)
    if values_can_be_seen(x) and not all(block.isfinite().all() for block in x.split(_BLOCK)):
        raise ValueError(f"{taker}: values of shape {tuple(x.shape)} are not finite")


def _check_rows(rows: Tensor, dim: int, taker: str) -> None:
    _check_finite(rows, taker, "N, D")
    if rows.shape[1] != dim:
        raise ValueError(f"{taker} of {dim} dimensions got descriptors of {rows.shape[1]}")


def _check_widths(one: Moments | ClassMoments, other: Moments | ClassMoments) -> None:
    if one.dim != other.dim:
        raise ValueError(f"{one} cannot be merged with {other}: the dimensions differ")
