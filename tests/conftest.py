import contextlib
import gc
import io
import json
import logging
import os
import pickle
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from extraction.images import ReadingLimits, set_reading_limits
from model.backbone import Backbone
from model.cvnet import MEAN_BGR, STD_BGR
from revisitop import toy
from revisitop.toy import seeded_checkpoint

ROOT = Path(__file__).parents[1]
DATA = ROOT / "revisitop" / "reference"


# Tests that share what takes long to prepare run in a single process each.
_TOGETHER = ("toy", "test_package", "test_demo", "test_page", "test_export")


# What starts a server or a browser, installs the package, runs on toy, or draws the larger checkpoint.
_SLOW_FIXTURES = {"address", "browser", "built", "toy_data", "checkpoint_101"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests as slow that use one of _SLOW_FIXTURES; others say it themselves."""
    for item in items:
        if _SLOW_FIXTURES & {*getattr(item, "fixturenames", ())}:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Leaves what the imports made out of later garbage collections, which take a quarter of a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Uses a process per core where pytest-xdist is installed, unless -n says something else."""
    in_worker = hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not in_worker:
        config.option.numprocesses = "auto"


def pytest_configure() -> None:
    """Limits each process of pytest-xdist, and the commands that it starts, to one core."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distributes tests one by one, but those of _TOGETHER to a single process each."""

    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((each for each in _TOGETHER if each in nodeid), nodeid)

    return ByFixture(config, log)


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    """Inputs and outputs of the paper's released code, see revisitop/reference/README.md."""
    with np.load(DATA / "reference.npz") as arrays:
        return dict(arrays)


def network_input(pixels: np.ndarray) -> torch.Tensor:
    """Returns an image as CVNet's network takes it. (H, W, 3) uint8 RGB -> (1, 3, H, W)."""
    return Backbone(torch.nn.Identity(), (), MEAN_BGR, STD_BGR, "BGR").normalise(torch.from_numpy(pixels)[None])


@pytest.fixture(scope="session")
def evaluation() -> dict:
    return json.loads((DATA / "evaluation.json").read_text())


@pytest.fixture(scope="session")
def checkpoint_50(tmp_path_factory) -> Path:
    return _write_checkpoint(tmp_path_factory, 50)


@pytest.fixture(scope="session")
def checkpoint_101(tmp_path_factory) -> Path:
    return _write_checkpoint(tmp_path_factory, 101)


NETWORK = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, 4), torch.nn.ReLU()).eval()
"""


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory) -> tuple:
    """Options of a fast network, with one scale and in one process, wherever the network is not the point."""
    path = tmp_path_factory.mktemp("network") / "mine.py"
    path.write_text(NETWORK)
    return ("MODEL.NAME", f"{path}:build", "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    """A folder of datasets in which toy is drawn."""
    folder = tmp_path_factory.mktemp("toy_data")
    toy.ensure_dataset(folder)
    return folder


@pytest.fixture(scope="session")
def toy_run(toy_data, tmp_path_factory) -> tuple[Path, str]:
    """The folder of descriptors and the screen output of a first run of test.py on toy, with one scale."""
    folder = tmp_path_factory.mktemp("toy_run")
    words = ["TEST.DATASET_LIST", "['toy']", "TEST.DATA_DIR", str(toy_data), "TEST.SCALE_LIST", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "test.py", *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return kept(folder / "output", "toy"), done.stdout


def kept(output: Path, name: str) -> Path:
    """Returns the folder of the descriptors that the newest run used."""
    results = json.loads((latest(output) / "results.json").read_text())
    return output.parent / results["datasets"][name]["descriptors"]


def latest(output: Path) -> Path:
    """Returns the folder of the results of the newest run."""
    return output / "runs" / "latest"


def _write_checkpoint(tmp_path_factory, depth: int) -> Path:
    path = tmp_path_factory.mktemp(f"weights_{depth}") / f"CVPR2022_CVNet_R{depth}.pyth"
    torch.save(seeded_checkpoint(depth), path)
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist that a copy of the checkout makes."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT / "modules", copy / "modules", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = f"from setuptools.build_meta import *; print(build_wheel({str(out)!r}), build_sdist({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, stdout=subprocess.PIPE, text=True)
    wheel, sdist = done.stdout.split()[-2:]
    return out / wheel, out / sdist


@pytest.fixture(scope="session")
def site(built, tmp_path_factory) -> Path:
    """A folder in which the sdist is installed."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", folder, built[1]], check=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    """Chromium, for a module's tests: its loop must not run beside those of other modules."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium or google-chrome on this machine")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_demo(folder: Path, *words: object) -> Iterator[str]:
    """Starts the demo in a folder, and yields its address; its errors are in errors.txt, uploads in uploads/."""
    port = free_port()
    command = [sys.executable, "-u", "-m", "tools.demo", "--port", str(port), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folder / "uploads")}
    with (folder / "errors.txt").open("w") as errors, subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=errors, env=environment
    ) as demo:  # fmt: skip
        try:
            assert any("the page is" in line for line in demo.stdout), (folder / "errors.txt").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            demo.terminate()


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def run_script(script: str, arguments: Sequence[object], folder: Path) -> Outcome:
    """Runs a script in a folder, as `python SCRIPT ARGUMENTS` would, but in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, handlers = os.getcwd(), logging.root.handlers[:]
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
            patch.object(sys, "argv", [script, *map(str, arguments)]),
        ):  # fmt: skip
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    finally:  # the next command must not write to this one's screen and log
        os.chdir(before)
        for handler in set(logging.root.handlers) - set(handlers):
            handler.close()
        logging.root.handlers[:] = handlers
        set_reading_limits(ReadingLimits())
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs a top-level script in an empty folder, which becomes the current one."""

    def run(script: str, *arguments: object) -> Outcome:
        (tmp_path / "work").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "work")
        return run_script(script, arguments, tmp_path / "work")

    return run


class Layout:
    """A small dataset in ROxford's layout, whose ground truth a test can change before writing it."""

    def __init__(self, data_dir: Path, name: str = "roxford5k"):
        self.data_dir, self.folder, self.name = data_dir, data_dir / name, name
        (self.folder / "jpg").mkdir(parents=True)
        rng = np.random.default_rng(5)
        self.gnd = {"imlist": [f"db_{i}" for i in range(24)], "qimlist": [f"query_{i}" for i in range(3)], "gnd": []}
        for i, _ in enumerate(self.gnd["qimlist"]):
            numbers = rng.permutation(24)
            lists = {"easy": numbers[:3].tolist(), "hard": numbers[3:7].tolist(), "junk": numbers[7:9].tolist()}
            self.gnd["gnd"].append({"bbx": [4.5, 3, 60.2, 50 + i], **lists})
        for name in self.gnd["imlist"] + self.gnd["qimlist"]:
            pixels = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((10, 10, 1)))
            Image.fromarray(pixels.astype(np.uint8)).save(self.image(name), quality=95)
        self.write()

    def image(self, name: str) -> Path:
        return self.folder / "jpg" / f"{name}.jpg"

    @property
    def ground_truth_file(self) -> Path:
        return self.folder / f"gnd_{self.name}.pkl"

    def write(self) -> None:
        self.ground_truth_file.write_bytes(pickle.dumps(self.gnd))


@pytest.fixture
def layout(tmp_path) -> Layout:
    return Layout(tmp_path / "data")
