"""Rerank existing vectors: takes queries and a database, and writes the new order; needs no images or ground truth.

python -m tools.rerank --queries q.npy --database d.npy --out ranks.npy
python -m tools.rerank --queries q.npy --database d.npy --out ranks.npy --reranker diffusion RERANK.DIFFUSION_K 30
python -m tools.rerank --queries q.npy --database d.npy --ids found.npy --out ranks.npy

Queries are (Q, D), the database (N, D), from any network: images, or texts and images of a common space (CLIP). Without
--ids, the database is searched exactly, reading blocks of rows from the disk. With --ids, (Q, R) int64, best first, -1
for none, the results of your own index are reranked, and only their rows are read. The output file contains the row
numbers, int64, (Q, min(400, N)) or (Q, min(400, R)), best first. Rows must have unit length; --normalize normalises
them. TEST.INDEX searches with a FAISS index, which is built once, beside the file of the database.
"""

import logging
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from assembly import Subject, check_index, make_stages, query_expansion, start_device, with_index
from config import ADVICE, INDEX, RERANKER_NAMES, RERANKING, CommandLine, plain
from extraction.store import scratch_rows
from model.errors import InputError, run_command
from modules.search import Database
from report.log import start_log
from revisitop.descriptors import load_rows
from revisitop.retrieve import SAVED_RANKS, Ranking
from revisitop.stages import Reranked, Searched, SearchedAgain, Stage, search_for

log = logging.getLogger(__name__)

_ROWS = 8192
_TOLERANCE = 1e-2  # of the length of a row; float16 rows are off by up to 5e-4


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, (*INDEX, *RERANKING, "TEST.DEVICE"), "python -m tools.rerank")
    line.add("--queries", type=Path, required=True, metavar="FILE", help="(Q, D), .npy or .pth")
    line.add("--database", type=Path, required=True, metavar="FILE", help="(N, D), .npy or .pth, read from the disk")
    line.add("--ids", type=Path, metavar="FILE", help="(Q, R) row numbers from your index, .npy")
    line.add("--out", type=Path, required=True, metavar="FILE", help="row numbers in the new order, .npy")
    line.add("--normalize", action="store_true", help="normalise the rows to unit length first")
    names = [name for name in RERANKER_NAMES if name != "cvnet"]
    line.add_flag("--reranker", "TEST.RERANKER", metavar="NAME", help=f"{', '.join(names)} or none [superglobal]")
    args, cfg, _ = line.parse(argv)
    if len(cfg.TEST.RERANKER) > 1 or "cvnet" in cfg.TEST.RERANKER:
        raise InputError(f"--reranker takes one of {', '.join(names)} or none; {ADVICE_CVNET}")
    if args.out.suffix != ".npy":
        raise InputError(f"--out {args.out} must end in .npy: the order is written in NumPy's format")
    start_log(Path("log.txt"), plain(cfg))
    queries, rows = load_rows(args.queries), load_rows(args.database)
    if queries.shape[1] != rows.shape[1]:
        raise InputError(
            f"{args.queries} has {queries.shape[1]} dimensions, {args.database} has {rows.shape[1]}; "
            "both must come from the same network"
        )
    check_index(cfg, rows.shape[1])
    if args.ids is not None and cfg.TEST.INDEX:
        raise InputError("--ids are the results of an index: leave TEST.INDEX out")
    ids = None if args.ids is None else load_ids(args.ids, len(queries), len(rows))
    device = start_device(cfg, {})
    queries = unit_rows(queries, args.queries, args.normalize)[:].float()
    if ids is None:
        rows = unit_rows(rows, args.database, args.normalize)
    elif args.normalize:
        raise InputError("--normalize reads the whole database, which --ids avoids: give rows of unit length")
    database = Database(rows)
    if ids is None:
        database = with_index(cfg, database, args.database, [args.database], device, normalized=args.normalize)
    order = reranked(cfg, queries, database, ids, device)
    write_array(args.out, order.numpy())
    log.info("%s: %d queries, the first %d of %d rows each", args.out, *order.shape, len(rows))


ADVICE_CVNET = "cvnet needs images (test.py has it)"


def reranked(cfg: CfgNode, queries: Tensor, database: Database, ids: Tensor | None, device: torch.device) -> Tensor:
    """Returns the row numbers in the new order, (Q, min(400, N)), or (Q, min(400, R)) for ids (Q, R)."""
    stages = list(make_stages(cfg, Subject(None, (), (), 0, None, None), device).values())
    if ids is None:
        searched = search_for(stages, queries, database, device=device)
    else:
        empty = [torch.empty(0, dtype=torch.int64)] * len(ids)
        searched = Searched(Ranking(ids, torch.zeros(ids.shape), empty, 0.0), queries, database, device=device)
        stages = [of_candidates(cfg, each) for each in stages]
    ranking = searched.ranking
    for stage in stages:
        ranking = stage(searched)
        log.info("reranking took %.2f s, %.1f ms per query", ranking.seconds, 1000 * ranking.seconds / len(queries))
    return ranking.ids[:, :SAVED_RANKS]


def of_candidates(cfg: CfgNode, stage: Stage) -> Reranked:
    """Returns the stage in the form that uses only the candidates, without searching the database."""
    if isinstance(stage, Reranked):
        return stage
    if isinstance(stage, SearchedAgain):
        log.info("with --ids the expanded queries sort the first %d candidates; nothing is searched", cfg.SupG.rerank_m)
        return Reranked(query_expansion(cfg, stage.expansion.alpha))
    raise InputError("--reranker dba searches the whole database, which --ids avoids: leave --ids out")


def load_ids(path: Path, queries: int, rows: int) -> Tensor:
    """Loads the candidates of each query, (Q, R) int64.

    Raises:
        InputError: if the file is damaged, or does not contain row numbers.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"--ids {path}: {error.strerror or error}") from None
    except Exception as error:  # exceptions of NumPy
        raise InputError(f"--ids {path} is damaged or not a .npy file ({str(error).splitlines()[0]})") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or len(ids) != queries or ids.dtype.kind not in "iu":
        shape = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "several arrays"
        raise InputError(f"--ids {path} must contain whole numbers ({queries}, R), a row per query; got {shape}")
    ids = ids.astype(np.int64)
    if not ids.size or ids.min() < -1 or ids.max() >= rows:
        raise InputError(f"--ids {path}: the numbers must be from 0 to {rows - 1}, or -1 for none, and at least one")
    for query, row in enumerate(ids):
        there = row[row >= 0]
        if len(np.unique(there)) < len(there):
            raise InputError(f"--ids {path}: query {query} (from 0) has the same row twice among its candidates")
    return torch.from_numpy(ids)


def unit_rows(rows: Tensor, path: Path, normalize: bool) -> Tensor:
    """Returns the rows if all have length 1 or 0, or a normalised copy on disk.

    Raises:
        InputError: if a row has another length, or has NaN; the message says what to do.
    """
    unit = scratch_rows(*rows.shape) if normalize else rows
    zeros = 0
    for start in tqdm(range(0, len(rows), _ROWS), desc=f"lengths of {path.name}", unit=f"{_ROWS} rows", leave=False):
        block = rows[start : start + _ROWS].float()
        lengths = block.norm(dim=1)
        if len(bad := (~lengths.isfinite()).nonzero()):
            raise InputError(f"{path}: row {start + int(bad[0])} (from 0) has NaN or infinity")
        zeros += int((lengths == 0).sum())
        if normalize:
            unit[start : start + _ROWS] = block / lengths.clamp(min=1e-30)[:, None]
        elif len(bad := ((lengths > 0) & ((lengths - 1).abs() > _TOLERANCE)).nonzero()):
            place = int(bad[0])
            raise InputError(
                f"{path}: row {start + place} (from 0) has length {lengths[place]:.3g}, not 1; give --normalize"
            )
    if zeros:
        log.warning("%s: %d rows are zero; their similarity to everything is 0", path, zeros)
    return unit


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes the .npy file atomically."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            np.save(file, array)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise InputError(f"--out {path} cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    run_command(main, ADVICE)
