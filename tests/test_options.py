"""Every command uses or refuses each option, with a line that names it; and what errors advise works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from conftest import ROOT, Layout

import config
from assembly import make_recipe
from tools.demo_steps import MODULES

pytestmark = pytest.mark.slow  # runs every command with every option

# A value other than the default for each option.
CHANGED = {
    "MODEL.NAME": "torchvision:resnet18", "MODEL.POOLING": "max", "MODEL.WHITENING": "none.pth", "TEST.MAX_SIDE": 40,
    "SupG.relup_stages": "layer4", "SupG.relup_ends": "layer2",
    "MODEL.DEPTH": 101, "MODEL.HEADS.REDUCTION_DIM": 512, "TEST.WEIGHTS": "elsewhere", "TEST.DATA_DIR": "elsewhere",
    "TEST.DATASET_LIST": "rparis6k", "TEST.SCALE_LIST": 5, "TEST.FEATURES": "x.mat", "TEST.DEVICE": "cuda:99",
    "TEST.PRECISION": "bf16", "TEST.BATCH_SIZE": 3, "TEST.OUT_DIR": "elsewhere", "TEST.DISTRACTORS": "x.pth",
    "TEST.RESUME": False, "TEST.RERANKER": "none", "TEST.TOPK_LIST": "[7]", "TEST.MAPS_GB": 1, "TEST.REPORT": True,
    "TEST.EXPORT": "nn", "DATA_LOADER.NUM_WORKERS": 1, "DATA_LOADER.MAX_PIXELS": 10**9,
    "DATA_LOADER.PIN_MEMORY": False, "SupG.gemp": False, "SupG.gemp_p": 3,
    "SupG.rgem": False, "SupG.rgem_p": 3, "SupG.rgem_window": 3, "SupG.sgem": False, "SupG.sgem_p": 3,
    "SupG.relup": False, "SupG.relup_threshold": 0.1, "SupG.rerank": False, "SupG.rerank_m": 20, "SupG.rerank_k": 5,
    "SupG.rerank_beta": 0.5, "SupG.onemeval": True, "SupG.rerank_s2": "original",
    "TEST.INDEX": "Flat", "TEST.INDEX_SEARCH": "nprobe=3", "TEST.INDEX_ROWS": "decoded",
    "MODEL.MEAN": "0.5,0.5,0.5", "MODEL.STD": "0.5,0.5,0.5", "MODEL.SIZE": "64", "MODEL.MULTIPLE": 14,
    "DATA_LOADER.TRUNCATED": True, "TEST.PLACE_RADIUS": 10, "TEST.CROP_QUERIES": True,
    "TEST.FUSION": "a.yaml,b.yaml", "TEST.FUSION_WEIGHTS": "1,2",
    "RERANK.QE_N": 5, "RERANK.QE_ALPHA": 2, "RERANK.DBA_K": 5, "RERANK.K1": 10, "RERANK.K2": 3, "RERANK.LAMBDA": 0.5,
    "RERANK.DIFFUSION_K": 20, "RERANK.DIFFUSION_KQ": 5, "RERANK.DIFFUSION_GAMMA": 2, "RERANK.DIFFUSION_ALPHA": 0.9,
}  # fmt: skip


class Recording(config.CfgNode):
    """Options that record which of them are read outside of the parser."""

    read: set[str]

    def __getattr__(self, name):
        value, reader = super().__getattr__(name), sys._getframe(1)
        if reader.f_code.co_name in ("active_rerankers", "fusion_parts"):
            reader = reader.f_back
        if not isinstance(value, config.CfgNode) and reader.f_code.co_filename != config.__file__:
            type(self).read.add(name)
        return value


@pytest.fixture
def tiny(tmp_path) -> Layout:
    """One query and four database images."""
    layout = Layout(tmp_path / "data")
    truth = {"bbx": [0, 0, 40, 40], "easy": [0], "hard": [1], "junk": [2]}
    layout.gnd.update(imlist=["db_0", "db_1", "db_2", "db_3"], qimlist=["query_0"], gnd=[truth])
    layout.write()
    return layout


@pytest.fixture
def runs(tiny, two_layers, checkpoint_50, tmp_path) -> dict[str, list[tuple]]:
    """Command lines of each command that together cover all its branches, one of them with CVNet's network."""
    rows = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    vectors, million = tmp_path / "far.npy", tiny.data_dir / "revisitop1m"
    np.save(vectors, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    np.savez(tmp_path / "some.npz", Q=rows[:1], X=rows[1:])
    fused = ("TEST.FUSION", tmp_path / "some.npz", "TEST.FUSION_WEIGHTS", 1)
    million.mkdir()
    (million / "revisitop1m.txt").write_text("a.jpg\n")
    (million / "a.jpg").write_bytes(tiny.image("db_0").read_bytes())
    shutil.copytree(tiny.folder, tiny.data_dir / "mine")
    (tiny.data_dir / "mine" / "gnd_roxford5k.pkl").rename(tiny.data_dir / "mine" / "gnd_mine.pkl")

    where, index = ("TEST.DATA_DIR", tiny.data_dir), ("TEST.INDEX", "IVF1,Flat", "TEST.INDEX_ROWS", "decoded")
    quick = ("TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
    fast = (*where, "TEST.DATASET_LIST", "roxford5k", *two_layers)
    data = (*where, "TEST.DATASET_LIST", "roxford5k", "TEST.WEIGHTS", checkpoint_50, *quick)
    far, rivals = ("SupG.onemeval", "TEST.DISTRACTORS", vectors), "aqe,alpha-qe,dba,k-reciprocal,diffusion"
    searched = ("--database", tiny.folder / "jpg", "--queries", tiny.folder / "jpg")
    reranked = ("--queries", vectors, "--database", vectors, "--out", tmp_path / "out.npy")
    return {
        "test.py": [
            (*fast, *far, "TEST.REPORT"),
            (*data, *index, "TEST.RERANKER", "cvnet"),
            (*fast, "TEST.RERANKER", rivals),
            (*fast, *fused),
        ],
        "extract_rop1m.py": [("--weight", checkpoint_50, "--depth", 50, "--data-dir", million, *quick)],
        "tools/search.py": [
            (*searched, "--weights", checkpoint_50, *quick),
            *((*searched, *two_layers, *more) for more in (("TEST.RERANKER", rivals), index)),
        ],
        "tools/tables.py main": [(*data, "--depth", 50, *index, "TEST.RERANKER", "cvnet"), fast, (*fast, *fused)],
        "tools/tables.py ablation": [data, (*fast, *far), (*fast, *index), (*fast, *fused)],
        "tools/tables.py rerank": [(*data, *index), (*fast, *far), (*fast, *fused)],
        "tools/tables.py rerankers": [(*data, *index), (*fast, *far), (*fast, *fused)],
        "tools/tune.py": [
            ("--on", "roxford5k", "--test", "mine", *where, *network)
            for network in (("TEST.WEIGHTS", checkpoint_50, *quick), (*two_layers, *index), (*two_layers, *fused))
        ],
        "tools/rerank.py": [
            *((*reranked, "--reranker", name) for name in ("superglobal", *rivals.split(","))), (*reranked, *index)
        ],
        "tools/demo.py": [data, (*searched[:2], *two_layers)],
    }  # fmt: skip


@pytest.fixture
def gradio(monkeypatch) -> MagicMock:
    """In place of Gradio: a page that somebody opens once, and that ends then."""
    gradio = MagicMock(__version__="6.0")
    page = gradio.Blocks.return_value.__enter__.return_value

    def visit() -> None:
        opened, name = page.load.call_args_list[-2].args[0], gradio.Dropdown.call_args.kwargs["value"]
        *_, message = opened(None, name, list(MODULES), "", 400, 9, 0.15)
        assert message == ""

    page.share_url, page.block_thread.side_effect = None, visit
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    return gradio


def test_the_matrix_has_every_option():
    assert CHANGED.keys() == {option.key for option in config.OPTIONS}


@pytest.mark.parametrize(
    "name",
    [
        "test.py",
        "extract_rop1m.py",
        *(f"tools/{tool}.py" for tool in ("search", "rerank", "tune", "demo")),
        *(f"tools/tables.py {t}" for t in ("main", "ablation", "rerank", "rerankers")),
    ],
)
def test_an_option_is_used_or_refused(command, runs, gradio, monkeypatch, name):
    script, *task = name.split()
    monkeypatch.setattr(Recording, "read", set(), raising=False)
    with monkeypatch.context() as patched:
        patched.setattr(config, "CfgNode", Recording)
        for words in runs[name]:
            outcome = command(script, *task, *words)
            assert outcome.code == 0, outcome.err
    unused = {key: value for key, value in CHANGED.items() if key.split(".")[-1] not in Recording.read}
    assert len(unused) < len(CHANGED) - 10
    flags = [word for word in runs[name][0] if str(word).startswith("--")]
    required = [word for flag in flags for word in runs[name][0][runs[name][0].index(flag) :][:2]]
    for key, value in unused.items():
        outcome = command(script, *task, *required, key, value)
        assert outcome.code == 2, f"{name} ignores {key}"
        assert re.match(rf"error: {key} .*(is not an option of|has no effect)", outcome.err), outcome.err


# Options that another checkpoint or whitening must fit; tests/model/test_recipe.py has them.
IMAGES = ("MEAN", "STD", "SIZE", "MULTIPLE")  # what other networks need of their images
NEEDING_A_FILE = ("TEST.WEIGHTS", "MODEL.WHITENING", "MODEL.DEPTH", "MODEL.HEADS.REDUCTION_DIM")


@pytest.mark.parametrize("key", [key for key in config.NETWORK if key not in NEEDING_A_FILE])
def test_each_option_of_the_network_changes_the_descriptors_provenance(key, checkpoint_50):
    other = key in ("MODEL.POOLING", "SupG.relup_stages", "SupG.relup_ends", *(f"MODEL.{of}" for of in IMAGES))
    base = [("MODEL.NAME", CHANGED["MODEL.NAME"])] if other else []
    recipes = [
        make_recipe(cfg, checkpoint_50 if cfg.MODEL.NAME == "cvnet" else "untrained")
        for cfg in (config.make_config(base), config.make_config([*base, (key, CHANGED[key])]))
    ]
    assert recipes[0].provenance() != recipes[1].provenance()


def test_each_setting_keeps_its_descriptors_and_each_run_its_results(command, runs):
    words = runs["test.py"][2]
    lines = [line for line in command("test.py", *words).out.splitlines() if "mAP" in line]
    (kept,) = Path("output/descriptors").iterdir()
    before = {file.name: file.read_bytes() for file in kept.glob("*.npy")}
    command("test.py", *words, "SupG.rgem_p", 3)
    assert len([*Path("output/descriptors").iterdir()]) == 2
    assert {file.name: file.read_bytes() for file in kept.glob("*.npy")} == before
    assert [line for line in command("test.py", *words).out.splitlines() if "mAP" in line] == lines != []
    results = sorted(path for path in Path("output/runs").iterdir() if not path.is_symlink())
    assert [(path / "results.json").exists() for path in results] == [True] * 3
    assert Path("output/runs/latest").resolve() == results[-1].resolve()


def test_an_interrupted_run_is_not_affected_by_a_run_with_other_settings(command, runs, tiny):
    words, damaged = runs["test.py"][2], tiny.image("db_3")
    whole = damaged.read_bytes()
    damaged.write_text("not an image")
    assert command("test.py", *words).code == 2  # the descriptors of images before it are kept
    damaged.write_bytes(whole)
    assert command("test.py", *words, "SupG.gemp", "False").code == 0
    assert "database: 1 images extracted, 3 unchanged" in command("test.py", *words).out


def test_a_checkpoint_that_does_not_fit_leaves_saved_descriptors_unchanged(command, runs):
    words = runs["test.py"][1]
    assert command("test.py", *words).code == 0
    outcome = command("test.py", *words, "MODEL.DEPTH", 101)
    assert (outcome.code, "ResNet-50" in outcome.err) == (2, True)
    assert command("test.py", *words).out.count(": reused") == 4  # queries, database, index, cvnet's scores


@pytest.mark.parametrize(
    ("script", "words", "noun"),
    [
        ("extract_rop1m.py", ("--depth", 101), "ResNet-50"),
        ("tools/search.py", ("--depth", 50, "MODEL.DEPTH", 101), "contradict"),
        ("extract_rop1m.py", ("MODEL.HEADS.REDUCTION_DIM", 512), "2048"),
        ("extract_rop1m.py", ("TEST.DEVICE", "cuda:99"), "TEST.DEVICE"),
    ],
)
def test_settings_that_contradict_the_checkpoint_or_the_machine_are_refused(command, runs, script, words, noun):
    outcome = command(script, *runs[script][0], *words)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert noun in outcome.err


def test_toy_takes_weights_that_are_given(command, toy_data, tmp_path):
    (tmp_path / "work" / "weights").mkdir(parents=True)
    words = ("TEST.DATASET_LIST", "toy", "TEST.DATA_DIR", toy_data, "TEST.WEIGHTS", "./weights")
    outcome = command("test.py", *words)
    assert outcome.code == 2
    assert "TEST.WEIGHTS" in outcome.err.splitlines()[-1]


def test_help_and_mistyped_options_need_no_pytorch_in_any_folder(tmp_path):
    code = "import sys, runpy; sys.modules.update(torch=None, numpy=None); sys.argv[0] = 'test.py';"
    code += f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'test.py')!r}, run_name='__main__')"
    for word, expected, noun in (("--help", 0, ""), ("SupG.gem", 2, "error: unknown option SupG.gem; did you mean ")):
        done = subprocess.run([sys.executable, "-c", code, word], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr[: len(noun)]) == (expected, noun)
        assert done.stderr.count("\n") == (expected == 2)
