"""Every block of shell and Python code in README and docs runs with substitute data, or states why not."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import yaml
from conftest import ROOT, Layout, latest
from drawn_descriptors import draw_descriptors
from PIL import Image

import modules

pytestmark = pytest.mark.slow  # runs every block of the documentation

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```", re.M | re.S
)

# Replacements for names that stand for the reader's own, for things that the substitute data lack, and for large
# networks and grids by small ones of the same interface.
STAND_INS = {
    "--dim 512": "--dim 4", "--test NAME": "--test roxford5k", "--folds 5": "--folds 3", "3,5,9,15": "3,9",
    "3,4.6,6": "3,4.6", "torchvision:resnet101": "torchvision:resnet18",
    "from torchvision.models import resnet18\n":
        "resnet18 = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())\n",
}  # fmt: skip


def with_stand_ins(code: str) -> str:
    for name, stand_in in STAND_INS.items():
        code = code.replace(name, stand_in)
    return code


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns the language and the code of the blocks that run."""
    found = list(BLOCK.finditer((ROOT / page).read_text()))
    return [(each["language"], each["code"]) for each in found if each["reason"] is None]


@pytest.fixture
def work(tmp_path, checkpoint_50, checkpoint_101, monkeypatch) -> Path:
    """A folder with small datasets, weights, vectors and images under all names that the documentation uses."""
    folder = tmp_path / "work"
    data = folder / "revisitop"
    for name in ("roxford5k", "rparis6k"):
        layout = Layout(data, name)
        layout.gnd["imlist"] = layout.gnd["imlist"][:6]
        truth = {"bbx": [0, 0, 40, 40], "easy": [0, 1], "hard": [2, 3], "junk": [4]}
        layout.gnd["gnd"] = [dict(truth) for _ in layout.gnd["qimlist"]]
        layout.write()
        for path in layout.folder.glob("jpg/*"):
            Image.open(path).reduce(2).save(path)
        rows = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        scipy.io.savemat(data / f"{name}_resnet_rsfm120k_gem.mat", {"Q": rows[:3].T, "X": rows[3:].T})
    (folder / "weights").mkdir()
    for path in (checkpoint_50, checkpoint_101):
        (folder / "weights" / path.name).symlink_to(path)
    jpg = data / "roxford5k" / "jpg"
    images = sorted(jpg.glob("*.jpg"))
    shutil.copytree(jpg, folder / "holiday")
    for name in ("tower.jpg", "a.jpg", "b.jpg"):
        shutil.copy(images[0], folder / name)
    for number, image in enumerate(images[:6]):
        target = folder / "data" / "pets" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, target)
    far = data / "revisitop1m"
    far.mkdir()
    shutil.copy(images[0], far / "x.jpg")
    (far / "revisitop1m.txt").write_text("x.jpg\n")
    landmarks = data / "gldv2"
    for kind in ("index", "queries"):
        (landmarks / kind).mkdir(parents=True)
        for number in range(4):
            shutil.copy(images[number], landmarks / kind / f"{kind[0]}{number}.jpg")
        (landmarks / f"{kind}.csv").write_text("\n".join(["id", *(f"{kind[0]}{number}" for number in range(4)), ""]))
    solution = [f"q{number},i{number} i0,{('Public', 'Private')[number % 2]}" for number in range(4)]
    (landmarks / "solution.csv").write_text("\n".join(["id,images,Usage", *solution, ""]))
    draw_descriptors(tmp_path / "plain", tmp_path / "plain", "v", 0)
    shutil.copy(tmp_path / "plain" / "v_query.npy", folder / "q.npy")
    shutil.copy(tmp_path / "plain" / "v_db.npy", folder / "d.npy")
    ids = np.argsort(-(np.load(folder / "q.npy") @ np.load(folder / "d.npy").T), axis=1)[:, :30]
    np.save(folder / "found.npy", ids)
    (folder / "mine.py").write_text("import torchvision\n\n\ndef build():\n    return torchvision.models.resnet18()\n")
    for name, more in (("a", ""), ("b", "SupG: {gemp: False}\n")):
        (folder / f"{name}.yaml").write_text(f"MODEL: {{NAME: mine.py:build}}\n{more}")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "superglobal", modules)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, work, command, monkeypatch):
    for language, code in blocks(page):
        if language == "python":
            monkeypatch.chdir(work)
            code = with_stand_ins(code).replace('load("."', f'load("{ROOT}"')
            exec(compile(code, page, "exec"), {"__name__": page})
        else:
            for line in with_stand_ins(code).replace("\\\n", " ").splitlines():
                run_line(line, work, command)


def run_line(line: str, work: Path, command) -> None:
    """Runs a command of the project in this process."""
    line, _, comment = line.partition("  #")
    if not line.strip() or "needs the network" in comment:
        return
    output = work / "output"
    if "predictions.csv" in line:
        line = line.replace("predictions.csv", str(predictions(output)))
    if "RUN_" in line:
        line = line.replace("output/runs/RUN_A", str(latest(output))).replace("output/runs/RUN_B", str(latest(output)))
    if "output/runs/latest" in line or "RUN" in line or str(output) in line:
        assert latest(output).exists(), "no block above this one makes a run"
    python, *words = shlex.split(line)
    assert python == "python", f"{line}: only commands of ours run here, mark the block with the reason"
    script, words = (f"{words[1].replace('.', '/')}.py", words[2:]) if words[0] == "-m" else (words[0], words[1:])
    networks = [word for word in words if word.startswith(("timm:", "torchvision:"))]
    if networks and "TEST.WEIGHTS" not in words:  # instead of a download by the library
        words += ["TEST.WEIGHTS", "untrained"]
    if "trained.pth" in words:
        import torchvision

        torch.save(torchvision.models.resnet18().state_dict(), work / "trained.pth")
    images = script in NEEDS_IMAGES and "TEST.FEATURES" not in words
    quick = ["DATA_LOADER.NUM_WORKERS", "0", "TEST.SCALE_LIST", "1"] if images else []
    if script == "test.py" and "TEST.DATASET_LIST" not in words:
        quick += ["TEST.DATASET_LIST", "roxford5k"]
    outcome = command(script, *words, *quick)
    assert outcome.code == 0, f"{line}\n{outcome.err}"


NEEDS_IMAGES = ("test.py", "extract_rop1m.py", *(f"tools/{name}.py" for name in ("search", "tables", "tune", "whiten")))


def predictions(output: Path) -> Path:
    (path,) = latest(output).glob("gldv2_retrieval_predictions.csv")
    return path


def test_links_outside_the_site_are_valid():
    for page in ("README.md", "CONTRIBUTING.md"):
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
            path = ROOT / (target or page)
            assert path.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(path), f"{page}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_python_files_that_the_documentation_names_are_there():
    folders = [path.name for path in ROOT.iterdir() if list(path.glob("*.py")) or list(path.glob("*/*.py"))]
    named = re.compile(rf"`((?:{'|'.join(folders)})/[a-z0-9_/]+\.py)`")
    assert {
        f"{page}: {name}"
        for page in (*PAGES, "CONTRIBUTING.md", "benchmarks/README.md")
        for name in named.findall((ROOT / page).read_text())
        if not (ROOT / name).exists()
    } == set()


def test_contributing_says_where_things_are():
    table = re.findall(r"^\| .* \| (`.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    named = [pair for row in table for pair in re.findall(r"`([\w/]+\.py)`, `(\w+)`(?: and `(\w+)`)?", row)]
    assert len(named) >= 5
    for file, *names in named:
        for name in filter(None, names):
            assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.M), f"{file}: {name}"


# ---- CONTRIBUTING: its instructions are complete ----


def block_of_contributing(mark: str) -> str:
    found = [each["code"] for each in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text()) if mark in each["code"]]
    (code,) = found
    return code


def test_a_dataset_is_a_folder_and_a_network_is_a_function(work, command):
    for path in re.findall(r"^revisitop/mine/\S+$", (ROOT / "CONTRIBUTING.md").read_text(), re.M):
        target = work / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / "tower.jpg", target)
    assert command("tools/check.py", "mine").code == 0
    (work / "mine.py").write_text(block_of_contributing("# mine.py"))
    words = ("MODEL.NAME", "mine.py:build", "TEST.DATASET_LIST", "mine", "DATA_LOADER.NUM_WORKERS", 0)
    outcome = command("test.py", *words)
    assert outcome.code == 0, outcome.err
    assert "recall@1" in outcome.out


def test_a_reranker_a_pooling_and_a_layout_are_a_file_and_a_line_each(work, tmp_path):
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", "tests", "docs", "__pycache__", "output", "*.pyth")
    shutil.copytree(ROOT, copy, ignore=ignored)

    def insert(name: str, mark: str, line: str) -> None:
        content = (copy / name).read_text()
        assert mark in content
        (copy / name).write_text(content.replace(mark, f"{mark}{line}\n", 1))

    for name in ("modules/by_first.py", "modules/sums.py", "revisitop/layout_pairs.py"):
        (copy / name).write_text(block_of_contributing(f"# {name}"))
    insert("assembly.py", "STAGES = {\n", block_of_contributing('"by-first"').rstrip())
    insert("assembly.py", "from typing import Any, NamedTuple, TextIO\n", "from modules.by_first import ByFirst")
    insert("model/recipe.py", "nn.Module]] = {\n", block_of_contributing('"sum": lambda').rstrip())
    insert("model/recipe.py", "from typing import Any\n", "from modules.sums import Sum")
    insert("revisitop/layouts.py", "from pathlib import Path\n", "from revisitop.layout_pairs import PAIRS")
    insert("revisitop/layouts.py", "LAYOUTS = (", "PAIRS, ")
    for folder in ("queries", "database"):
        (work / "revisitop" / "mine" / folder).mkdir(parents=True)
        shutil.copy(work / "tower.jpg", work / "revisitop" / "mine" / folder)
    (work / "revisitop" / "mine" / "pairs.txt").touch()
    (work / "mine.py").write_text(block_of_contributing("# mine.py"))
    words = ["MODEL.NAME", "mine.py:build", "TEST.DATASET_LIST", "mine", "SupG.rgem", "False", "MODEL.POOLING", "sum"]
    words += ["TEST.RERANKER", "by-first", "SupG.rerank_m", "1", "DATA_LOADER.NUM_WORKERS", "0"]
    done = subprocess.run([sys.executable, copy / "test.py", *words], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine, reranking" in done.stdout


def test_every_ci_runs_the_commands_of_contributing():
    block = re.search(r"```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    commands = [line.partition("  #")[0].strip() for line in block.splitlines()[1:]]
    hosted = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["tests"]
    ours = (ROOT / ".ci" / "run").read_text()
    steps = [step["run"] for step in hosted["steps"] if "run" in step]
    assert [line for line in commands if line not in steps] == []
    assert [line for each in commands for line in each.split(" && ") if line not in ours] == []
    oldest, _ = (each["python"] for each in hosted["strategy"]["matrix"]["include"])
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text()
