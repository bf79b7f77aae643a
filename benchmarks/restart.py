"""Time the restart of a finished extraction of GLDv2's size, until it finds that nothing is missing.

    python benchmarks/restart.py --images 761757 --folder /tmp/restart

Creates the lists, and tiny files in GLDv2's layout (links to a few images), extracts them with a substitute for a
network (8 dimensions), and times a second start in a new process: reading the lists, finding every file, and comparing
its size and time with those of the finished descriptors. The folder is kept for the next time.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from extraction.extract import ImageSet, extract_sets
from report.command import run_command
from revisitop.layouts import load_dataset

DIM = 8


class Stand:
    """An extractor that takes no time."""

    dim, device = DIM, torch.device("cpu")

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize(pixels.flatten(1)[:, :DIM].float() + 1, dim=1)


class StandRecipe:
    dim = DIM

    def extractor(self, device: torch.device) -> Stand:
        return Stand()

    def provenance(self) -> dict:
        return {"network": "a stand-in"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=761_757, help="[761757]")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = args.folder.absolute() / f"landmarks_{args.images}"
    if args.start:
        print(json.dumps(start(folder)))
        return
    if not (folder / "solution.csv").exists():
        draw(folder, args.images)
    command = [sys.executable, __file__, "--folder", str(args.folder), "--images", str(args.images), "--start"]
    for title in ("first start", "second start"):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        facts = json.loads(done.stdout.splitlines()[-1])
        print(f"{title}: {facts['seconds']:.1f} s, peak {facts['bytes'] / 1e9:.2f} GB, {facts['used']}")


def start(folder: Path) -> dict:
    began = time.perf_counter()
    dataset = load_dataset(folder.name, folder.parent)
    dataset.check_files()
    fingerprint = dataset.fingerprint
    path = folder.parent / f"{folder.name}.npy"
    used = "reused" if path.exists() else "extracted"
    each = ImageSet(path, "index", dataset.database, folder, {"images": fingerprint})
    (rows,) = extract_sets([each], StandRecipe(), torch.device("cpu"))
    assert rows.shape == (len(dataset.database), DIM)
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.perf_counter() - began, "bytes": most, "used": used}


def draw(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"{number:08x}{'0' * 8}"[::-1] for number in range(count)]
    (folder / "queries").mkdir(parents=True)
    tiny = folder / "tiny"
    tiny.mkdir()
    for number in range(20):  # a file can have 65,000 links
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tiny / f"{number}.jpg")
    Image.open(tiny / "0.jpg").save(folder / "queries" / "q.jpg")
    for number, name in enumerate(names):
        place = folder / "index" / name[0] / name[1] / name[2]
        if number < 4096 or not place.exists():
            place.mkdir(parents=True, exist_ok=True)
        os.link(tiny / f"{number % 20}.jpg", place / f"{name}.jpg")
    (folder / "index.csv").write_text("\n".join(["id", *names, ""]))
    (folder / "queries.csv").write_text("id\nq\n")
    (folder / "solution.csv").write_text(f"id,images\nq,{names[0]}\n")


if __name__ == "__main__":
    run_command(main)
