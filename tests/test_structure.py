import ast
import sys

import pytest
from conftest import ROOT

ALLOWED = {
    "modules": {"torch", "modules"},
    "model": {"torch", "torchvision", "numpy", "PIL", "tqdm", "model", "modules"},
}
LIBRARY = sorted(path for folder in ("modules", "model", "revisitop") for path in (ROOT / folder).rglob("*.py"))


def imported(path) -> set[str]:
    """The top-level names that a file imports, beside Python's own."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.parent.name if node.level else node.module.split(".")[0])
    return names - sys.stdlib_module_names


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert imported(path) <= ALLOWED[folder], path


def test_no_library_file_reads_the_config():
    commands = {path for path in LIBRARY if "__main__" in path.read_text()}
    assert LIBRARY
    assert [path for path in LIBRARY if path not in commands and "config" in imported(path)] == []
