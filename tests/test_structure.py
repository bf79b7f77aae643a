"""The layers of the project: a file imports from its own layer and below, and imports are never circular."""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# What the files of each layer import beside Python's standard library, from the bottom up. Commands import anything.
ALLOWED = {
    "modules": {"torch", "modules"},
    "model": {
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "PIL",
        "pillow_heif",
        "filelock",
        "scipy",
        "simplejpeg",
        "tqdm",
        "triton",
        "modules",
        "model",
    },
    "revisitop": {"torch", "numpy", "faiss", "scipy", "PIL", "tqdm", "modules", "model", "revisitop"},
    "report": {"numpy", "PIL", "tqdm", "matplotlib", "jinja2", "yaml", "model", "revisitop", "report"},
    "config.py": {"yaml", "yacs", "model"},
    "assembly.py": {"torch", "tqdm", "yacs", "modules", "model", "revisitop"},
    "hubconf.py": {"modules", "model"},
}
COMMANDS = ("test.py", "extract_rop1m.py", "tools")


def files_of(place: str) -> list[Path]:
    return sorted((ROOT / place).rglob("*.py")) if (ROOT / place).is_dir() else [ROOT / place]


def imported(path: Path) -> set[str]:
    """Returns the dotted names of all modules that a file imports."""
    package, names = path.relative_to(ROOT).parts[0], set()
    for node in ast.walk(ast.parse(path.read_text())):
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
    assert places - {"tests", "benchmarks", "examples", "docs"} == {*ALLOWED, *COMMANDS}


def test_the_options_import_nothing_heavy():
    assert {name for name in imported(ROOT / "config.py") if name.startswith("model")} == {
        "model.errors",
        "model.errors.InputError",
        "model.errors.as_typed",
    }
    assert roots_of(ROOT / "model" / "errors.py") == set()


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
    for path in [path for place in ("modules", "model", "revisitop", "report") for path in files_of(place)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and OPTION.search(node.value):
                named[f"{path.relative_to(ROOT)}:{node.lineno}"] = node.value
    assert named == {}


# Expressions that the project avoids in favour of the terms of the field, with what to write instead.
AVOIDED = {
    r"pictures?": "image",
    r"describ(e|es|ed|ing)": "extract (descriptors)",
    r"stamps?": "fingerprint",
    r"maps? of local features": "feature map",
    r"what made it": "provenance",
    r"go(es|ing|ne)? on with": "resume, continue",
    r"(is|are|was|were) not there": "missing",
    r"cannot take": "unsupported, invalid",
    r"theirs": "the name of whose it is",
}
# An element of HTML, and a key in the provenance files of earlier versions.
UNAVOIDABLE = re.compile(r"</?picture>|\"stamps\"")


def test_texts_use_the_terms_of_the_field():
    avoided = re.compile("|".join(rf"\b({words})\b" for words in AVOIDED), re.IGNORECASE)
    folders = ("benchmarks", "docs", "examples", "model", "modules", "report", "revisitop", "tests", "tools", "weights")
    files = [path for folder in ("", *folders) for path in (ROOT / folder).glob("**/*" if folder else "*")]
    found = {
        f"{path.relative_to(ROOT)}:{number}": match[0]
        for path in files
        if path.suffix in (".py", ".md", ".html", ".yml", ".toml") and path != Path(__file__) and path.is_file()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if (match := avoided.search(UNAVOIDABLE.sub("", line)))
    }
    assert found == {}, f"write instead: {AVOIDED}"
