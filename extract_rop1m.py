"""Describe the 1,001,001 distractors of revisitop1m, for test.py with SupG.onemeval.

python extract_rop1m.py --weight ./weights/CVPR2022_CVNet_R50.pyth --depth 50
torchrun --nproc-per-node=8 extract_rop1m.py --weight ./weights/CVPR2022_CVNet_R50.pyth --depth 50

It can be stopped, killed or lose power at any moment: the same command goes on where it ended.
"""

import argparse
import logging
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import descriptor_source, loader_arguments, make_parser, model_arguments, read_config
from model.checkpoint import find_checkpoint
from model.distributed import Processes
from model.errors import InputError, run_command, short_list
from model.extract import choose_device, describe_all, prepare_process
from model.images import ImageList
from model.store import DescriptorStore, source_differences
from model.superglobal import build_model
from revisitop.dataset import load_distractor_list
from revisitop.runlog import device_name, start_log

log = logging.getLogger(__name__)

HINT = "--no-resume starts over, --out names another file"


def main(argv: list[str]) -> None:
    args = parse(argv)
    cfg = read_config(args, ("MODEL.DEPTH", args.depth), ("TEST.WEIGHTS", str(args.weight)))
    out = args.out or Path(f"feats_1m_RN{args.depth}.pth")
    if out.suffix not in (".pth", ".npy"):
        raise InputError(f"--out {out} must end in .pth or .npy")
    processes = Processes()
    first = processes.rank == 0
    head = start_log(Path("log.txt"), cfg) if first else {}
    device = choose_device(cfg.TEST.DEVICE, processes.local)
    prepare_process(device)
    log.info("device: %s, %r", device_name(device), processes)

    # What the rows are made from; a second start compares it.
    checkpoint = find_checkpoint(args.weight, args.depth)
    digest, images = load_distractor_list(args.data_dir)
    source = {**descriptor_source(cfg, checkpoint), "list_sha256": digest}
    log.info("checkpoint: %s, SHA-256 %s", checkpoint, source["checkpoint_sha256"])
    dim = cfg.MODEL.HEADS.REDUCTION_DIM
    if first:
        if is_finished(out, source, args.resume):
            log.info("%s is complete already, made from the same checkpoint, settings and list", out)
        else:
            check_disk(out, len(images) * dim * 4)
            if args.on_error == "stop":
                check_pictures(images)

    # The first process opens the store and tells the others which rows are there.
    store = DescriptorStore(out, len(images), dim, source, args.resume, HINT) if first else None
    done = processes.from_first(store.done if first else np.zeros(len(images), dtype=bool))
    if not first:
        store = DescriptorStore(out, len(images), dim, source, rank=processes.rank, done=done)
    mine = np.array_split(store.missing(), processes.count)[processes.rank]
    if len(mine):
        model = build_model(checkpoint, device=device, **model_arguments(cfg))
        title = "distractors" if processes.count == 1 else f"distractors, {processes!r}"
        try:
            describe_all(model, images, store, mine, title, on_error=args.on_error, **loader_arguments(cfg, device))
        except InputError as error:
            raise InputError(f"{error}; mend it and start again to go on, or say --on-error skip") from None
    processes.wait()

    if first and not store.complete:
        if processes.count > 1:  # joins the journals of all
            store = DescriptorStore(out, len(images), dim, source, hint=HINT)
        skipped = [images.name(row) for row in zero_rows(store.part_rows())]
        if skipped:
            log.warning("%d pictures could not be read and are zero rows: %s", len(skipped), short_list(skipped))
        log.info("writing %s", out)
        facts = {"skipped": skipped, "date": datetime.now().isoformat(timespec="seconds"), **head}
        store.finish({**facts, "device": device_name(device)})
        log.info("%s: %d descriptors of %d dimensions", out, len(images), dim)
    processes.end()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--weight", type=Path, required=True, metavar="FILE", help="the checkpoint")
    parser.add_argument("--depth", type=int, choices=(50, 101), required=True, help="layers of the ResNet encoder")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("revisitop/revisitop1m"), metavar="DIR",
        help="folder of revisitop1m.txt, with the pictures in it or in its jpg/ [revisitop/revisitop1m]",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help=".pth or .npy file [feats_1m_RN<depth>.pth]")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="go on with what an interrupted run left; --no-resume starts over [--resume]",
    )  # fmt: skip
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop",
        help="what a picture that cannot be read does: end the run, or become a zero row [stop]",
    )  # fmt: skip
    return parser.parse_intermixed_args(argv)


def is_finished(out: Path, source: dict, resume: bool) -> bool:
    """Whether the file is there, made from the same things. Raises InputError rather than touch another's."""
    if not resume or not out.exists() or Path(f"{out}.part").exists():
        return False
    differing = source_differences(out, source)
    if differing is None:
        raise InputError(f"{out} exists, and no {out.with_suffix('.json').name} tells what made it; {HINT}")
    if differing:
        raise InputError(f"{out} was made with other settings ({short_list(differing)}); {HINT}")
    return True


def check_pictures(images: ImageList) -> None:
    bar = tqdm(images, desc="looking for the pictures", unit="img", dynamic_ncols=True)
    missing = [image.path for image in bar if not image.path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(images)} pictures are missing ({short_list(missing)}); "
            "--on-error skip makes them zero rows"
        )


def check_disk(out: Path, size: int) -> None:
    """The rows are collected in one file, and written to a second one when all are there."""
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    there = sum(path.stat().st_size for path in (Path(f"{out}.part"), out) if path.exists())
    needed = size * (2 if out.suffix == ".pth" else 1) - there
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(f"{out.parent.absolute()} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")


def zero_rows(rows: np.ndarray, chunk: int = 8192) -> list[int]:
    return [
        start + int(row)
        for start in range(0, len(rows), chunk)
        for row in np.flatnonzero(~rows[start : start + chunk].any(axis=1))
    ]


if __name__ == "__main__":
    run_command(main)
