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
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from assembly import RERANKERS, check_index, make_stages, option, query_expansion, start_session, with_index
from config import INDEX, RERANKING, CommandLine
from extraction.files import read_array, scratch_rows, write_array
from model.errors import InputError
from modules.search import Database
from report.command import run_command
from revisitop.descriptors import check_ids, load_rows
from revisitop.retrieve import SAVED_RANKS, Ranking
from revisitop.stages import Reranked, Searched, SearchedAgain, Stage, search_for

log = logging.getLogger(__name__)

_ROWS = 8192
_TOLERANCE = 1e-2  # of the length of a row; float16 rows are off by up to 5e-4


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, (*INDEX, *RERANKING, "TEST.DEVICE"))
    line.add("--queries", type=Path, required=True, metavar="FILE", help="(Q, D), .npy or .pth")
    line.add("--database", type=Path, required=True, metavar="FILE", help="(N, D), .npy or .pth, read from the disk")
    line.add("--ids", type=Path, metavar="FILE", help="(Q, R) row numbers from your index, .npy")
    line.add("--out", type=Path, required=True, metavar="FILE", help="row numbers in the new order, .npy")
    line.add("--normalize", action="store_true", help="normalise the rows to unit length first")
    names = [name for name in RERANKERS if name != "cvnet"]
    line.add_flag("--reranker", "TEST.RERANKER", metavar="NAME", help=f"{', '.join(names)} or none [superglobal]")
    args, cfg, _ = line.parse(argv)
    if len(cfg.TEST.RERANKER) > 1 or "cvnet" in cfg.TEST.RERANKER:
        raise InputError(f"--reranker takes one of {', '.join(names)} or none; cvnet needs images (test.py has it)")
    if args.out.suffix != ".npy":
        raise InputError(f"--out {args.out} must end in .npy: the order is written in NumPy's format")
    if args.ids is not None and (cfg.TEST.INDEX or args.normalize):
        other = "TEST.INDEX" if cfg.TEST.INDEX else "--normalize, which reads the whole database,"
        raise InputError(f"--ids are the results of an index, and their rows have unit length: leave {other} out")
    device = start_session(cfg).device
    queries, rows = load_rows(args.queries), load_rows(args.database)
    if queries.shape[1] != rows.shape[1]:
        raise InputError(
            f"{args.queries} has {queries.shape[1]} dimensions, {args.database} has {rows.shape[1]}; "
            "both must come from the same network"
        )
    check_index(cfg, rows.shape[1])
    queries, ids = unit_rows(queries, args.queries, args.normalize)[:].float(), None
    if args.ids is None:
        database = Database(unit_rows(rows, args.database, args.normalize))
        database = with_index(cfg, database, args.database, [args.database], device, normalized=args.normalize)
    else:
        database = Database(rows)
        with option("--ids"):
            ids = load_ids(args.ids, len(queries), len(rows))
    order = reranked(cfg, queries, database, ids, device)
    with option("--out"):
        write_array(args.out, order.numpy())
    log.info("%s: %d queries, the first %d of %d rows each", args.out, *order.shape, len(rows))


def reranked(cfg: CfgNode, queries: Tensor, database: Database, ids: Tensor | None, device: torch.device) -> Tensor:
    """Returns the row numbers in the new order, (Q, min(400, N)), or (Q, min(400, R)) for ids (Q, R)."""
    stages = list(make_stages(cfg).values())
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
    ids = read_array(path, "iu")
    if ids.ndim != 2 or len(ids) != queries:
        raise InputError(f"{path} must contain integers ({queries}, R), a row per query; got {ids.shape}")
    ids = check_ids(ids, rows, path)
    if not (ids >= 0).any():
        raise InputError(f"{path} has no candidate: every number is -1")
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


if __name__ == "__main__":
    run_command(main)
