"""Check that commands survive being killed and run at the same time, and measure the restart of a finished extraction.

    python benchmarks/reliability.py killed --tries 200
    python benchmarks/reliability.py together --tries 20
    python benchmarks/reliability.py sequences --tries 300
    python benchmarks/reliability.py restart --folder /tmp/restart
    python benchmarks/reliability.py mutated --tries 100000

killed     Each try runs one of the commands (test.py, extract_rop1m.py as one and as two processes, search with a
           changing list, tables, on a few drawn images; test.py on toy with distractors as two and three ranks), kills
           it and all its processes (SIGKILL) at a random moment, up to three times, runs it to its end, and compares
           every descriptor file, ranking and metric with those of an uninterrupted run (for ranks, of one process). In
           "a rank", one of two ranks is killed under --max-restarts 3, and the command is not started again.
together   Each try starts two or four runs of test.py at once in one folder, with equal and with different settings;
           each must produce the metrics and descriptors of a run on its own.
sequences  Each try is a random sequence of changes of images, lists, options, weights, code and saved files, after each
           of which a command must give the same in an old and in a new output folder, see tests/sequences.py. The
           seed of a try is --seed plus its number; a failing sequence is shrunk and printed.
restart    test.py on a dataset of GLDv2's size and layout, whose images are links to a few tiny ones, with a network
           that takes no time: the second start reads the lists, finds every file, and finds that nothing is missing.
           The folder is kept for the next time.
mutated    tests/fuzz with as many mutated files: each must give a value or one line, within limits of time and memory.
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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from alternate import positive
from PIL import Image
from tqdm import tqdm

from model.errors import InputError
from report.command import run_command
from revisitop import toy

ROOT = Path(__file__).parents[1]
QUICK = ["TEST.SCALE_LIST", "1", "DATA_LOADER.NUM_WORKERS", "0", "TEST.BATCH_SIZE", "2"]
OUTPUT = "output.txt"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("killed", "together", "sequences", "restart", "mutated"))
    parser.add_argument("--tries", type=positive, default=200, help="[200]")
    parser.add_argument("--commands", nargs="+", metavar="NAME", help='kill only these, such as "two ranks" [all]')
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments, or of the first sequence [0]")
    parser.add_argument("--steps", type=positive, default=6, help="steps of a sequence [6]")
    parser.add_argument("--images", type=positive, default=761_757, help="images of restart [761757]")
    parser.add_argument("--folder", type=Path, help="folder for the images of restart")
    args = parser.parse_args(argv)
    if args.part == "restart":
        if args.folder is None:
            parser.error("restart needs a --folder")
        restart(args.folder.absolute(), args.images)
        return
    if args.part == "sequences":
        sys.exit(bool(sequences(range(args.seed, args.seed + args.tries), args.steps)))
    if args.part == "mutated":
        sys.exit(mutated(args.tries))
    with tempfile.TemporaryDirectory() as folder:
        commands = prepare(work := Path(folder))
        if args.part == "together":
            failures = together(commands["test.py"], work, args.tries)
        else:
            names = args.commands or [name for name in commands if name != "one process"]
            if unknown := ", ".join({*names} - {*commands}):
                raise InputError(f"no command {unknown}; there are {', '.join(commands)}")
            failures = killed(commands, names, work, args.tries, random.Random(args.seed))
    sys.exit(bool(failures))


def prepare(work: Path) -> dict[str, list[str]]:
    """Draws the data for the commands, and returns the commands by name."""
    data, images, checkpoint = work / "data", work / "images", work / "R50.pyth"
    layout = data / "roxford5k"
    (layout / "jpg").mkdir(parents=True)
    images.mkdir()
    torch.save(toy.seeded_checkpoint(50), checkpoint)
    rng = np.random.default_rng(0)
    names = [f"db_{number}" for number in range(20)] + [f"query_{number}" for number in range(4)]
    for number, name in enumerate(names):
        image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        image.save(images / f"{number}.png")
        image.save(layout / "jpg" / f"{name}.jpg")
    truth = [{"bbx": [0, 0, 40, 40], "easy": [q], "hard": [q + 4], "junk": [q + 8]} for q in range(4)]
    content = {"imlist": names[:20], "qimlist": names[20:], "gnd": truth}
    (layout / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    (images / "revisitop1m.txt").write_text("".join(f"{number}.png\n" for number in range(24)))
    rows = rng.standard_normal((50, 2048), dtype=np.float32)
    np.save(work / "distractors.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    toy.ensure_dataset(data)

    weights = ["TEST.WEIGHTS", str(checkpoint), *QUICK]
    test, dataset = [str(ROOT / "test.py"), "TEST.DATA_DIR", str(data), *weights], ["TEST.DATASET_LIST", "roxford5k"]
    extract = [str(ROOT / "extract_rop1m.py"), "--depth", "50", "--data-dir", str(images), *weights]
    search = ["-m", "tools.search", "--database", str(images), "--queries", str(images / "3.png"), "--json"]
    tables = ["-m", "tools.tables", "main", "--depth", "50", "TEST.DATA_DIR", str(data), *dataset]
    distractors = ["SupG.onemeval", "TEST.DISTRACTORS", str(work / "distractors.npy")]
    on_toy = [*test, "TEST.DATASET_LIST", "toy", *distractors]
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    return {
        "test.py": [*test, *dataset],
        "extract": [*extract, "--out", "feats.pth"],
        "two processes": [*torchrun, "--nproc-per-node=2", *extract, "--out", "feats.npy"],
        "search": [*search, *weights],
        "tables": [*tables, *weights],
        "one process": on_toy,
        "two ranks": [*torchrun, "--nproc-per-node=2", *on_toy],
        "three ranks": [*torchrun, "--nproc-per-node=3", *on_toy],
        "a rank": [*torchrun, "--nproc-per-node=2", "--max-restarts=3", *on_toy],
    }


def killed(commands: dict[str, list[str]], names: list[str], work: Path, tries: int, rng: random.Random) -> int:
    """Kills the commands in turn, compares their results, and returns the number of failures."""
    expected, seconds, identical = {}, {}, dict.fromkeys(names, 0)
    for name in dict.fromkeys((*(["one process"] if any("rank" in name for name in names) else []), *names)):
        began = time.monotonic()
        text = finish(commands[name], work / name)
        expected[name], seconds[name] = results(work / name), time.monotonic() - began
        if not expected[name] or ("rank" in name and expected[name] != expected["one process"]):
            sys.exit(f"{name} wrote nothing, or not what one process writes:\n{text}")
    for number in tqdm(range(tries), unit="try"):
        name, folder = names[number % len(names)], work / f"try-{number}"
        new_image = work / "images" / "new.png"
        if name == "search":  # the killed run has another list
            shutil.copy(work / "images" / "1.png", new_image)
        moments = [rng.uniform(0.3, 1) * seconds[name] for _ in range(rng.choice((1, 1, 2, 3)))]
        if name == "a rank":
            kill(commands[name], folder, moments[0], a_rank=True)
            text = (folder / OUTPUT).read_text(errors="replace")
        else:
            for moment in moments:
                kill(commands[name], folder, moment)
            new_image.unlink(missing_ok=True)
            text = finish(commands[name], folder)
        if results(folder) == expected[name]:
            identical[name] += 1
        else:
            print(f"\n{name}, try {number}, killed after {moments} s, differs:\n{text}", file=sys.stderr)
        shutil.rmtree(folder)
    for number, name in enumerate(names):
        print(f"{name:<14}{identical[name]:4d} of {len(range(number, tries, len(names)))} as if uninterrupted")
    return tries - sum(identical.values())


def together(command: list[str], work: Path, tries: int) -> int:
    """Starts two or four runs at once in a new folder for each try, and returns the number of failures."""
    settings = [[], ["SupG.gemp", "False"], ["TEST.RESUME", "False"], ["SupG.gemp", "False", "TEST.RESUME", "False"]]
    for words in settings[:2]:
        finish([*command, *words], work / "alone")
    expected, failures = results_of_all_runs(work / "alone"), 0
    sets = [[0, 0], [0, 1], [2, 2], [2, 3], [0, 0, 0, 0], [0, 1, 2, 3], [2, 2, 2, 2]]
    for number in tqdm(range(tries), unit="try"):
        folder, numbers = work / f"together-{number}", sets[number % len(sets)]
        runs = [start([*command, *settings[which]], folder, f"{place}-{OUTPUT}") for place, which in enumerate(numbers)]
        codes = [run.wait() for run in runs]
        found = results_of_all_runs(folder)
        if any(codes) or not found or any(expected[name] != value for name, value in found.items()):
            failures += 1
            text = "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob(f"*-{OUTPUT}")))
            print(f"\n{numbers}, try {number}, differs (exit codes {codes}):\n{text}", file=sys.stderr)
        shutil.rmtree(folder)
    print(f"together      {tries - failures:4d} of {tries} identical to single runs")
    return failures


def sequences(seeds: Sequence[int], count: int) -> int:
    """Makes the changes of a sequence for each seed, and returns the number of failures."""
    sys.path.insert(0, str(ROOT / "tests"))
    from sequences import play, shrunk

    failures, made = 0, 0
    for seed in tqdm(seeds, unit="sequence"):
        with tempfile.TemporaryDirectory() as folder:
            steps: list[str] = []
            found, made = play(Path(folder), seed, range(count), steps), made + len(steps)
        if found:
            failures += 1
            with tempfile.TemporaryDirectory() as folder:
                lines = shrunk(Path(folder), seed, range(count))
            print(f"\nseed {seed}: {found}", *steps, "shrunk to:", *lines, sep="\n  ", file=sys.stderr)
    print(f"sequences     {len(seeds) - failures:4d} of {len(seeds)}, with {made} changes, as in a new folder")
    return failures


def mutated(tries: int) -> int:
    """Runs the tests of damaged files with this many inputs, and returns their exit code."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-s", "-v", ROOT / "tests" / "fuzz"]
    return subprocess.run(command, env={**os.environ, "FUZZ_INPUTS": str(tries)}, cwd=ROOT, check=False).returncode


def restart(folder: Path, count: int) -> None:
    """Prints the seconds and the peak memory of two starts of test.py, the first of which may extract."""
    name = f"landmarks_{count}"
    if not (folder / name / "solution.csv").exists():
        draw_landmarks(folder / name, count)
    command = [str(ROOT / "test.py"), "TEST.DATA_DIR", str(folder), "TEST.DATASET_LIST", name, "TEST.DEVICE", "cpu"]
    command += [
        "MODEL.NAME",
        f"{folder / name}/network.py:build",
        "TEST.WEIGHTS",
        "untrained",
        "MODEL.POOLING",
        "average",
    ]
    command += ["SupG.rgem", "False", "SupG.relup", "False", "SupG.sgem", "False", "TEST.SCALE_LIST", "1"]
    for title in ("first start", "second start"):
        began, process = time.perf_counter(), start(command, folder)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit((folder / OUTPUT).read_text())
        print(f"{title}: {time.perf_counter() - began:.1f} s, peak {1024 * usage.ru_maxrss / 1e9:.2f} GB", flush=True)


def draw_landmarks(folder: Path, count: int) -> None:
    """Writes a network, the lists of a dataset in GLDv2's layout, and its images, as links to twenty tiny ones."""
    rng, names = np.random.default_rng(0), [f"{number:08x}{'0' * 8}"[::-1] for number in range(count)]
    tiny = folder / "tiny"
    for place in (tiny, folder / "queries", *{folder / "index" / "/".join(name[:3]) for name in names}):
        place.mkdir(parents=True, exist_ok=True)
    for number in range(20):  # a file can have 65,000 links
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tiny / f"{number}.jpg")
    shutil.copy(tiny / "0.jpg", folder / "queries" / "q.jpg")
    for number, name in enumerate(names):
        os.link(tiny / f"{number % 20}.jpg", folder / "index" / "/".join(name[:3]) / f"{name}.jpg")
    (folder / "network.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Conv2d(3, 8, 32, 32)\n")
    (folder / "index.csv").write_text("\n".join(["id", *names, ""]))
    (folder / "queries.csv").write_text("id\nq\n")
    (folder / "solution.csv").write_text(f"id,images\nq,{names[0]}\n")


def start(command: list[str], folder: Path, output: str = OUTPUT) -> subprocess.Popen:
    """Starts a command of this project in the folder, with its output in a file."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / output).open("w") as file:
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def kill(command: list[str], folder: Path, seconds: float, a_rank: bool = False) -> None:
    """Starts the command, and kills it and its processes after `seconds`, if it is still running.

    Args:
        a_rank: kills only the last process that it started, and waits for the end of the command.
    """
    process = start(command, folder)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        groups = [process.pid, *map(int, children)]  # torchrun starts each rank in a group of its own
        for group in groups if not a_rank else groups[1:][-1:]:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        process.wait()


def finish(command: list[str], folder: Path) -> str:
    """Runs the command to its end, and returns its output."""
    start(command, folder).wait()
    return (folder / OUTPUT).read_text(errors="replace")


def results(folder: Path) -> dict[str, object]:
    """Returns the bytes of descriptors and of the newest run's rankings by file, and its metrics."""
    runs = folder / "output" / "runs"
    files = [path for path in folder.rglob("*") if path.suffix in (".npy", ".pth") and not path.is_relative_to(runs)]
    files += (runs / "latest").glob("*.npy")
    found: dict[str, object] = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return found | {path.name: metrics_of(path) for path in (runs / "latest").glob("results.json")}


def results_of_all_runs(folder: Path) -> dict[str, object]:
    """Returns descriptors by file, and metrics by the folder of their descriptors, which must agree."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("output/descriptors/*/*.npy")}
    for path in folder.glob("output/runs/2*/results.json"):
        descriptors, metrics = metrics_of(path)
        name = f"metrics of {descriptors}"
        found[name] = metrics if found.get(name, metrics) == metrics else "different metrics with equal settings"
    return found


def metrics_of(file: Path) -> tuple[str, dict]:
    """Returns the folder of the descriptors and the metrics in a results.json of one dataset."""
    (entry,) = json.loads(file.read_text())["datasets"].values()
    return entry["descriptors"], {stage: entry[stage]["M"] for stage in ("retrieval", "reranking")}


if __name__ == "__main__":
    run_command(main)
