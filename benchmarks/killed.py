"""Kill commands at random moments, and check that they resume to exactly the results of an uninterrupted run.

    python benchmarks/killed.py --tries 200
    python benchmarks/killed.py --tries 0 --together 20

Each try runs one of the commands (test.py, extract_rop1m.py as one and as two processes, search with a changing list,
tables, on a few drawn images; test.py on toy with distractors as two and three ranks), kills it and all its processes
(SIGKILL) at a random moment, up to three times, then runs it to its end, and compares every descriptor file, and the
metrics, with those of an uninterrupted run (for ranks, of a single process). In "a rank", one of two ranks is killed
under --max-restarts 3, and the command is not started again.
With --together TIMES, two and four runs of test.py, with equal and with different settings, are started at once in one
folder, that many times; each must produce the metrics and descriptors of a run on its own.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from report.command import run_command
from revisitop import toy

ROOT = Path(__file__).parents[1]
QUICK = ["TEST.SCALE_LIST", "1", "DATA_LOADER.NUM_WORKERS", "0", "TEST.BATCH_SIZE", "2"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200, help="[200]")
    parser.add_argument(
        "--commands", nargs="+", metavar="NAME", help='only these, such as "two ranks" [all], each in its turn'
    )
    parser.add_argument(
        "--together", type=int, default=0, metavar="TIMES", help="test runs that start at once, this often [0]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments [0]")
    args = parser.parse_args(argv)
    rng, survived, tried = random.Random(args.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        commands = prepare(work)
        chosen = args.commands or [name for name in commands if name != "one process"]
        if unknown := sorted({*chosen} - {*commands}):
            sys.exit(f"no command {', '.join(unknown)}; there are {', '.join(commands)}")
        failed = together(commands["test.py"], work, args.together) if args.together else 0
        if not args.tries:
            sys.exit(bool(failed))
        wanted, seconds = {}, {}
        if any("rank" in name for name in chosen):
            end(commands["one process"], work / "one process")
        for name in chosen:
            began = time.monotonic()
            end(commands[name], work / name)
            wanted[name], seconds[name] = outcome(work / name), time.monotonic() - began
            if not wanted[name]:
                sys.exit(f"{name} wrote nothing:\n{(work / name / 'said.txt').read_text()}")
            if "rank" in name and wanted[name] != outcome(work / "one process"):
                sys.exit(f"{name} differ from one process:\n{(work / name / 'said.txt').read_text()}")
        for number in tqdm(range(args.tries), unit="try"):
            name = chosen[number % len(chosen)]
            place = work / f"try-{number}"
            extra = work / "images" / f"new-{number}.png"
            if name == "search":  # the killed run has its own list
                shutil.copy(work / "images" / "1.png", extra)
            moments = [rng.uniform(0.3, 1) * seconds[name] for _ in range(rng.choice((1, 1, 2, 3)))]
            if name == "a rank":
                kills = kill(commands[name], place, moments[0], a_rank=True)
                said = (place / "said.txt").read_text(errors="replace")
            else:
                kills = sum(kill(commands[name], place, moment) for moment in moments)
                extra.unlink(missing_ok=True)
                said = end(commands[name], place)
            tried[name] += 1
            if outcome(place) == wanted[name]:
                survived[name] += 1
            else:
                print(f"\n{name}, try {number}, killed {kills} times, failed:\n{said}", file=sys.stderr)
            shutil.rmtree(place)
    for name in chosen:
        print(f"{name:<14}{survived[name]:4d} of {tried[name]} identical to an uninterrupted run")
    if failed or survived.total() < tried.total():
        sys.exit(1)


def prepare(work: Path) -> dict[str, list[str]]:
    """Draws the data for the commands, and returns the commands."""
    data, images = work / "data", work / "images"
    images.mkdir(parents=True)
    checkpoint = work / "R50.pyth"
    torch.save(toy.seeded_checkpoint(50), checkpoint)
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(images / f"{number}.png")
    layout = data / "roxford5k"
    (layout / "jpg").mkdir(parents=True)
    names = [f"db_{number}" for number in range(20)] + [f"query_{number}" for number in range(3)]
    for number, name in enumerate(names):
        Image.open(images / f"{number}.png").save(layout / "jpg" / f"{name}.jpg")
    truth = [{"bbx": [0, 0, 40, 40], "easy": [q], "hard": [q + 3], "junk": [q + 6]} for q in range(3)]
    content = {"imlist": names[:20], "qimlist": names[20:], "gnd": truth}
    (layout / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    (images / "revisitop1m.txt").write_text("".join(f"{number}.png\n" for number in range(24)))

    weights = ["TEST.WEIGHTS", str(checkpoint), *QUICK]
    dataset = ["TEST.DATA_DIR", str(data), "TEST.DATASET_LIST", "roxford5k"]
    extract = [str(ROOT / "extract_rop1m.py"), "--depth", "50", "--data-dir", str(images), *weights]
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    torchrun = [*launcher, "--nproc-per-node=2"]
    far = rng.standard_normal((50, 2048), dtype=np.float32)
    np.save(work / "far.npy", far / np.linalg.norm(far, axis=1, keepdims=True))
    toy.ensure_dataset(data)
    with_far = [str(ROOT / "test.py"), "TEST.DATA_DIR", str(data), "TEST.DATASET_LIST", "toy", *weights]
    with_far += ["SupG.onemeval", "TEST.DISTRACTORS", str(work / "far.npy")]
    search = ["-m", "tools.search", "--database", str(images), "--queries", str(images / "3.png"), "--json", *weights]
    return {
        "test.py": [str(ROOT / "test.py"), *dataset, *weights],
        "extract": [*extract, "--out", "feats.pth"],
        "two processes": [*torchrun, *extract, "--out", "feats.npy"],
        "search": search,
        "tables": ["-m", "tools.tables", "main", "--depth", "50", *dataset, *weights],
        "one process": with_far,
        "two ranks": [*torchrun, *with_far],
        "three ranks": [*launcher, "--nproc-per-node=3", *with_far],
        "a rank": [*torchrun, "--max-restarts=3", *with_far],
    }


def together(command: list[str], work: Path, times: int) -> int:
    """Starts two and four runs at once in a new folder, `times` times; returns the number of failures."""
    settings = [[], ["SupG.gemp", "False"], ["TEST.RESUME", "False"], ["SupG.gemp", "False", "TEST.RESUME", "False"]]
    wanted: dict[str, object] = {}
    for words in settings[:2]:
        end([*command, *words], work / "alone")
        wanted |= kept_rows(work / "alone")
    wrong = 0
    sets = [[0, 0], [0, 1], [2, 2], [2, 3], [0, 0, 0, 0], [0, 1, 2, 3], [2, 2, 2, 2]]
    for number in tqdm(range(times), unit="try"):
        place, chosen = work / f"together-{number}", sets[number % len(sets)]
        runs = [start([*command, *settings[which]], place, f"said-{i}.txt") for i, which in enumerate(chosen)]
        codes = [run.wait() for run in runs]
        found = kept_rows(place)
        if any(codes) or any(wanted[name] != value for name, value in found.items()):
            wrong += 1
            said = "\n".join(path.read_text(errors="replace") for path in sorted(place.glob("said-*")))
            print(f"\n{chosen}, try {number}, failed ({codes}):\n{said}", file=sys.stderr)
        shutil.rmtree(place)
    print(f"together      {times - wrong:4d} of {times} identical to single runs")
    return wrong


def kept_rows(place: Path) -> dict[str, object]:
    """Returns descriptors by file, and metrics by the folder of their descriptors, which must agree."""
    found: dict[str, object] = {
        str(path.relative_to(place)): path.read_bytes() for path in place.glob("output/descriptors/*/*.npy")
    }
    for path in place.glob("output/runs/2*/results.json"):
        entry = json.loads(path.read_text())["datasets"]["roxford5k"]
        metrics = {stage: entry[stage]["M"] for stage in ("retrieval", "reranking")}
        name = f"metrics of {entry['descriptors']}"
        found[name] = metrics if found.get(name, metrics) == metrics else "different metrics with equal settings"
    return found


def start(command: list[str], place: Path, log: str = "said.txt") -> subprocess.Popen:
    place.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = (place / log).open("w")
    return subprocess.Popen(
        [sys.executable, *command], cwd=place, env=environment, stdout=said, stderr=said, start_new_session=True
    )


def kill(command: list[str], place: Path, seconds: float, a_rank: bool = False) -> bool:
    """Starts the command, and kills it and its processes after `seconds`; returns whether it was still running.

    Args:
        a_rank: kills only the last process that it started, and waits for the end of the command.
    """
    process = start(command, place)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        if not a_rank:
            os.killpg(process.pid, signal.SIGKILL)
        elif children := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(children[-1]), signal.SIGKILL)
        process.wait()
        return True


def end(command: list[str], place: Path) -> str:
    """Runs the command to its end, and returns its output."""
    start(command, place).wait()
    return (place / "said.txt").read_text(errors="replace")


def outcome(place: Path) -> dict[str, object]:
    """Returns the bytes of descriptors and of the newest run's rankings by file, and its metrics."""
    found: dict[str, object] = {}
    newest = place / "output" / "runs" / "latest"
    earlier = [path for path in newest.parent.glob("*") if not path.is_symlink()]
    for path in [*sorted(place.rglob("*")), *sorted(newest.glob("*"))]:
        if any(path.is_relative_to(run) for run in earlier):
            continue
        name = str(path.relative_to(place))
        if path.suffix in (".npy", ".pth"):
            found[name] = path.read_bytes()
        elif path.name == "results.json":
            (entry,) = json.loads(path.read_text())["datasets"].values()
            found[name] = {stage: entry[stage]["M"] for stage in ("retrieval", "reranking")}
    return found


if __name__ == "__main__":
    run_command(main)
