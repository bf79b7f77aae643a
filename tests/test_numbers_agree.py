"""The log, results.json, the report, tables and comparisons of one run have the same numbers."""

import json
import re

from conftest import latest

NETWORK = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, 4), torch.nn.ReLU()).eval()
"""


def test_the_log_results_page_tables_and_comparisons_have_the_same_numbers(command, layout, tmp_path):
    """With eight images, there are values at 1 and 5, and none at 10."""
    truth = [{"bbx": [0, 0, 70, 50], "easy": [q], "hard": [q + 3], "junk": [6]} for q in range(3)]
    layout.gnd.update(imlist=layout.gnd["imlist"][:8], gnd=truth)
    layout.write()
    (tmp_path / "mine.py").write_text(NETWORK)
    words = ["TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "TEST.SCALE_LIST", 1]
    words += ["MODEL.NAME", f"{tmp_path / 'mine.py'}:build", "DATA_LOADER.NUM_WORKERS", 0]
    outcome = command("test.py", *words, "TEST.REPORT")
    assert outcome.code == 0, outcome.err
    run = latest(tmp_path / "work" / "output").resolve()
    entry = json.loads((run / "results.json").read_text())["datasets"]["roxford5k"]
    page = (run / "report" / "index.html").read_text()
    log = (tmp_path / "work" / "log.txt").read_text()
    compared = command("tools/compare.py", f"{run}:retrieval", run).out
    table = command("tools/tables.py", "main", *words)
    assert table.code == 0, table.err

    for column, stage in enumerate(("retrieval", "reranking")):
        maps = [f"{entry[stage][name]['mAP']:.2f}" for name in "EMH"]
        at_k = [[f"{entry[stage][name][f'mP@{k}']:.2f}" for k in (1, 5)] for name in "EMH"]
        assert {key for key in entry[stage]["M"] if "@" in key} == {"mP@1", "mP@5"}
        named = ", ".join(f"{name}: {value}" for name, value in zip("EMH", maps, strict=True))
        values = ", ".join(f"{name}: {' '.join(pair)}" for name, pair in zip("EMH", at_k, strict=True))
        assert f"{stage.capitalize()} results: mAP {named}" in log
        assert f"{stage.capitalize()} results: mP@1,5 {values}" in log
        assert re.search(rf"roxford5k, {stage} +{' +'.join(maps)}", log)

        (cells,) = re.findall(rf'<th scope="row">roxford5k, {stage}</th>(.*?)</tr>', page)
        pairs = [each for value, pair in zip(maps, at_k, strict=True) for each in (value, " ".join(pair))]
        assert re.findall(r"<td>(.*?)</td>", cells) == pairs

        (cells,) = re.findall(rf"\| roxford5k \| {stage} \| (.*) \|", table.out)
        cells = cells.split(" | ")
        assert [cells[0], cells[1], cells[4]] == maps
        assert cells[7:10] == [" ".join([*pair, "-"]) for pair in at_k]  # there are fewer than 10 images

        for name, value, pair in zip("EMH", maps, at_k, strict=True):
            (cells,) = re.findall(rf"\| roxford5k \| {name} \| mAP \| (.*) \|", compared)
            assert cells.split(" | ")[column] == value
            assert f"roxford5k, {name}, {'AB'[column]}: mAP {value}, mP@1 {pair[0]}, mP@5 {pair[1]}\n" in compared
