"""Show where two images match: what each place in them adds to the cosine of their descriptors.

python -m tools.match A.jpg B.jpg --out pair.png
python -m tools.match A.jpg B.jpg --out pair.png MODEL.NAME timm:resnet50

Places that speak for the match are yellow to red, places that speak against it blue, on one scale for both images.
"""

from report.command import run_command  # isort: skip  # first, see there

import argparse
import logging
from pathlib import Path

from config import NETWORK, CommandLine, Parsed

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    args, cfg, _ = parse(argv)

    # Imported here, so that --help and errors about options appear at once.
    from assembly import find_recipe, log_recipe, match_images, start_session
    from extraction.files import write_atomically
    from extraction.images import ImageFile
    from report.drawing import save_match

    images = [ImageFile(path).read() for path in (args.first, args.second)]
    session = start_session(cfg)
    recipe = find_recipe(cfg)
    match = match_images(recipe, session.device, *images)
    log_recipe(recipe)
    log.info("cosine of %s and %s: %.4f", args.first, args.second, match.cosine)
    for path, positions, constant in zip((args.first, args.second), match.maps, match.constants, strict=True):
        log.info("%s: places %.4f, constants %.4f", path, positions.sum(), constant)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, lambda file: save_match(match, images, file))
    log.info("the images with their maps are in %s", args.out)


def parse(argv: list[str]) -> Parsed:
    line = CommandLine(__doc__, (*NETWORK, "DATA_LOADER.MAX_PIXELS", "TEST.DEVICE"))
    line.add("first", type=Path, metavar="A", help="an image")
    line.add("second", type=Path, metavar="B", help="another image")
    line.add("--out", type=png, required=True, metavar="FILE.png", help="where both are drawn with their maps")
    line.add_weights()
    return line.parse(argv)


def png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a PNG file")
    return Path(text)


if __name__ == "__main__":
    run_command(main)
