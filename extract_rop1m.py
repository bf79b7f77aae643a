"""Extract the descriptors of the 1,001,001 distractors of revisitop1m, for test.py with SupG.onemeval.

python extract_rop1m.py --weight ./weights/CVPR2022_CVNet_R50.pyth --depth 50
torchrun --nproc-per-node=8 extract_rop1m.py --weight ./weights/CVPR2022_CVNet_R50.pyth --depth 50
python extract_rop1m.py --weight ./weights/CVPR2022_CVNet_R50.pyth --depth 50 --out feats.npy --shard 3/64
python extract_rop1m.py MODEL.NAME timm:resnet50.a1_in1k

It can be interrupted at any moment, by a power cut, too: the same command resumes. A shard, numbered from 0, is written
to feats.00003-of-00064.npy, independently of the others; TEST.DISTRACTORS feats.npy then uses all shards together.
"""

from report.command import run_command  # isort: skip  # first, see there

import argparse
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from config import LOADING, NETWORK, CommandLine, Parsed
from model.errors import InputError, short_list

if TYPE_CHECKING:
    from extraction.images import ImageFile

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    args, cfg, _ = parse(argv)
    # Imported here, so that --help and errors about options appear at once.
    from assembly import find_recipe, make_loading, network_title, option, start_session
    from extraction.extract import ImageSet, extract_shared
    from extraction.owner import owned
    from extraction.shards import shard_path, shard_rows
    from extraction.store import nonzero_rows
    from revisitop.layout_revisitop import load_distractor_list

    out = args.out or Path(f"feats_1m_{network_title(cfg, 'RN')}.pth")
    session = start_session(cfg)
    processes = session.processes
    log.info("%r", processes)

    # Everything is checked before the long computations begin.
    recipe = find_recipe(cfg)
    with option("--data-dir"):
        digest, images = load_distractor_list(args.data_dir)
    provenance = {"list_sha256": digest}
    if args.shard:
        start, stop = shard_rows(len(images), *args.shard)
        if start == stop:
            raise InputError(f"--shard {args.shard[0]}/{args.shard[1]} has no image: the list has {len(images)}")
        out, provenance["rows"] = shard_path(out, *args.shard), [start, stop, len(images)]
        images = images[start:stop]
    distractors = ImageSet(out, "distractors", images, provenance=provenance, fingerprinted=False)
    log.info("checkpoint: %s, SHA-256 %s", recipe.checkpoint, recipe.checkpoint_sha256)
    with owned(out) if session.first else nullcontext():
        if session.first:
            if is_finished(out, {**recipe.provenance(), **distractors.provenance}, args.resume):
                log.info("%s is complete already, extracted from the same checkpoint, settings and list", out)
            else:
                check_disk(out, len(images) * recipe.dim * 4)
                if args.on_error == "stop":
                    check_images(images)

        loading = make_loading(cfg, session.device)
        store = extract_shared(distractors, recipe, session.device, processes, loading, args.resume, args.on_error)
        if store is not None and not store.complete:
            skipped = [images.name(row) for row in (~nonzero_rows(store.part_rows())).nonzero()[0].tolist()]
            if skipped:
                log.warning("%d images could not be read and have rows of zeros: %s", len(skipped), short_list(skipped))
            log.info("writing %s", out)
            store.finish({"skipped": skipped, **session.head})
            log.info("%s: %d descriptors of %d dimensions", out, len(images), recipe.dim)
        processes.end()


def parse(argv: list[str]) -> Parsed:
    instead = {"TEST.RESUME": "it has --resume and --no-resume", "TEST.DATA_DIR": "it has --data-dir"}
    instead |= {"TEST.OUT_DIR": "it has --out"}
    line = CommandLine(__doc__, (*NETWORK, *LOADING, "TEST.DEVICE"), instead)
    line.add_flag("--weight", "TEST.WEIGHTS", metavar="FILE", help="the checkpoint")
    line.add_flag("--depth", "MODEL.DEPTH", type=int, choices=(50, 101), help="layers of the ResNet encoder")
    line.add(
        "--data-dir", type=Path, default=Path("revisitop/revisitop1m"), metavar="DIR",
        help="folder of revisitop1m.txt, with the images in it or in its jpg/ [revisitop/revisitop1m]",
    )  # fmt: skip
    line.add("--out", type=Path, metavar="FILE", help=".pth or .npy file [feats_1m_RN<depth>.pth]")
    line.add("--shard", type=shard, metavar="I/N", help="extract only one of N parts of the list, I from 0")
    line.add(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="resume an interrupted run; --no-resume starts over [--resume]",
    )  # fmt: skip
    line.add(
        "--on-error", choices=("stop", "skip"), default="stop",
        help="for an image that cannot be read: end the run, or write a row of zeros [stop]",
    )  # fmt: skip
    parsed = line.parse(argv)
    for flag, key in (("--weight FILE", "TEST.WEIGHTS"), ("--depth N", "MODEL.DEPTH")):
        if key not in parsed.given and parsed.cfg.MODEL.NAME == "cvnet":
            raise InputError(f"{flag} is missing; see --help")
    out = parsed.args.out
    if out is not None and out.suffix not in (".pth", ".npy"):
        raise InputError(f"--out {out} must end in .pth or .npy")
    if parsed.args.shard and (out is None or out.suffix != ".npy"):
        raise InputError("--shard needs --out NAME.npy, after which the shard is named")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    return parsed


def shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) <= 99999):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(number), int(count)


def is_finished(out: Path, provenance: dict, resume: bool) -> bool:
    """Returns whether the file exists with the same provenance. Raises InputError if its provenance differs."""
    from extraction.store import provenance_differences, provenance_path

    if not resume or not out.exists() or Path(f"{out}.part").exists():
        return False
    differing = provenance_differences(out, provenance)
    if differing is None:
        raise InputError(f"{out} exists without {provenance_path(out).name}; give another --out, or --no-resume")
    if differing:
        settings = short_list(differing)
        raise InputError(f"{out} was extracted with other settings ({settings}); give another --out, or --no-resume")
    return True


def check_images(images: "Sequence[ImageFile]") -> None:
    from tqdm import tqdm

    bar = tqdm(images, desc="looking for the images", unit="img", dynamic_ncols=True)
    missing = [image.path for image in bar if not image.path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(images)} images are missing ({short_list(missing)}); get them, or give "
            "--on-error skip to write rows of zeros for them"
        )


def check_disk(out: Path, size: int) -> None:
    """Raises InputError if there is not enough space: the rows of the .part file are copied to the final file."""
    there = sum(path.stat().st_size for path in (Path(f"{out}.part"), out) if path.exists())
    needed = size * (2 if out.suffix == ".pth" else 1) - there
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(f"{out.parent.absolute()} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed")


if __name__ == "__main__":
    run_command(main)
