"""Rerank vectors that exist already: queries and a database in, the order out; no images, no ground truth.

python -m tools.rerank --queries q.npy --database d.npy --out ranks.npy
python -m tools.rerank --queries q.npy --database d.npy --out ranks.npy --reranker diffusion RERANK.DIFFUSION_K 30
python -m tools.rerank --queries q.npy --database d.npy --ids found.npy --out ranks.npy

Queries are (Q, D), the database (N, D), of any network: images, or texts and images of one space (CLIP). Without --ids
the database is searched, exactly, a few rows at a time from the disk. With --ids, (Q, R) int64, best first, -1 for
none, the results of your own index are reranked, and no other row is read. The file that is written holds the row
numbers, int64, (Q, min(400, N)) or (Q, min(400, R)), best first. Rows must have unit length; --normalize makes them so.
TEST.INDEX searches with a FAISS index, which is built beside the database's file once.
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
from model.errors import InputError, run_command
from model.store import scratch_rows
from modules.compact import Int8Rows
from modules.search import Database
from report.log import start_log
from revisitop.descriptors import load_rows
from revisitop.retrieve import SAVED_RANKS, Ranking
from revisitop.stages import Reranked, Searched, SearchedAgain, Stage, search_for

log = logging.getLogger(__name__)

_ROWS = 8192
_TOLERANCE = 1e-2  # of a length; float16 rows are off by up to 5e-4


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, (*INDEX, *RERANKING, "TEST.DEVICE"), "python -m tools.rerank")
    line.add("--queries", type=Path, required=True, metavar="FILE", help="(Q, D), .npy or .pth")
    line.add("--database", type=Path, required=True, metavar="FILE", help="(N, D), .npy or .pth, read from the disk")
    line.add("--ids", type=Path, metavar="FILE", help="(Q, R) row numbers that your index found, .npy")
    line.add("--out", type=Path, required=True, metavar="FILE", help="row numbers in the new order, .npy")
    line.add("--normalize", action="store_true", help="make the rows of unit length first")
    names = [name for name in RERANKER_NAMES if name != "cvnet"]
    line.add_flag("--reranker", "TEST.RERANKER", metavar="NAME", help=f"{', '.join(names)} or none [superglobal]")
    args, cfg, _ = line.parse(argv)
    if len(cfg.TEST.RERANKER) > 1 or "cvnet" in cfg.TEST.RERANKER:
        raise InputError(f"--reranker takes one of {', '.join(names)} or none; {ADVICE_CVNET}")
    if args.out.suffix != ".npy":
        raise InputError(f"--out {args.out}: the order is written as NumPy's .npy, name it so")
    start_log(Path("log.txt"), plain(cfg))
    queries, rows = load_rows(args.queries), load_rows(args.database)
    if queries.shape[1] != rows.shape[1]:
        raise InputError(
            f"{args.queries} has {queries.shape[1]} dimensions, {args.database} has {rows.shape[1]}; "
            "both must come from one network"
        )
    check_index(cfg, rows.shape[1])
    if args.ids is not None and cfg.TEST.INDEX:
        raise InputError("--ids are what an index found: leave TEST.INDEX out")
    ids = None if args.ids is None else load_ids(args.ids, len(queries), len(rows))
    device = start_device(cfg, {})
    queries = unit_rows(queries, args.queries, args.normalize)[:].float()
    if ids is None:
        rows = unit_rows(rows, args.database, args.normalize)
    elif args.normalize:
        raise InputError("--normalize reads the whole database, which --ids is to save: give rows of unit length")
    database = Database(rows)
    if ids is None:
        database = with_index(cfg, database, args.database, [args.database], device, normalized=args.normalize)
    order = reranked(cfg, queries, database, ids, device)
    write_array(args.out, order.numpy())
    log.info("%s: %d queries, the first %d of %d rows each", args.out, *order.shape, len(rows))


ADVICE_CVNET = "cvnet needs images (test.py has it)"


def reranked(cfg: CfgNode, queries: Tensor, database: Database, ids: Tensor | None, device: torch.device) -> Tensor:
    """The row numbers in their new order, (Q, min(400, N)), or (Q, min(400, R)) of ids (Q, R)."""
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
    """The stage where the database is not searched: of the candidates alone."""
    if isinstance(stage, Reranked):
        return stage
    if isinstance(stage, SearchedAgain):
        log.info("with --ids the expanded queries sort the first %d candidates; nothing is searched", cfg.SupG.rerank_m)
        return Reranked(query_expansion(cfg, stage.expansion.alpha))
    raise InputError("--reranker dba searches the whole database, which --ids is to save: leave --ids out")


def load_ids(path: Path, queries: int, rows: int) -> Tensor:
    """The candidates of each query, (Q, R) int64.

    Raises:
        InputError: if the file is damaged, or does not hold the numbers of rows.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"--ids {path}: {error.strerror or error}") from None
    except Exception as error:  # NumPy's own
        raise InputError(f"--ids {path} is damaged or no .npy file ({str(error).splitlines()[0]})") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or len(ids) != queries or ids.dtype.kind not in "iu":
        shape = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "several arrays"
        raise InputError(f"--ids {path}: whole numbers ({queries}, R) are expected, a row per query; got {shape}")
    ids = ids.astype(np.int64)
    if not ids.size or ids.min() < -1 or ids.max() >= rows:
        raise InputError(f"--ids {path}: the numbers must be from 0 to {rows - 1}, or -1 for none, and at least one")
    for query, row in enumerate(ids):
        there = row[row >= 0]
        if len(np.unique(there)) < len(there):
            raise InputError(f"--ids {path}: query {query} (from 0) has a row twice among its candidates")
    return torch.from_numpy(ids)


def unit_rows(rows: Tensor | Int8Rows, path: Path, normalize: bool) -> Tensor | Int8Rows:
    """The rows, if all have unit length or none at all; or their copy on disk that has.

    Raises:
        InputError: if a row has not, or holds NaN; what to do is said.
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
    """Writes the .npy file, whole or not at all."""
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
