"""Learn a whitening of descriptors, for MODEL.WHITENING: fewer dimensions, each of the same variance.

python -m tools.whiten --from roxford5k --dim 512 --out whitening.pth
python -m tools.whiten --from holiday/ --dim 512 --out whitening.pth --weights ./weights
python -m tools.whiten --from rows.npy --dim 512 --out whitening.pth

--from takes the name of a dataset (its database; a folder in TEST.DATA_DIR), a folder of images, or a .npy or .pth file
of descriptors, (N, D). The default is PCA whitening. With --labels FILE (a class per line and row), or with
--discriminative for a dataset in class folders, directions in which images of one class differ are shortened.
The memory does not grow with the number of descriptors.

Jégou and Chum, "Negative Evidences and Co-Occurences in Image Retrieval", ECCV 2012; Radenović et al., TPAMI 2018.
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from assembly import Session, extract_together, find_recipe, own_images, prepare, start_session
from config import LOADING, NETWORK, CommandLine
from model.errors import InputError
from model.whitened import save_whitening
from modules.whitening import ClassMoments, Moments, discriminative_whitening, pca_whitening
from report.command import run_command
from revisitop.descriptors import load_distractors
from tools.search import find_images

log = logging.getLogger(__name__)

_ROWS = 8192


def main(argv: list[str]) -> None:
    line = CommandLine(
        __doc__, (*NETWORK, *LOADING, "TEST.DATA_DIR", "TEST.OUT_DIR", "TEST.DEVICE", "TEST.RESUME"),
        {"MODEL.WHITENING": "a whitening is learnt from descriptors without whitening"},
    )  # fmt: skip
    line.add("--from", dest="source", required=True, metavar="NAME|FOLDER|FILE", help="source of the descriptors")
    line.add("--dim", type=positive, required=True, metavar="N", help="number of dimensions to keep")
    line.add("--out", type=Path, required=True, metavar="FILE", help="file for the whitening")
    line.add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="the class of each descriptor, a line each: discriminative whitening",
    )
    line.add("--discriminative", action="store_true", help="use the classes of a dataset in class folders")
    line.add("--shrinkage", type=float, default=0.0, metavar="S", help="0 to 1, for few descriptors per class [0]")
    line.add_flag("--weights", "TEST.WEIGHTS", metavar="PATH", help="the checkpoint, see TEST.WEIGHTS")
    args, cfg, _ = line.parse(argv)
    rows, classes, learnt_from = descriptors(args, start_session(cfg))
    if args.labels:
        classes = read_labels(args.labels, len(rows))
    discriminative = bool(args.discriminative or args.labels)
    if discriminative and classes is None:
        raise InputError(f"--discriminative needs classes, which {args.source} does not have; give --labels FILE")
    dim = rows.shape[1]
    try:
        if discriminative:
            moments = ClassMoments(dim)
            for start, block in blocks(rows):
                moments.update(block, classes[start : start + len(block)])
            whitening = discriminative_whitening(moments, args.dim, args.shrinkage)
        else:
            plain = Moments(dim)
            for _, block in blocks(rows):
                plain.update(block)
            whitening = pca_whitening(plain.mean, plain.covariance, args.dim)
    except ValueError as error:
        raise InputError(f"--dim {args.dim}: {error}") from None
    learnt_from["kind"] = "discriminative" if discriminative else "PCA"
    save_whitening(args.out, whitening, {**learnt_from, "count": len(rows)})
    log.info("%s: %s whitening, %d to %d dimensions, from %d descriptors of %s",
             args.out, learnt_from["kind"], dim, args.dim, len(rows), args.source)  # fmt: skip


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def descriptors(args: argparse.Namespace, session: Session) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Returns the descriptors (N, D), their classes if the source has some, and their provenance."""
    source = Path(args.source)
    if source.is_file():
        return load_distractors(source), None, {"source": str(source)}
    cfg, output, device = session.cfg, session.output, session.device
    if source.is_dir() and "/" in args.source:
        recipe = find_recipe(cfg)
        images = own_images(source, find_images(source), recipe, output)
        (rows,) = extract_together([images], recipe, cfg, device)
        return rows, None, {"source": str(source.resolve()), "descriptors": recipe.provenance()}
    experiment = prepare(cfg, args.source, output, device)
    dataset, recipe = experiment.dataset, experiment.recipe
    (rows,) = extract_together(experiment.sets[-1:], recipe, cfg, device)
    classes = None
    if dataset.in_database is not None:
        names = [name.partition("/")[0] for name in dataset.names]
        classes = torch.from_numpy(np.unique(names, return_inverse=True)[1].astype(np.int64))
    return rows, classes, {"source": dataset.name, "dataset": dataset.name, "descriptors": recipe.provenance()}


def read_labels(path: Path, count: int) -> Tensor:
    """Reads the class of each descriptor as a number. Raises InputError if the number of lines differs."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(names) != count:
        raise InputError(f"--labels {path} has {len(names)} lines for {count} descriptors")
    return torch.from_numpy(np.unique(names, return_inverse=True)[1].astype(np.int64))


def blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of the first row of each block, and its rows."""
    bar = tqdm(total=len(rows), desc="covariance", unit="row", dynamic_ncols=True)
    with bar:
        for start in range(0, len(rows), _ROWS):
            block = rows[start : start + _ROWS]
            yield start, block
            bar.update(len(block))


if __name__ == "__main__":
    run_command(main)
