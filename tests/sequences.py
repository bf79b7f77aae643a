"""Random sequences of changes: after each, a run in an old folder must equal a run in a new folder.

A World is a folder with a dataset, a network in files of its user, and options. A change is a function of CHANGES that
alters something of it, or what earlier runs left in the old folder. Each step draws from a seed of its own, so that a
failing sequence still fails after steps that do not matter are dropped from it, see shrink.
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from conftest import ROOT, Outcome, latest, run_script
from forked import Forked
from PIL import Image

from config import INDEX, LOADING, NETWORK, OPTIONS, RERANKING, idle_options, make_config
from extraction.store import Store
from model.errors import InputError

NAME = "shop"  # of the dataset
BYTES = 4096  # of each image file: decoders ignore what follows the end of a JPEG
NETWORK_FILE = """
import json
import pathlib
import torch
from {helper} import Power

def build():
    torch.manual_seed({seed})
    power = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
    layer1 = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, 4), torch.nn.ReLU())
    return torch.nn.Sequential(__import__("collections").OrderedDict(layer1=layer1, last=Power(power))).eval()
"""
HELPER_FILE = """
import torch

class Power(torch.nn.Module):
    def __init__(self, power):
        super().__init__()
        self.power = power

    def forward(self, x):
        return x.relu() ** self.power * {factor}
"""
# Values of options that change numbers; those that have no effect together with the others are left out.
VALUES = {
    "TEST.SCALE_LIST": ("1", "3", "0.5,1"), "TEST.MAX_SIDE": ("24", "36"), "TEST.PRECISION": ("bf16",),
    "TEST.RESUME": ("False",), "MODEL.POOLING": ("average", "max"),
    "SupG.gemp": ("False",), "SupG.gemp_p": ("2",), "SupG.rgem": ("False",), "SupG.rgem_p": ("4",),
    "SupG.rgem_window": ("3",), "SupG.sgem": ("False",), "SupG.sgem_p": ("2",), "SupG.relup": ("False",),
    "SupG.relup_stages": ("layer1",), "SupG.relup_threshold": ("0.2",),
    "TEST.RERANKER": ("none", "aqe", "superglobal,alpha-qe", "dba", "k-reciprocal", "diffusion"),
    "SupG.rerank_m": ("5", "9"), "SupG.rerank_k": ("2", "4"), "SupG.rerank_beta": ("0.5",),
    "SupG.rerank_s2": ("original",), "RERANK.QE_N": ("2",), "RERANK.QE_ALPHA": ("1",), "RERANK.DBA_K": ("3",),
    "RERANK.K1": ("4",), "RERANK.K2": ("2",), "RERANK.LAMBDA": ("0.7",), "RERANK.DIFFUSION_K": ("4",),
    "RERANK.DIFFUSION_KQ": ("2",), "RERANK.DIFFUSION_GAMMA": ("1",), "RERANK.DIFFUSION_ALPHA": ("0.5",),
    "TEST.INDEX": ("Flat", "IVF2,Flat", "SQ8"), "TEST.INDEX_ROWS": ("decoded",), "TEST.INDEX_SEARCH": ("nprobe=1",),
}  # fmt: skip
# What the user's network depends on: the seeds of its parameters and of a checkpoint, and what its helper and its file
# of settings say.
NETWORKS = {
    "seed": (0, 1, 2, 3), "weights": (0, 1, 2, 3), "power": (1.0, 0.5, 2.0),
    "factor": ("1", "x.sigmoid() ** 4", "x.mean(dim=1, keepdim=True).relu()"),
}  # fmt: skip
# Changes of our own code: of a module, of what images go through before, and of how they are read.
CODE = {
    "modules.pooling.generalized_mean": lambda x, p, eps: x.amax(dim=(-2, -1)),
    "modules.pooling.GeMPlus.forward": lambda self, x: x.mean(dim=(-2, -1)),
    "model.backbone.per_channel": lambda values, device: torch.full((3, 1, 1), 0.7, device=device),
    "extraction.images._decoded": lambda image: np.array(image.convert("RGB"))[:, :, ::-1].copy(),
}


class World:
    """A folder with all that a run depends on, drawn from a seed.

    Attributes:
        layout: that of the dataset, "revisitop" or "classes".
        command: what is run, one of COMMANDS.
        options, code, network: the options, our changed functions, and the values of NETWORKS, by name.
        database, queries, truth: the names of the images, the boxes of the queries, and their positives.
        makers: whether the next run in the old folder starts with the commands that make files for the last one.
    """

    def __init__(self, folder: Path, seed: int, layout: str | None = None, command: str | None = None):
        self.folder, self.rng, self.makers = folder, random.Random(seed), True
        self.layout = layout or self.rng.choice(("revisitop", "classes"))
        self.command = command or self.rng.choice([*COMMANDS])
        # In a batch of other images, a network may round differently.
        self.options: dict[str, str] = {"TEST.SCALE_LIST": "1", "TEST.BATCH_SIZE": "1"}
        self.code: dict[str, Callable] = {}
        self.data, self.helper, self.file = folder / "data", f"helper_{folder.name}_{seed}", folder / "mine.py"
        self.step_ns = self.rng.choice((-1, 2_000_000_000))  # images are old, or as young as their stat records
        self.network = {name: values[0] for name, values in NETWORKS.items()}
        self.database = [f"a{number}" for number in range(10)]
        self.queries: dict[str, tuple | None] = {"a0": None, "q1": (2, 2, 20, 20), "q2": None}
        self.truth = {name: self.rng.sample(self.database[1:], 3) for name in self.queries}
        if self.layout == "classes":
            for name in self.database:
                self.draw(self.dataset / f"c{self.rng.randrange(3)}" / f"{self.rng.randrange(4)}-{name}.jpg")
            for folder_name in ("c0", "c1"):  # equal names in two folders
                self.draw(self.dataset / folder_name / "0.jpg")
        else:
            for path in map(self.image, {*self.database, *self.queries}):
                self.draw(path)
        for number in range(6):
            self.draw(self.data / "revisitop1m" / f"{number}.jpg")
        for number in range(2):
            self.draw(self.data / "asked" / f"{number}.jpg")
        self.write()

    @property
    def dataset(self) -> Path:
        return self.data / NAME

    def image(self, name: str) -> Path:
        return self.dataset / "jpg" / f"{name}.jpg"

    def images(self) -> list[Path]:
        """The images that the command uses."""
        unused = {"distractors": "asked", "search": "revisitop1m"}.get(self.command, "[ar]*")
        return sorted({*self.data.rglob("*.jpg")} - {*self.data.glob(f"{unused}/*.jpg")})

    def draw(self, path: Path) -> None:
        """Writes one of forty images; all files have the same size and time, as if unpacked from an archive."""
        pixels = np.random.default_rng(self.rng.randrange(40)).integers(0, 256, (6, 8, 3))
        pixels = np.kron(pixels, np.ones((*self.rng.choice(((4, 4), (6, 6), (8, 5))), 1))).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG", quality=70)
        self.put(path, content.getvalue())

    def put(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.ljust(BYTES, b"\0"))
        os.utime(path, ns=(10**18, 10**18))

    def write(self) -> None:
        """Writes the lists of the dataset and of the distractors, and the files of the network."""
        numbers = {name: number for number, name in enumerate(self.database)}
        positives = {query: [name for name in names if name in numbers] for query, names in self.truth.items()}
        if self.layout == "revisitop":
            truth = [
                {"bbx": box or (0, 0, 50, 50), "easy": [numbers[name] for name in positives[query]], "hard": [],
                 "junk": []} for query, box in self.queries.items()
            ]  # fmt: skip
            content = {"imlist": self.database, "qimlist": [*self.queries], "gnd": truth}
            (self.dataset / f"gnd_{NAME}.pkl").write_bytes(pickle.dumps(content))
        distractors = self.data / "revisitop1m"
        names = sorted(path.name for path in distractors.glob("*.jpg"))
        (distractors / "revisitop1m.txt").write_text("\n".join([*names, ""]))
        (self.folder / f"{self.helper}.py").write_text(HELPER_FILE.format(**self.network))
        self.file.write_text(NETWORK_FILE.format(helper=self.helper, **self.network))
        self.file.with_suffix(".json").write_text(json.dumps(self.network["power"]))
        if self.network["weights"]:
            torch.manual_seed(self.network["weights"])
            conv = torch.nn.Conv2d(3, 16, 5, 4)
            state = {"layer1.0.weight": conv.weight.data, "layer1.0.bias": conv.bias.data}
            torch.save(state, self.folder / "weights.pth")

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """One thread; small blocks; stat records are trusted as those of old images; our code as it is changed now."""
        constants = {"extraction.identity._STEP_NS": self.step_ns, "extraction.store._BLOCK_ROWS": 3,
                     "extraction.store._HASHED_ROWS": 2}  # fmt: skip
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
            with contextlib.suppress(ImportError):
                import faiss

                faiss.omp_set_num_threads(1)
            for name, value in {**constants, **self.code}.items():
                stack.enter_context(patch(name, value))
            stack.enter_context(patch.object(sys, "path", [str(self.folder), *sys.path]))
            stack.enter_context(patch.object(sys, "dont_write_bytecode", True))
            sys.modules.pop(self.helper, None)
            yield

    def words(self, keys: Sequence[str], **more: Any) -> list[str]:
        """The words of a command line, of the options among these that have an effect."""
        given: dict[str, Any] = {"MODEL.NAME": f"{self.file}:build", "DATA_LOADER.NUM_WORKERS": 0, **self.options}
        if self.network["weights"]:
            given["TEST.WEIGHTS"] = self.folder / "weights.pth"
        given = {key: str(value) for key, value in {**given, **more}.items() if key in keys}
        idle: dict = {}
        with contextlib.suppress(InputError):  # of options that contradict each other, which the command refuses
            idle = idle_options(make_config([*given.items()]))
        return [word for key, value in given.items() if key not in idle for word in (key, value)]

    def outcome(self, where: str, makers: bool = True) -> tuple[Outcome, dict[str, Any]]:
        """Runs the command in a folder, after the commands that make files for it unless they are left out.

        Returns its end, and what it computed.
        """
        place = self.folder / where
        place.mkdir(exist_ok=True)
        *before, last = COMMANDS[self.command]
        with self.surroundings():
            for command in (*(before if makers else ()), last):
                script, *words = command(self, place)
                outcome = run_script(script, words, place)
                if command is extract and outcome.code == 2:  # as its error advises
                    outcome = run_script(script, [*words, "--no-resume"], place)
                if outcome.code:
                    return outcome, {}
        return outcome, figures(place, script, outcome.out)


def figures(folder: Path, script: str, out: str) -> dict[str, Any]:
    """Returns the metrics, rankings and descriptors of the latest run in a folder, by name."""
    output = folder / "output"
    if script == "tools/search.py":
        return {"found": json.loads(out)["queries"]}
    if script == "tools/tables.py":
        return {"table": out}
    (entry,) = json.loads((latest(output) / "results.json").read_text())["datasets"].values()
    stages = {name: value for name, value in entry.items() if isinstance(value, dict) and "seconds" in value}
    found = {f"{stage} {key}": value for stage, values in stages.items() for key, value in values.items()}
    found |= {path.name: np.load(path) for path in latest(output).glob("*.npy")}
    found |= {path.name: np.load(path) for path in descriptors_of(folder).glob(f"{NAME}_*.npy")}
    return {name: value for name, value in found.items() if "seconds" not in name}


def descriptors_of(folder: Path) -> Path | None:
    """Returns the folder of the descriptors that the newest run of test.py used, or None."""
    for path in sorted(folder.glob("output/runs/2*/results.json"), key=os.path.getmtime, reverse=True):
        (entry,) = json.loads(path.read_text())["datasets"].values()
        return folder / entry.get("descriptors", entry.get("features"))
    return None


# ---- commands: each function returns the words of one, to be run in a folder ----


def test(world: World, place: Path, **more: Any) -> list[str]:
    data = {"TEST.DATA_DIR": world.data, "TEST.DATASET_LIST": NAME}
    return ["test.py", *world.words([option.key for option in OPTIONS], **data, **more)]


def features(world: World, place: Path) -> list[str]:
    return test(world, place, **{"TEST.FEATURES": descriptors_of(place) or "none"})


def extract(world: World, place: Path) -> list[str]:
    words = world.words([*NETWORK, *LOADING])
    return ["extract_rop1m.py", "--data-dir", str(world.data / "revisitop1m"), "--out", "feats.pth", *words]


def distractors(world: World, place: Path) -> list[str]:
    return test(world, place, **{"SupG.onemeval": True, "TEST.DISTRACTORS": "feats.pth"})


def whiten(world: World, place: Path) -> list[str]:
    words = world.words([*NETWORK, *LOADING, "TEST.DATA_DIR", "TEST.RESUME"], **{"TEST.DATA_DIR": world.data})
    return ["tools/whiten.py", "--from", NAME, "--dim", "3", "--out", "whitening.pth", *words]


def whitened(world: World, place: Path) -> list[str]:
    return test(world, place, **{"MODEL.WHITENING": "whitening.pth"})


def search(world: World, place: Path) -> list[str]:
    words = world.words([*NETWORK, *LOADING, *INDEX, *RERANKING, "TEST.RESUME"])
    folders = ["--database", str(world.dataset), "--queries", str(world.data / "asked")]
    return ["tools/search.py", *folders, "--json", *words]


def table(world: World, place: Path) -> list[str]:
    return ["tools/tables.py", "main", *test(world, place)[1:]]


# The last function makes the command that is compared; those before it make files for it.
COMMANDS: dict[str, Sequence[Callable]] = {
    "test": (test,), "features": (test, features), "distractors": (extract, distractors),
    "whitened": (whiten, whitened), "search": (search,), "table": (table,),
}  # fmt: skip


# ---- changes: each function changes one thing, and returns what it did, or None if there is no such thing ----


def content(world: World) -> str:
    path = world.rng.choice(world.images())
    if world.rng.random() < 0.05:
        world.put(path, b"no image")
    else:
        world.draw(path)
    return path.name


def copy(world: World) -> str:
    source, target = world.rng.sample(world.images(), 2)
    world.put(target, source.read_bytes())
    return f"{source.name} to {target.name}"


def exchange(world: World) -> str:
    first, second = world.rng.sample(world.images(), 2)
    first.rename(first.with_suffix(".old"))
    second.rename(first)
    first.with_suffix(".old").rename(second)
    return f"{first.name} and {second.name}"


def rename(world: World) -> str:
    """Renames an image, also into another folder of a class."""
    if world.layout == "classes" or world.command == "search":
        path = world.rng.choice([path for path in world.images() if NAME in path.parts])
        others = sorted({other.parent for other in world.dataset.rglob("*.jpg")})
        new = world.rng.choice(others) / f"{world.rng.randrange(5)}-{path.name[-6:]}"
        if new.exists():
            return exchange(world)
        path.rename(new)
        return f"{path.name} to {new.parent.name}/{new.name}"
    number = world.rng.randrange(len(world.database))
    old = world.database[number]
    if old in world.queries:
        return exchange(world)
    new = f"{world.rng.choice('abz')}{world.rng.randrange(20, 60)}"
    if new in world.database:
        return exchange(world)
    world.image(old).rename(world.image(new))
    world.database[number] = new
    world.truth = {query: [new if name == old else name for name in names] for query, names in world.truth.items()}
    return f"{old} to {new}"


def order(world: World) -> str:
    world.rng.shuffle(world.database)
    queries = [*world.queries.items()]
    world.rng.shuffle(queries)
    world.queries = dict(queries)
    return ""


def length(world: World) -> str | None:
    """Adds or removes an image of the dataset, a distractor, or an image of a search for folders."""
    folders = {"distractors": "revisitop1m", "search": "asked"}
    if world.command in folders and world.rng.random() < 0.5:
        return add_or_remove(world, world.data / folders[world.command], f"{world.rng.randrange(20)}.jpg")
    number = world.rng.randrange(20, 60)
    if world.layout == "classes":
        return add_or_remove(world, world.dataset / world.rng.choice(("c0", "c1")), f"{number}.jpg")
    removable = [name for name in world.database if name not in world.queries]
    if world.rng.random() < 0.5 and len(removable) > 6:
        world.database.remove(world.rng.choice(removable))
    elif f"a{number}" not in world.database:
        world.draw(world.image(f"a{number}"))
        world.database.insert(world.rng.randrange(len(world.database)), f"a{number}")
    return f"{len(world.database)} images"


def add_or_remove(world: World, folder: Path, name: str) -> str:
    images = sorted(folder.glob("*.jpg"))
    if world.rng.random() < 0.5 and len(images) > 3:
        world.rng.choice(images).unlink()
    else:
        world.draw(folder / name)
    return f"{len(images)} images before"


def box(world: World) -> str | None:
    if world.layout != "classes":
        name = world.rng.choice([*world.queries])
        boxes = None, (2, 2, 20, 20), (3.5, 0, 20, 24), (0, 4, 19, 20)
        world.queries[name] = other(world, world.queries[name], boxes)
        return f"{name} {world.queries[name]}"


def truth(world: World) -> str | None:
    if world.layout != "classes":
        name = world.rng.choice([*world.queries])
        world.truth[name] = world.rng.sample(world.database, 3)
        return f"{name} {world.truth[name]}"


def place(world: World) -> str:
    """Moves all data to another folder."""
    moved = world.folder / ("data" if world.data.name != "data" else "moved")
    world.data.rename(moved)
    world.data = moved
    return moved.name


def other(world: World, value: Any, values: Sequence) -> Any:
    return world.rng.choice([each for each in values if each != value])


def network(world: World, name: str | None = None) -> str:
    name = name or world.rng.choice([*NETWORKS])
    world.network[name] = other(world, world.network[name], NETWORKS[name])
    return f"{name} {world.network[name]}"


def code(world: World) -> str:
    """Changes our own code, or changes it back."""
    name = world.rng.choice([*CODE])
    if world.code.pop(name, None) is None:
        world.code[name] = CODE[name]
    return ", ".join(world.code)


def option(world: World) -> str:
    key = world.rng.choice([*VALUES])
    if world.options.pop(key, None) is None or world.rng.random() < 0.3:
        world.options[key] = world.rng.choice(VALUES[key])
    return f"{key} {world.options.get(key, 'as it is by default')}"


def command(world: World) -> str:
    world.command = other(world, world.command, [*COMMANDS])
    return world.command


def rows(world: World) -> str | None:
    """Overwrites, cuts off or removes a file that an earlier run left, most often one with rows of the newest run."""
    kinds, old = {".npy", ".npz", ".json", ".pth", ".faiss"}, world.folder / "old"
    files = [path for path in sorted(old.rglob("*")) if path.suffix in kinds and path.is_file()]
    files = [path for path in files if "runs" not in path.parts and path.name != "whitening.pth"]
    newest = [path for path in files if path.suffix in (".npy", ".pth") and path.parent in (old, descriptors_of(old))]
    if not files:
        return None
    path = world.rng.choice(newest if newest and world.rng.random() < 0.7 else files)
    way = world.rng.choice(("overwritten", "overwritten", "overwritten", "cut off", "removed"))
    world.makers = world.rng.random() < 0.5
    content, stat = bytearray(path.read_bytes()), path.stat()
    if way == "removed":
        path.unlink()
    elif way == "cut off":
        os.truncate(path, world.rng.randrange(len(content) + 1))
    else:  # 64 bytes are a row, and twice as many the head of an array
        source, target = (64 * world.rng.randrange(2, max(3, len(content) // 64)) for _ in range(2))
        content[target : target + 64] = content[source : source + 64]
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return f"{path.relative_to(world.folder)} {way}"


def index(world: World) -> str | None:
    """Replaces an index by another one."""
    files = sorted((world.folder / "old").rglob("*.faiss"))
    if len(files) < 2:
        return None
    source, target = world.rng.sample(files, 2)
    shutil.copy2(source, target)
    return f"{target.relative_to(world.folder)} is {source.relative_to(world.folder)}"


def stopped(world: World) -> str:
    """Kills a run at one of its steps in the file system, or raises an exception there."""
    moment, kill = world.rng.randrange(40), world.rng.random() < 0.5
    countdown = itertools.count(moment, -1)

    def deadly(step: Callable) -> Callable:
        def attempt(*arguments: Any, **named: Any) -> Any:
            if next(countdown) == 0:
                if kill:
                    os._exit(137)
                raise KeyboardInterrupt
            return step(*arguments, **named)

        return attempt

    def prepare() -> None:
        for name in ("replace", "fsync", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        Store.write = deadly(Store.write)

    return f"at step {moment}, exit code {forked(world, prepare).wait()}"


def together(world: World) -> str:
    """Runs a command twice at once, the second time with another option."""
    first = forked(world)
    changed = option(world)
    runs = [first, forked(world)]
    return f"{changed}, exit codes {[each.wait() for each in runs]}"


def forked(world: World, prepare: Callable = lambda: None) -> Forked:
    """Starts the first command in the old folder, in a process of its own."""
    folder = world.folder / "old"
    with world.surroundings():
        script, *words = COMMANDS[world.command][0](world, folder)
        return Forked(ROOT / script, words, folder, prepare=prepare)


# The changes, by how often each is made.
CHANGES: dict[Callable, float] = {
    content: 3, copy: 1, exchange: 2, rename: 2, order: 1, length: 4, box: 3, truth: 0.5, place: 0.5, network: 4,
    code: 2, option: 6, command: 2, rows: 6, index: 1, stopped: 4, together: 1,
}  # fmt: skip


# ---- sequences ----


def play(folder: Path, seed: int, numbers: Sequence[int], steps: list[str] | None = None) -> str | None:
    """Makes the steps with these numbers of the sequence of a seed. Returns the first difference, or None.

    Args:
        folder: an empty folder.
        steps: the steps in words are added to it.
    """
    world, steps = World(folder, seed), [] if steps is None else steps
    world.outcome("old")
    for number in numbers:
        world.rng, world.makers = random.Random(f"{seed} {number}"), True
        changes = world.rng.choices([*CHANGES], [*CHANGES.values()], k=world.rng.choice((1, 1, 2)))
        for change in changes:
            world.write()
            done = change(world)
            if done is not None:
                steps.append(f"{number}: {change.__name__} {done}")
        world.write()
        world.makers |= len(changes) > 1  # files that commands make for the last one do not follow its options
        if found := compared(world):
            return found
    return None


def compared(world: World) -> str | None:
    """Returns the first difference of a run in the old folder and one in a new folder, or None."""
    shutil.rmtree(world.folder / "new", ignore_errors=True)
    new = world.outcome("new")
    old = world.outcome("old", world.makers)
    if old[0].code == 2 and not world.makers:  # damage is reported, and what made the file mends it
        old = world.outcome("old")
    return difference(old, new) and f"{world.command}: {difference(old, new)}"


def difference(old: tuple[Outcome, dict[str, Any]], new: tuple[Outcome, dict[str, Any]]) -> str | None:
    """Returns the first difference of two ends of a command, or None. An internal error is one, too."""
    if old[0].code != new[0].code or old[0].code not in (0, 2):
        return f"exit codes {old[0].code} and {new[0].code}: {old[0].err}{new[0].err}"
    if old[1].keys() != new[1].keys():
        return f"only one has {sorted(old[1].keys() ^ new[1].keys())}"
    return next((name for name, value in old[1].items() if not np.array_equal(value, new[1][name])), None)


def shrunk(folder: Path, seed: int, numbers: Sequence[int]) -> list[str]:
    """Returns the steps of a failing sequence in words, without those that are not needed for a failure."""
    needed, words = [*numbers], []
    for number in [None, *numbers]:
        shorter = [each for each in needed if each != number]
        steps: list[str] = []
        if play(Path(tempfile.mkdtemp(dir=folder)), seed, shorter, steps):
            needed, words = shorter, steps
    return words
