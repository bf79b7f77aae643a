"""The package `superglobal` as pip installs it: the folder modules/, with nothing but PyTorch."""

import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # builds and installs the package


def test_the_package_is_the_modules_and_needs_torch_alone(built):
    with zipfile.ZipFile(built[0]) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist()}
    modules = ["py.typed", *(path.name for path in (ROOT / "modules").glob("*.py"))]
    assert {name for name in files if ".dist-info/" not in name} == {f"superglobal/{name}" for name in modules}
    (metadata,) = (text.decode() for name, text in files.items() if name.endswith("METADATA"))
    assert re.findall("^Requires-Dist: (.*)$", metadata, re.MULTILINE) == ["torch>=2.6"]


def test_the_readmes_ten_lines_run_where_only_the_package_is_installed(site, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "from superglobal import" in block]
    assert len(code.splitlines()) <= 12
    hidden = "import sys\nsys.modules.update(dict.fromkeys(['torchvision', 'yacs', 'modules', 'model', 'PIL'], None))\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tensor([[" in done.stdout
