"""Descriptors are kept by content, separately for each setting; python -m tools.cache lists them."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def quick(layout, checkpoint_50) -> tuple:
    data = ("TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    return (*data, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)


def folders() -> list[Path]:
    return sorted(Path("output/descriptors").iterdir())


def test_every_setting_keeps_its_descriptors_and_every_run_its_results(command, quick):
    first = command("test.py", *quick, "TEST.REPORT")
    (kept,) = folders()
    before = {file.name: file.read_bytes() for file in kept.glob("*.npy")}
    assert {*before} == {"roxford5k_query.npy", "roxford5k_db.npy"}
    command("test.py", *quick, "SupG.rgem_p", 3)
    assert len(folders()) == 2
    assert {file.name: file.read_bytes() for file in kept.glob("*.npy")} == before
    again = command("test.py", *quick)
    assert again.out.count("reused") == 2
    assert [line for line in again.out.splitlines() if "mAP" in line] == [
        line for line in first.out.splitlines() if "mAP" in line
    ]
    runs = sorted(path for path in Path("output/runs").iterdir() if not path.is_symlink())
    assert [(path / "report").exists() for path in runs] == [True, False, False]
    assert Path("output/runs/latest").resolve() == runs[-1].resolve()
    assert all((path / "results.json").exists() for path in runs)


def test_tables_reuse_descriptors_of_test_py(command, quick):
    assert command("test.py", *quick).code == 0
    outcome = command("tools/tables.py", "rerank", *quick)
    assert outcome.code == 0, outcome.err
    assert len(folders()) == 1
    assert outcome.err.count("reused") + outcome.out.count("reused") == 2


def test_the_cache_is_listed_and_deleted_by_name(command, quick):
    command("test.py", *quick)
    command("test.py", *quick, "SupG.gemp", False)
    listed = command("tools/cache.py").out
    for folder in folders():
        assert folder.name in listed
    assert "gemp off" in listed
    assert "gemp 4.6" in listed
    gone, stays = folders()
    assert command("tools/cache.py", "--delete", gone.name).code == 0
    assert folders() == [stays]
    outcome = command("tools/cache.py", "--delete", gone.name)
    assert outcome.code == 2
    assert stays.name in outcome.err
    assert (
        command("test.py", "TEST.FEATURES", stays, *quick[2:6]).code == 0
    )  # the folder can be evaluated as saved descriptors
    assert np.load(stays / "roxford5k_db.npy").shape == (24, 2048)
