"""Extract the descriptors of the 1,001,001 distractors of revisitop1m, for test.py with SupG.onemeval.

python extract_rop1m.py --weight ./weights/CVPR2022_CVNet_R50.pyth --depth 50
torchrun --nproc-per-node=8 extract_rop1m.py --weight ./weights/CVPR2022_CVNet_R50.pyth --depth 50
python extract_rop1m.py --weight ./weights/CVPR2022_CVNet_R50.pyth --depth 50 --out feats.npy --shard 3/64
python extract_rop1m.py MODEL.NAME timm:resnet50.a1_in1k

It can be interrupted at any moment, by a power cut, too: the same command resumes. With --shard, numbered from 0, any
number of machines extract parts of the list independently, into blocks in the folder feats.npy.blocks, which they share
or which are copied together later; the same command without --shard then makes the file of all parts.
"""

from report.command import run_command  # isort: skip  # first, see there

import argparse
import logging
import shutil
from pathlib import Path

from config import LOADING, NETWORK, CommandLine, Parsed
from model.errors import InputError

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    args, cfg, _ = parse(argv)
    # Imported here, so that --help and errors about options appear at once.
    from assembly import find_recipe, log_recipe, make_loading, network_title, option, start_session
    from extraction.extract import ImageSet, extract_sets
    from revisitop.layout_revisitop import load_distractor_list

    out = args.out or Path(f"feats_1m_{network_title(cfg, 'RN')}.pth")
    session = start_session(cfg)
    log.info("%r", session.processes)

    # Everything is checked before the long computations begin.
    recipe = find_recipe(cfg)
    with option("--data-dir"):
        _, images = load_distractor_list(args.data_dir)
    if session.first:
        check_disk(out, len(images) * recipe.dim * 4)
    if args.shard:
        number, count = args.shard
        images = images[len(images) * number // count : len(images) * (number + 1) // count]
        if not len(images):
            raise InputError(f"--shard {number}/{count} has no image: the list is shorter")
    log_recipe(recipe)

    distractors = ImageSet(out, "distractors", images, args.data_dir)
    extract_sets(
        [distractors], recipe, session.device, make_loading(cfg, session.device), args.resume, args.on_error,
        session.processes, replace=not args.resume, facts=session.head, finish=not args.shard,
    )  # fmt: skip
    session.processes.end()
    if args.shard and not Path(f"{out}.blocks").exists():
        log.info("%s has these %d descriptors already", out, len(images))
    elif args.shard:
        log.info("%d descriptors are in %s.blocks; when all parts are there, start without --shard", len(images), out)
    else:
        log.info("%s: %d descriptors of %d dimensions", out, len(images), recipe.dim)


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
        help="for images that cannot be read: an error after all others, or rows of zeros [stop]",
    )  # fmt: skip
    parsed = line.parse(argv)
    for flag, key in (("--weight FILE", "TEST.WEIGHTS"), ("--depth N", "MODEL.DEPTH")):
        if key not in parsed.given and parsed.cfg.MODEL.NAME == "cvnet":
            raise InputError(f"{flag} is missing; see --help")
    args = parsed.args
    if args.out is not None and args.out.suffix not in (".pth", ".npy"):
        raise InputError(f"--out {args.out} must end in .pth or .npy")
    if args.out is not None and not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent}")
    if args.shard and not args.resume:
        raise InputError("--no-resume would remove the parts of other machines: leave --shard out")
    return parsed


def shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) <= 99999):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(number), int(count)


def check_disk(out: Path, size: int) -> None:
    """Raises InputError if there is not enough space for the blocks and the file that is made of them."""
    existing = [*Path(f"{out}.blocks").glob("*"), *([out] if out.exists() else [])]
    needed = 2 * size - sum(path.stat().st_size for path in existing) if not out.exists() else 0
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(f"{out.parent.absolute()} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed")


if __name__ == "__main__":
    run_command(main)
