"""Learn a whitening of descriptors, for MODEL.WHITENING: fewer dimensions, each of the same variance.

python -m tools.whiten --from roxford5k --dim 512 --out whitening.pth
python -m tools.whiten --from holiday/ --dim 512 --out whitening.pth --weights ./weights
python -m tools.whiten --from rows.npy --dim 512 --out whitening.pth

--from takes the name of a dataset (its database; a folder in TEST.DATA_DIR), a folder of images, or a file of
descriptors, (N, D): .npy, .npz, .mat, .pth or HDF5. The default is PCA whitening. With --labels FILE (a class per line
and row), or with --discriminative for a dataset in class folders, directions in which images of one class differ are
shortened.
The memory does not grow with the number of descriptors.

Jégou and Chum, "Negative Evidences and Co-occurrences in Image Retrieval", ECCV 2012; Radenović et al., TPAMI 2018.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from tqdm import tqdm

from assembly import Session, extract, find_recipe, image_folder_set, option, prepare, start_session
from config import DATASET, LOADING, NETWORK, CommandLine, Parsed
from extraction.files import jsonable, write_atomically
from extraction.folder import find_images
from model.errors import InputError
from modules.whitening import Whitening
from report.command import run_command
from revisitop.descriptors import load_rows, unit_rows

log = logging.getLogger(__name__)

_ROWS = 2048  # descriptors that are converted to float64 at a time
# Axes whose variance is below this share of the largest (a standard deviation below 1e-5 of it) are rounding errors.
_FLOOR = 1e-10


def main(argv: list[str]) -> None:
    args, cfg, _ = parse(argv)
    kind = "discriminative" if args.labels or args.discriminative else "PCA"
    if args.dim < 1 or not 0 <= args.shrinkage <= 1:
        raise InputError(f"--dim must be at least 1, --shrinkage 0 to 1; got {args.dim} and {args.shrinkage:g}")
    if kind == "PCA" and args.shrinkage:
        raise InputError("--shrinkage has no effect on PCA whitening; give --labels FILE or --discriminative")
    rows, classes, learnt_from = descriptors(args.source, start_session(cfg))
    if args.labels:
        with option(f"--labels {args.labels}"):
            classes = read_classes(args.labels, len(rows))
    if kind == "discriminative" and classes is None:
        raise InputError(f"--discriminative needs classes, which {args.source} does not have; give --labels FILE")
    with option(f"--from {args.source}"):
        if kind == "PCA":
            whitening = pca_whitening(rows, args.dim)
        else:
            whitening = discriminative_whitening(rows, classes, args.dim, args.shrinkage)
    save_whitening(args.out, whitening, {**learnt_from, "kind": kind, "count": len(rows)})
    log.info("%s: %s whitening, %d to %d dimensions, from %d descriptors of %s",
             args.out, kind, rows.shape[1], args.dim, len(rows), args.source)  # fmt: skip


def save_whitening(path: Path, whitening: Whitening, learnt_from: dict[str, Any]) -> None:
    """Saves a whitening and its provenance, for model.whitening.load_whitening.

    Raises:
        InputError: if the file cannot be written.
    """
    content = {**whitening.state_dict(), "learnt_from": jsonable(learnt_from)}
    write_atomically(path, lambda file: torch.save(content, file))


def parse(argv: list[str]) -> Parsed:
    uses = (*NETWORK, *LOADING, *DATASET, "TEST.OUT_DIR", "TEST.DEVICE", "TEST.RESUME")
    line = CommandLine(__doc__, uses, {"MODEL.WHITENING": "a whitening is learnt from descriptors without whitening"})
    line.add("--from", dest="source", required=True, metavar="NAME|FOLDER|FILE", help="source of the descriptors")
    line.add("--dim", type=int, required=True, metavar="N", help="number of dimensions to keep")
    line.add("--out", type=Path, required=True, metavar="FILE", help="file for the whitening")
    line.add("--labels", type=Path, metavar="FILE", help="the class of each descriptor, a line each")
    line.add("--discriminative", action="store_true", help="use the classes of a dataset in class folders")
    line.add("--shrinkage", type=float, default=0.0, metavar="S", help="0 to 1, for few descriptors per class [0]")
    line.add_weights()
    return line.parse(argv)


def descriptors(source: str, session: Session) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Returns the descriptors (N, D), their classes (N,) if the source has some, and their provenance."""
    path = Path(source)
    if path.is_file():
        return unit_rows(load_rows(path), source), None, {"source": source}
    cfg, output, device = session.cfg, session.output, session.device
    if path.is_dir() and "/" in source:
        recipe = find_recipe(cfg)
        images = image_folder_set(path, find_images(path), recipe, output)
        (rows,) = extract([images], recipe, cfg, device)
        return rows, None, {"source": str(path.resolve()), "descriptors": recipe.provenance()}
    experiment = prepare(cfg, source, output, device)
    dataset, recipe = experiment.dataset, experiment.recipe
    (rows,) = extract(experiment.sets[-1:], recipe, cfg, device)
    in_classes = dataset.in_database is not None
    classes = numbered([name.partition("/")[0] for name in dataset.names]) if in_classes else None
    return rows, classes, {"source": dataset.name, "dataset": dataset.name, "descriptors": recipe.provenance()}


def read_classes(path: Path, count: int) -> Tensor:
    """Reads the class of each of `count` descriptors, a line each, see numbered."""
    names = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()  # names may be in any encoding
    if len(names) != count:
        raise InputError(f"it has {len(names)} lines for {count} descriptors")
    return numbered(names)


def numbered(names: Sequence[str]) -> Tensor:
    """Returns the number of each name among the different names, from 0, as int64."""
    return torch.from_numpy(np.unique(names, return_inverse=True)[1].astype(np.int64))


def pca_whitening(rows: Tensor, dim: int) -> Whitening:
    """Learns PCA whitening: P = diag(l)^(-1/2) E^T, with l the dim largest eigenvalues of the covariance, descending.

    E (D, dim) holds their eigenvectors. P (x - mean) has unit covariance, as in scikit-learn's ``PCA(whiten=True)``.

    Raises:
        InputError: if a value is not finite, or the descriptors vary along fewer than dim axes.
    """
    _, means, covariance = class_moments(rows, torch.zeros(1, dtype=torch.int64).expand(len(rows)))
    variances, axes = scipy.linalg.eigh(covariance.numpy())  # ascending
    rank = _rank(variances)
    if not 1 <= dim <= rank:
        raise InputError(f"the descriptors vary along {rank} of {rows.shape[1]} dimensions; dim cannot be {dim}")
    return Whitening(means[0], _descending(axes[:, -dim:] / np.sqrt(variances[-dim:])))


def discriminative_whitening(rows: Tensor, classes: Tensor, dim: int, shrinkage: float = 0.0) -> Whitening:
    """Learns the whitening of Radenović et al.: within classes, descriptors vary equally in all directions.

    The directions that are kept are those in which the descriptors then differ most: P = U^T C_S^(-1/2), with the
    eigenvectors U of C_S^(-1/2) C_D C_S^(-1/2), or the solutions v of C_D v = l C_S v with v^T C_S v = 1. C_S is the
    covariance within the classes, C_D that of all descriptors. They equal the paper's sums of (x_i - x_j) (x_i - x_j)^T
    over pairs: C_S over the pairs of one class, divided by its size, so that a large class does not dominate; C_D over
    all pairs, as in the authors' code. With classes of equal size, C_D over the pairs of two classes gives the same P,
    up to a factor.

    Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, sec. 3.4, after
    Mikolajczyk and Matas, "Improving Descriptors for Fast Tree Matching by Optimal Linear Projection", ICCV 2007.

    Args:
        rows: (N, D).
        classes: (N,) int64, from 0 to C - 1.
        dim: number of dimensions that are kept. Without shrinkage at most C - 1, or D: classes differ in C - 1
            directions, and the choice among the others would be arbitrary.
        shrinkage: 0 to 1. C_S becomes (1 - shrinkage) C_S + shrinkage tr(C_S) / D * I, which is invertible above 0.

    Raises:
        InputError: if a value is not finite, C_S is not invertible, or there are too few classes or pairs for dim.
    """
    (count, width), number = rows.shape, int(classes.max()) + 1  # N, D, C
    most = width if shrinkage else min(number - 1, width)
    if not 2 <= number < count:
        raise InputError(f"two classes, and two descriptors of one, are needed: got {count} in {number} classes")
    if not 1 <= dim <= most and dim != width:
        others = f", {width}, or another with a shrinkage above 0" if most < width else ""
        raise InputError(f"dim for {number} classes of {width} dimensions can be 1 to {most}{others}; got {dim}")
    sizes, means, within = class_moments(rows, classes)
    mean = sizes @ means / count
    between = (sizes[:, None] * (means - mean)).T @ (means - mean)
    total = ((count - number) * within + between) / count
    within = (1 - shrinkage) * within + shrinkage * within.trace() / width * torch.eye(width, dtype=within.dtype)
    if (rank := _rank(scipy.linalg.eigvalsh(within.numpy()))) < width:
        raise InputError(
            f"descriptors of one class differ along {rank} of {width} dimensions, but must along all: give at least "
            f"{width + number} descriptors (got {count}), or a shrinkage above {shrinkage:g}, such as 0.01"
        )
    _, axes = scipy.linalg.eigh(total.numpy(), within.numpy())  # ascending
    return Whitening(mean, _descending(axes[:, -dim:]))


def class_moments(rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the size (C,) and mean (C, D) of each class, and the covariance within classes (D, D), in float64.

    The covariance is the sum of (x - m) (x - m)^T, m the mean of the class of x, divided by N - C.
    """
    # Two passes are exact, also for a mean far from 0, where scikit-learn's IncrementalPCA approximates.
    number, width = int(classes.max()) + 1, rows.shape[1]
    if len(rows) <= number:
        raise InputError(f"a covariance needs more than {number} descriptors, got {len(rows)}")
    sizes, means = torch.zeros(number, dtype=torch.float64), torch.zeros(number, width, dtype=torch.float64)
    for block, labels in blocks(rows, classes, "mean"):
        sizes += labels.bincount(minlength=number)
        means.index_add_(0, labels, block)
    means /= sizes[:, None]
    scatter = torch.zeros(width, width, dtype=torch.float64)
    for block, labels in blocks(rows, classes, "covariance"):
        centred = block - means[labels]
        scatter.addmm_(centred.T, centred)
    return sizes, means, scatter / (len(rows) - number)


def blocks(rows: Tensor, classes: Tensor, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields blocks of descriptors in float64, and their classes. Raises InputError if a value is not finite."""
    with tqdm(total=len(rows), desc=title, unit="row", dynamic_ncols=True) as bar:
        for start in range(0, len(rows), _ROWS):
            block = rows[start : start + _ROWS].double()
            if not (finite := block.isfinite().all(dim=1)).all():
                raise InputError(f"row {start + int(finite.int().argmin())} (from 0) has NaN or infinity")
            yield block, classes[start : start + _ROWS]
            bar.update(len(block))


def _rank(variances: np.ndarray) -> int:
    """Returns how many of the ascending variances are above rounding errors."""
    return int((variances > _FLOOR * max(0, variances[-1])).sum())


def _descending(axes: np.ndarray) -> Tensor:
    """Returns ascending axes (D, dim) as (dim, D), descending."""
    return torch.from_numpy(axes.T[::-1].copy())


if __name__ == "__main__":
    run_command(main)
