"""The layers of the project: a file imports from its own layer and below, and imports are never circular."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

# What the files of each layer import beside Python's standard library, from the bottom up. Commands import anything.
ALLOWED = {
    "modules": {"torch", "triton", "modules"},
    "model": {
        *("torch", "torchvision", "timm", "huggingface_hub", "safetensors", "h5py", "numpy", "scipy"),
        *("modules", "model"),
    },
    "extraction": {
        *("torch", "numpy", "PIL", "pillow_heif", "simplejpeg", "filelock", "tqdm"),
        *("modules", "model", "extraction"),
    },
    "cvnet_rerank": {"torch", "numpy", "PIL", "tqdm", "modules", "model", "extraction", "cvnet_rerank"},
    "revisitop": {
        *("torch", "numpy", "faiss", "h5py", "scipy", "PIL", "tqdm"),
        *("modules", "model", "extraction", "cvnet_rerank", "revisitop"),
    },
    "report": {
        *("numpy", "PIL", "tqdm", "matplotlib", "jinja2", "yaml"),
        *("modules", "model", "extraction", "revisitop", "report"),
    },
    "config.py": {"yaml", "yacs", "model"},
    "assembly.py": {
        *("torch", "tqdm", "yacs", "config", "modules", "model", "extraction", "cvnet_rerank", "revisitop", "report")
    },
    "hubconf.py": {"modules", "model", "extraction"},
}
COMMANDS = ("test.py", "extract_rop1m.py", "tools")


def files_of(place: str) -> list[Path]:
    return sorted((ROOT / place).rglob("*.py")) if (ROOT / place).is_dir() else [ROOT / place]


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Returns the imports and the texts in a file."""
    kinds = (ast.Import, ast.ImportFrom, ast.Constant)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imported(path: Path) -> set[str]:
    """Returns the dotted names of all modules that a file imports."""
    package, names = path.relative_to(ROOT).parts[0], set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def roots_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_go_down(place):
    assert {str(path): extra for path in files_of(place) if (extra := roots_of(path) - ALLOWED[place])} == {}


def test_every_python_file_has_a_layer():
    places = {path.name for path in ROOT.iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    others = {"tests", "benchmarks", "examples", "docs", "mine.py"}  # the last is that of CONTRIBUTING.md
    assert places - others == {*ALLOWED, *COMMANDS}


def test_the_options_import_nothing_heavy():
    assert roots_of(ROOT / "config.py") - {"yaml", "yacs"} == {"model"}
    assert {name for name in imported(ROOT / "config.py") if name.startswith("model")} <= {
        *("model.errors", "model.errors.InputError", "model.errors.nearest")
    }
    assert roots_of(ROOT / "model" / "errors.py") == set()
    assert roots_of(ROOT / "report" / "command.py") == {"model"}


def test_only_commands_import_options_and_assembly():
    library = [path for place in ALLOWED if place != "assembly.py" for path in files_of(place)]
    library += files_of("benchmarks") + files_of("examples")
    users = {path.relative_to(ROOT) for path in library if roots_of(path) & {"config", "assembly"}}
    assert users == set()


def test_files_do_not_import_each_other_in_a_circle():
    files = [path for place in (*ALLOWED, *COMMANDS) for path in files_of(place)]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    uses = {name: (imported(path) & names.keys()) - {name} for name, path in names.items()}
    while free := [name for name, used in uses.items() if not used & uses.keys()]:
        for name in free:
            del uses[name]
    assert uses == {}


# --no-python is torchrun's
OPTION = re.compile(r"\b(TEST|SupG|MODEL|DATA_LOADER)\.[A-Za-z]|(?<![\w-])--(?!no-python)[a-z]")


def test_library_code_names_no_option():
    named = {}
    rooms = ("modules", "model", "extraction", "cvnet_rerank", "revisitop", "report")
    for path in [path for place in rooms for path in files_of(place)]:
        for node in nodes_of(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and OPTION.search(node.value):
                named[f"{path.relative_to(ROOT)}:{node.lineno}"] = node.value
    assert named == {}
