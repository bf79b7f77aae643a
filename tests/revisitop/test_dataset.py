import pickle

import numpy as np
import pytest

from model.errors import InputError
from revisitop.layouts import load_dataset


def test_the_layout_of_roxford_is_read(layout):
    dataset = load_dataset("roxford5k", layout.data_dir)
    assert [image.path.name for image in dataset.database[:2]] == ["db_0.jpg", "db_1.jpg"]
    assert dataset.queries[1].box == (4.5, 3.0, 60.2, 51.0)
    assert dataset.ground_truth[2].listed.tolist() == [
        number for kind in ("easy", "hard", "junk") for number in layout.gnd["gnd"][2][kind]
    ]


def test_the_subfolder_of_revisitop_is_found(layout):
    moved = layout.data_dir / "data" / "datasets" / "roxford5k"
    moved.parent.mkdir(parents=True)
    layout.folder.rename(moved)
    assert load_dataset("roxford5k", layout.data_dir).folder == moved


@pytest.mark.parametrize("protocol", range(6))
def test_ground_truth_may_hold_numpy_arrays_of_any_pickle_protocol(layout, protocol):
    for entry in layout.gnd["gnd"]:
        entry["easy"] = np.array(entry["easy"])
        entry["bbx"] = np.array(entry["bbx"], dtype=np.float32)
        entry["hard"] = [np.int64(number) for number in entry["hard"]]
    layout.ground_truth_file.write_bytes(pickle.dumps(layout.gnd, protocol))
    dataset = load_dataset("roxford5k", layout.data_dir)
    assert dataset.ground_truth[0].kinds["easy"].tolist() == layout.gnd["gnd"][0]["easy"].tolist()


@pytest.mark.parametrize("kind", [list, np.array])
def test_a_query_may_have_no_easy_hard_or_junk_image(layout, kind):
    layout.gnd["gnd"][0].update(easy=kind([]), hard=kind([3, 4]), junk=kind([]))
    layout.write()
    kinds = load_dataset("roxford5k", layout.data_dir).ground_truth[0].kinds
    assert {name: numbers.tolist() for name, numbers in kinds.items()} == {"easy": [], "hard": [3, 4], "junk": []}


@pytest.mark.parametrize(
    ("change", "noun"),
    [
        (lambda gnd: gnd.pop("imlist"), "imlist"),
        (lambda gnd: gnd.update(imlist=set(gnd["imlist"])), "a set"),
        (lambda gnd: gnd["imlist"].append("a\0b"), "imlist"),
        (lambda gnd: gnd["imlist"].append("db_1.jpg"), "imlist"),
        (lambda gnd: gnd["imlist"].append("../db_1"), "outside"),
        (lambda gnd: gnd["qimlist"].insert(0, "/etc/db_1"), "outside"),
        (lambda gnd: gnd["gnd"].pop(), "gnd"),
        (lambda gnd: gnd["gnd"].insert(0, gnd["gnd"].pop()["easy"]), "gnd"),
        (lambda gnd: gnd["gnd"][1].update(easy=[True]), "'easy'"),
        (lambda gnd: gnd["gnd"][1].update(easy=[1.5]), "as easy"),
        (lambda gnd: gnd["gnd"][1].update(hard=[[1], [2, 3]]), "'hard'"),
        (lambda gnd: gnd["gnd"][1].update(hard=[24]), "as hard"),
        (lambda gnd: gnd["gnd"][1].update(junk=None), "query_1"),
        (lambda gnd: gnd["gnd"][1].update(junk=gnd["gnd"][1]["easy"][:1]), "more than once"),
        (lambda gnd: gnd["gnd"][1].update(easy=[5, 5], hard=[], junk=[]), "more than once"),
        (lambda gnd: gnd["gnd"][1].pop("bbx"), "bbx"),
        (lambda gnd: gnd["gnd"][1].update(bbx=[1, 2, 3]), "bbx"),
        (lambda gnd: gnd["gnd"][1].update(bbx=[1, 2, 3, float("inf")]), "bbx"),
    ],
)
def test_inconsistent_ground_truth_is_rejected(layout, change, noun):
    change(layout.gnd)
    layout.write()
    with pytest.raises(InputError, match=noun):
        load_dataset("roxford5k", layout.data_dir)
