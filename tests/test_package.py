"""The package `superglobal` as pip installs it: the folder modules/, with nothing but PyTorch."""

import importlib
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import torch
from conftest import ROOT


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


def test_the_installed_package_computes_the_papers_values(site, monkeypatch, reference):
    monkeypatch.syspath_prepend(site)
    installed = importlib.import_module("superglobal")
    assert str(site) in installed.__file__
    layers = [
        (installed.RegionalGeM(), "pool_in", "rgem_out"),
        (installed.GeMPlus(), "pool_in", "gemp_out"),
        (installed.ScaleGeM(), "sgem_in", "sgem_max_out"),
        (installed.ScaleGeM(p=10), "sgem_in", "sgem_p10_out"),
        (installed.ReLUPlus(), "relup_in", "relup_out"),
    ]
    for layer, given, expected in layers:
        out = layer(torch.from_numpy(reference[given]))
        np.testing.assert_allclose(out.numpy(), reference[expected], atol=2e-6, rtol=0)
        assert layer.state_dict() == {}
    queries, rows = reference["rerank_Q"], reference["rerank_X"]
    ids = installed.search(torch.from_numpy(queries), torch.from_numpy(rows), m=len(rows)).ids.numpy()
    reranker = installed.SuperGlobalReranker(m=400, k=9, beta=0.15)
    order = reranker.rerank(queries, ids, lambda wanted: rows[wanted]).order
    ids[:, :400] = np.take_along_axis(ids, order, axis=1)
    np.testing.assert_array_equal(ids.T, reference["rerank_ranks_M400_K9_b0.15"])
