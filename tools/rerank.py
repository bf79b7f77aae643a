"""Rerank existing vectors: takes queries and a database, and writes the new order; needs no images or ground truth.

python -m tools.rerank --queries q.npy --database d.npy --out ranks.npy
python -m tools.rerank --queries q.npy --database d.npy --out ranks.npy --reranker diffusion RERANK.DIFFUSION_K 30
python -m tools.rerank --queries q.npy --database d.npy --ids found.npy --out ranks.npy

Queries are (Q, D), the database (N, D), from any network: images, or texts and images of a common space (CLIP). Files
may be .npy, .npz, .mat, .pth or HDF5; rows that are not of unit length are normalised. Without --ids, the database is
searched exactly, reading blocks of rows from the disk. With --ids, the results of your own index are reranked, and only
their rows are used: (Q, R) or (R, Q) row numbers, best first, -1 for none, or an nn_*.pkl file. The output file
contains the row numbers, int64, (Q, min(400, N)) or (Q, min(400, R)), best first. TEST.INDEX searches with a FAISS
index, which is built once, beside the file of the database. TEST.EXPORT writes other forms beside the output file.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from assembly import RERANKERS, check_index, make_stages, option, start_session, with_index
from config import INDEX, RERANKING, CommandLine
from extraction.arrays import read_arrays_of
from extraction.files import write_array
from model.errors import InputError
from modules.search import Database
from report.command import run_command
from revisitop.descriptors import load_rows, ranking_of, unit_rows
from revisitop.exports import Names, check_forms, write_descriptors, write_rankings
from revisitop.retrieve import SAVED_RANKS, Ranking
from revisitop.stages import Reranked, Searched, SearchedAgain, Stage, search_for

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, (*INDEX, *RERANKING, "TEST.DEVICE", "TEST.EXPORT"))
    line.add("--queries", type=Path, required=True, metavar="FILE", help="(Q, D), or the array Q of a file")
    line.add("--database", type=Path, required=True, metavar="FILE", help="(N, D), or the array X of a file")
    line.add("--ids", type=Path, metavar="FILE", help="row numbers from your index, (Q, R) or (R, Q), or nn_*.pkl")
    line.add("--out", type=Path, required=True, metavar="FILE", help="row numbers in the new order, .npy")
    names = [name for name in RERANKERS if name != "cvnet"]
    line.add_flag("--reranker", "TEST.RERANKER", metavar="NAME", help=f"{', '.join(names)} or none [superglobal]")
    args, cfg, _ = line.parse(argv)
    if len(cfg.TEST.RERANKER) > 1 or "cvnet" in cfg.TEST.RERANKER:
        raise InputError(f"--reranker takes one of {', '.join(names)} or none; cvnet needs images (test.py has it)")
    if args.out.suffix != ".npy":
        raise InputError(f"--out {args.out} must end in .npy: the order is written in NumPy's format")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent}")
    if args.ids is not None and cfg.TEST.INDEX:
        raise InputError("--ids are the results of an index: leave TEST.INDEX out")
    with option("TEST.EXPORT"):
        check_forms(cfg.TEST.EXPORT)
    device = start_session(cfg).device
    queries, rows = load_rows(args.queries, "Q"), load_rows(args.database)
    if queries.shape[1] != rows.shape[1]:
        raise InputError(
            f"{args.queries} has {queries.shape[1]} dimensions, {args.database} has {rows.shape[1]}; "
            "both must come from the same network"
        )
    check_index(cfg, rows.shape[1])
    queries = unit_rows(queries, str(args.queries))[:].float()
    if args.ids is None:
        database = Database(unit_rows(rows, str(args.database)))
        database = with_index(cfg, database, args.database, [args.database], device)
        ranking = reranked(cfg, queries, database, None, device)
    else:
        with option("--ids"):
            ids = load_ids(args.ids, len(queries), len(rows))
        numbers = ids[ids >= 0].unique()
        database = Database(unit_rows(rows[numbers], f"the {len(numbers)} candidates in {args.database}"))
        places = torch.searchsorted(numbers, ids.contiguous())
        ranking = reranked(cfg, queries, database, places.masked_fill(ids < 0, -1), device)
        found = numbers[ranking.ids.clamp(min=0)].masked_fill(ranking.ids < 0, -1)
        ranking, database = replace(ranking, ids=found), Database(rows)
    with option("--out"):
        write_array(args.out, ranking.ids[:, :SAVED_RANKS].numpy())
    with option("TEST.EXPORT"):
        names = Names(*([str(number) for number in range(len(each))] for each in (queries, rows)))
        write_rankings(args.out.parent, cfg.TEST.EXPORT, args.out.stem, {"reranking": ranking}, names)
        files = Names(*([f"{part}/{name}" for name in each] for part, each in zip(names._fields, names, strict=True)))
        write_descriptors(args.out.parent, cfg.TEST.EXPORT, args.out.stem, queries, database, files)
    shape = (len(queries), min(SAVED_RANKS, ranking.ids.shape[1]), len(rows))
    log.info("%s: %d queries, the first %d of %d rows each", args.out, *shape)


def reranked(cfg: CfgNode, queries: Tensor, database: Database, ids: Tensor | None, device: torch.device) -> Ranking:
    """Returns the new ranking of all rows, or of the candidates (Q, R)."""
    stages = list(make_stages(cfg).values())
    if ids is None:
        everything = "ranks" in cfg.TEST.EXPORT
        searched = search_for(stages, queries, database, device=device, everything=everything)
    else:
        empty = [torch.empty(0, dtype=torch.int64)] * len(ids)
        searched = Searched(Ranking(ids, torch.zeros(ids.shape), empty, 0.0), queries, database, device=device)
        stages = [of_candidates(cfg, each) for each in stages]
    ranking = searched.ranking
    for stage in stages:
        ranking = stage(searched)
        log.info("reranking took %.2f s, %.1f ms per query", ranking.seconds, 1000 * ranking.seconds / len(queries))
    return ranking


def of_candidates(cfg: CfgNode, stage: Stage) -> Reranked:
    """Returns the stage in the form that uses only the candidates, without searching the database."""
    if isinstance(stage, Reranked):
        return stage
    if isinstance(stage, SearchedAgain):
        log.info("with --ids the expanded queries sort the first %d candidates; nothing is searched", cfg.SupG.rerank_m)
        return Reranked(stage.reranker)
    raise InputError("--reranker dba searches the whole database, which --ids avoids: leave --ids out")


def load_ids(path: Path, queries: int, rows: int) -> Tensor:
    """Loads the candidates of each query, (Q, R) int64.

    Raises:
        InputError: if the file is damaged, or does not contain row numbers.
    """
    ids, _ = ranking_of(read_arrays_of(path), queries, rows)
    if not (ids >= 0).any():
        raise InputError(f"{path} has no candidate: every number is -1")
    return torch.from_numpy(ids)


if __name__ == "__main__":
    run_command(main)
