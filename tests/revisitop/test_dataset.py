import pickle

import numpy as np
import pytest

from model.errors import InputError
from revisitop.layouts import load_dataset
from revisitop.safe_pickle import load_pickle


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


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [list, np.array])
def test_a_query_may_have_no_easy_hard_or_junk_image_in_any_pickle_protocol(layout, protocol, kind):
    layout.gnd["gnd"][0].update(easy=kind([]), hard=kind([3, 4]), junk=kind([]))
    layout.ground_truth_file.write_bytes(pickle.dumps(layout.gnd, protocol))
    truth = load_dataset("roxford5k", layout.data_dir).ground_truth[0]
    assert (truth.kinds["easy"].tolist(), truth.kinds["hard"].tolist(), truth.kinds["junk"].tolist()) == (
        [],
        [3, 4],
        [],
    )


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_arrays_of_old_and_new_numpy_are_read(tmp_path, core):
    path = tmp_path / "array.pkl"
    content = pickle.dumps(np.arange(3), protocol=0)
    path.write_bytes(content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", f"{core}.".encode()))
    assert load_pickle(path).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nsystem\n(S'echo'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"c__builtin__\nbytes\n(I1000000000\ntR.",
    ],
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path, stream):
    path = tmp_path / "bad.pkl"
    path.write_bytes(stream)
    with pytest.raises(InputError, match="is refused: it would call"):
        load_pickle(path)


def test_a_dtype_that_is_changed_after_its_creation_is_refused(tmp_path):
    # An array of integers whose dtype is told to be one of objects: NumPy would take its bytes for addresses.
    stream = pickle.dumps(np.arange(2), protocol=2)
    state = pickle.dumps((3, "|", None, None, None, -1, -1, 63), protocol=2)[2:-1]
    assert b"i8" in stream
    path = tmp_path / "bad.pkl"
    for text in (b"O8", b"V8", b"c16", b"M8[ns]", b"i8,O", b"(1000000000,)i8"):
        header = b"\x80\x02cnumpy\ndtype\n(X" + len(text).to_bytes(4, "little") + text + b"I00\nI01\ntR"
        path.write_bytes(header + state + b"b.")
        with pytest.raises(InputError, match="is refused: it would call an array of"):
            load_pickle(path)
    plain = b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00i8I00\nI01\ntR"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    path.write_bytes(b"\x80\x02" + array + b"(I1\n(I1\nt" + plain[2:] + state + b"bI00\nS'" + 8 * b"a" + b"'\ntb.")
    assert load_pickle(path).dtype == np.int64


@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_recursive_lists_are_rejected(layout, kind):
    bomb: list = [1]
    for _ in range(60):
        bomb = [bomb, bomb]
    if kind == "names":
        layout.gnd["imlist"][3] = bomb
    else:
        layout.gnd["gnd"][0]["hard"] = bomb
    layout.write()
    with pytest.raises(InputError, match=r"but has a list|no list of image numbers 'hard'"):
        load_dataset("roxford5k", layout.data_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gnd: gnd["gnd"][1].update(easy=[True]), "'easy'"),
        (lambda gnd: gnd["gnd"][1].update(easy=[1.5]), "'easy'"),
        (lambda gnd: gnd["gnd"][1].update(bbx=["1", "2", "3", "4"]), "has no box"),
        (lambda gnd: gnd["imlist"].append("a\0b"), "must hold names of images"),
        (lambda gnd: gnd.pop("imlist"), "imlist, qimlist and gnd"),
        (lambda gnd: gnd["gnd"].pop(), "3 queries but 2 entries"),
        (lambda gnd: gnd["gnd"][1].pop("bbx"), "query query_1 has no box"),
        (lambda gnd: gnd["gnd"][1].update(bbx=[1, 2, 3]), "query query_1 has no box"),
        (lambda gnd: gnd["gnd"][1].update(junk=None), "query query_1 has no list of image numbers 'junk'"),
        (lambda gnd: gnd["gnd"][1].update(hard=["a"]), "'hard'"),
        (lambda gnd: gnd["gnd"][1].update(hard=[-1]), "lists image -1 as hard"),
        (lambda gnd: gnd["gnd"][1].update(junk=gnd["gnd"][1]["easy"][:1]), "more than once"),
        (lambda gnd: gnd["gnd"][1].update(easy=[5, 5], hard=[], junk=[]), "lists image 5 more than once"),
    ],
)
def test_inconsistent_ground_truth_is_rejected(layout, change, message):
    change(layout.gnd)
    layout.write()
    with pytest.raises(InputError, match=message):
        load_dataset("roxford5k", layout.data_dir)
