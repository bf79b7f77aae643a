"""Search a folder of pictures of your own: descriptors, search and reranking, without any ground truth.

python -m revisitop.search --database holiday/ --queries tower.jpg --weights ./weights
python -m revisitop.search --database holiday/ --queries details/ --weights ./weights --top 20 --json > found.json

The folder is described once; the next search describes what is new or has changed.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from config import describe_arguments, descriptor_source, make_parser, read_config
from model.checkpoint import find_checkpoint
from model.errors import InputError, run_command, short_list
from model.extract import choose_device, prepare_process
from model.images import ImageError, ImageFile
from model.resnet import STAGE_DEPTHS
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop.dataset import GroundTruth
from revisitop.report import SHOWN, Hit, Page, Query, Section, write_report
from revisitop.run import SAVED_RANKS, PictureList, Ranking, describe_lists, make_folder, retrieve
from revisitop.runlog import start_log

log = logging.getLogger(__name__)

_NAMED_AT_MOST = 50
_NOTHING = GroundTruth(*(np.zeros(0, dtype=np.int64),) * 3)


@dataclass(frozen=True)
class Folder:
    """Pictures of one's own, those that can be read, with their descriptors.

    Attributes:
        root: what their names count from.
        images: N of them.
        rows: (N, D) unit descriptors.
        unreadable: the others, by name.
    """

    root: Path
    images: list[ImageFile]
    rows: Tensor
    unreadable: list[str]

    def name(self, number: int) -> str:
        return _name(self.images[number], self.root)


def main(argv: list[str]) -> None:
    args = parse(argv)
    cfg = read_config(args, ("MODEL.DEPTH", args.depth), ("TEST.WEIGHTS", str(args.weights)))
    if cfg.TEST.RERANKER == "cvnet" or cfg.TEST.FEATURES or cfg.SupG.onemeval:
        raise InputError("TEST.RERANKER cvnet, TEST.FEATURES and SupG.onemeval are for test.py, which has ground truth")
    if not args.database.is_dir():
        raise InputError(f"--database {args.database}: there is no such folder")
    out_dir = Path(cfg.TEST.OUT_DIR)
    make_folder(out_dir)
    start_log(Path("log.txt"), cfg, screen=sys.stderr if args.json else sys.stdout)
    device = choose_device(cfg.TEST.DEVICE)
    prepare_process(device)
    checkpoint = find_checkpoint(args.weights, args.depth)

    # Each database has a folder of descriptors of its own, by its path.
    database_images, query_images = find_pictures(args.database), find_pictures(args.queries)
    place = hashlib.sha256(str(args.database.resolve()).encode(errors="surrogateescape")).hexdigest()[:8]
    cache = out_dir / "search" / f"{args.database.resolve().name}-{place}"
    make_folder(cache)
    database, queries = describe_folders(
        [
            PictureList(cache / "database.npy", "database", database_images, args.database),
            PictureList(cache / "queries.npy", "queries", query_images, folder_of(args.queries)),
        ],
        **describe_arguments(cfg, checkpoint, descriptor_source(cfg, checkpoint), device),
    )

    reranker = None
    if cfg.SupG.rerank and cfg.TEST.RERANKER != "none":
        reranker = SuperGlobalReranker(cfg.SupG.rerank_m, cfg.SupG.rerank_k, cfg.SupG.rerank_beta)
    nothing = [_NOTHING] * len(queries.images)
    stages = retrieve(queries.rows, Database(database.rows), nothing, reranker, device)
    found = list(stages.values())[-1]
    scores = "cosine similarity" if reranker is None else "the reranking's own"
    if args.json:
        print(json.dumps({"scores": scores, **as_dict(queries, database, found, args.top)}, indent=1))
    else:
        log.info("scores: %s", scores)
        for line in in_words(queries, database, found, args.top):
            log.info("%s", line)
    if args.report:
        settings = {"database": str(args.database), "queries": str(args.queries), "checkpoint": str(checkpoint)}
        page = Page(f"Search in {args.database.resolve().name}", settings, [section(queries, database, stages)])
        log.info("the report is %s", write_report(page, cache / "report"))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__, "python -m revisitop.search")
    parser.add_argument("--database", type=Path, required=True, metavar="FOLDER", help="pictures, in folders or not")
    parser.add_argument("--queries", type=Path, required=True, metavar="FOLDER|FILE", help="a picture, or several")
    parser.add_argument(
        "--weights", type=Path, default=Path("weights"), metavar="PATH",
        help="the checkpoint, or a folder in which exactly one fits the depth [./weights]",
    )  # fmt: skip
    parser.add_argument("--depth", type=int, choices=STAGE_DEPTHS, default=50, help="layers of the ResNet encoder [50]")
    parser.add_argument("--top", type=top, default=10, metavar="K", help=f"results per query, 1 to {SAVED_RANKS} [10]")
    parser.add_argument("--json", action="store_true", help="print JSON, and everything else on stderr")
    parser.add_argument("--report", action="store_true", help="write a page of the first 10 for each query")
    return parser.parse_intermixed_args(argv)


def top(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= SAVED_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and {SAVED_RANKS}")
    return int(text)


def folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def find_pictures(path: Path) -> list[ImageFile]:
    """The file, or the picture files of a folder and its subfolders by name; hidden ones are left out.

    Raises:
        InputError: where there is none.
    """
    if path.is_file():
        return [ImageFile(path)]
    if not path.is_dir():
        raise InputError(f"there is no file or folder {path}")
    suffixes = Image.registered_extensions()

    def walk(folder: Path) -> Iterator[Path]:
        try:
            entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}") from None
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                yield from walk(entry)
            elif entry.suffix.lower() in suffixes and entry.is_file():
                yield entry

    images = [ImageFile(file) for file in walk(path)]
    if not images:
        raise InputError(f"{path} holds no picture; files with endings such as .jpg, .png, .webp or .tif count")
    return images


def describe_folders(lists: list[PictureList], **arguments) -> list[Folder]:
    """The pictures that can be read, described; the others are named, and left out.

    Args:
        arguments: of describe_lists.

    Raises:
        InputError: where none can be read.
    """
    folders = []
    for each, rows in zip(lists, describe_lists(lists, on_error="skip", **arguments), strict=True):
        readable = rows.any(dim=1)  # one that cannot be read is a row of zeros
        images = [image for image, good in zip(each.images, readable.tolist(), strict=True) if good]
        bad = [
            _name(image, each.folder) for image, good in zip(each.images, readable.tolist(), strict=True) if not good
        ]
        if not images:
            raise InputError(f"{each.title}: {why_unreadable(each.images[0])}{' and more' if len(bad) > 1 else ''}")
        if bad:
            log.warning(
                "%s: %d of %d cannot be read and are left out: %s",
                each.title,
                len(bad),
                len(rows),
                short_list(bad, _NAMED_AT_MOST),
            )
        folders.append(Folder(each.folder, images, rows[readable] if bad else rows, bad))
    return folders


def why_unreadable(image: ImageFile) -> str:
    try:
        image.read()
    except ImageError as error:
        return str(error)
    return f"{image.path} has no descriptor"


def in_words(queries: Folder, database: Folder, found: Ranking, count: int) -> Iterator[str]:
    for query, (ids, scores) in enumerate(zip(found.ids.tolist(), found.scores.tolist(), strict=True)):
        yield ""
        yield queries.name(query)
        for rank, (number, score) in enumerate(zip(ids[:count], scores[:count], strict=True), start=1):
            yield f"{rank:4d}  {score:7.4f}  {database.name(number)}"


def as_dict(queries: Folder, database: Folder, found: Ranking, count: int) -> dict:
    rankings = zip(found.ids.tolist(), found.scores.tolist(), strict=True)
    return {
        "database": str(database.root),
        "unreadable": {"database": database.unreadable, "queries": queries.unreadable},
        "queries": [
            {
                "query": queries.name(query),
                "results": [
                    {"rank": rank, "file": database.name(number), "score": round(score, 6)}
                    for rank, (number, score) in enumerate(zip(ids[:count], scores[:count], strict=True), start=1)
                ],
            }
            for query, (ids, scores) in enumerate(rankings)
        ],
    }


def section(queries: Folder, database: Folder, stages: dict[str, Ranking]) -> Section:
    """The queries in their own order, with what each found."""

    def hits(ranking: Ranking, query: int) -> list[Hit]:
        pairs = zip(ranking.ids[query, :SHOWN].tolist(), ranking.scores[query].tolist(), strict=False)
        return [Hit(database.name(number), database.images[number], score) for number, score in pairs]

    shown = []
    for number, image in enumerate(queries.images):
        lists = [hits(ranking, number) for ranking in stages.values()]
        shown.append(Query(queries.name(number), image, lists[0], lists[1] if len(lists) > 1 else None))
    note = f"{len(shown)} queries, {len(database.images):,} pictures."
    return Section(database.root.resolve().name, shown, note=note)


def _name(image: ImageFile, root: Path) -> str:
    return str(image.path.relative_to(root))


if __name__ == "__main__":
    run_command(main)
