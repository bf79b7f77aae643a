"""The program in the documentation gives the documented results."""

import re

from conftest import ROOT, Layout


def program(mark: str) -> str:
    """Returns the Python block of the page that contains the mark."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "modules.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if mark in block]
    return code


def test_the_library_functions_in_a_users_program(monkeypatch, capsys, tmp_path, checkpoint_50):
    (tmp_path / "weights").symlink_to(checkpoint_50.parent)
    Layout(tmp_path / "data")
    (tmp_path / "holiday").symlink_to(tmp_path / "data" / "roxford5k" / "jpg")
    monkeypatch.chdir(tmp_path)
    exec(program("from revisitop.retrieve import"), {})
    out = capsys.readouterr().out
    assert "'gemp_p': 4.6" in out
    assert "'sgem_p': None" in out
    assert re.search(r"tensor\(\[\[ *0, .*\n +\[ *1, ", out)  # each image finds itself first
