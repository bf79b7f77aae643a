"""Files are written completely or not at all, and those of strangers give what was asked for or one line."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from extraction.files import (
    read_json,
    read_mat,
    read_numpy,
    read_pickle,
    write_array,
    write_atomically,
    write_json,
)
from model import pickles
from model.errors import InputError

# A tuple that contains itself twice, 60 times over: its hash takes 2^60 steps.
NESTED = b"K\x01\x85" + b"2\x86" * 60


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a fault of ours")])
def test_a_file_that_cannot_be_written_leaves_the_older_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail(file) -> None:
        file.write(b"half of it")
        raise error

    with pytest.raises(InputError if isinstance(error, OSError) else RuntimeError):
        write_atomically(path, fail)
    assert read_json(path) == {"a": 1}
    assert [*tmp_path.iterdir()] == [path]


def test_a_disk_that_is_too_full_for_tensors_is_an_input_error(tmp_path):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError):
        write_atomically(tmp_path / "x.pth", lambda file: torch.save(torch.zeros(9), Full(file)))


def test_json_keeps_values_that_it_does_not_know(tmp_path):
    write_json(tmp_path / "x.json", {"a": np.float32(0.5), "b": [np.nan, np.inf], "c": np.arange(2), "d": {"e": (1,)}})
    assert read_json(tmp_path / "x.json") == {"a": 0.5, "b": [None, "inf"], "c": [0, 1], "d": {"e": [1]}}


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 6000, b"\xff", b"", b"[1]", b"{"])
def test_json_that_is_damaged_is_an_input_error(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError):
        read_json(tmp_path / "missing.json")


@pytest.mark.parametrize("dtype", [">f2", "<f4", ">f4", "<f8"])
def test_arrays_of_any_byte_order_are_read(tmp_path, dtype):
    rows = np.arange(6, dtype=dtype).reshape(2, 3)
    write_array(tmp_path / "x.npy", rows)
    np.savez_compressed(tmp_path / "x.npz", a=rows, b=rows.T)
    for array, expected in (
        (read_numpy(tmp_path / "x.npy")[""], rows),
        (read_numpy(tmp_path / "x.npz")["b"], rows.T),
    ):
        assert array.dtype.isnative
        assert array.flags.writeable
        assert torch.equal(torch.from_numpy(array), torch.from_numpy(expected.astype(dtype[1:])))


def test_files_with_other_arrays_are_input_errors(tmp_path):
    for name, array in {"object": np.array([{}]), "int": np.arange(3), "long": np.zeros(1, np.longdouble)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "x.npz", a=np.zeros(1), b=np.array([{}]))
    (tmp_path / "short.npy").write_bytes((tmp_path / "int.npy").read_bytes()[:-1])
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(10_000_000, np.float32))
    for name in ("object.npy", "long.npy", "x.npz", "short.npy", "missing.npy", "zeros.npz"):
        with pytest.raises(InputError):
            read_numpy(tmp_path / name)


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_containers_numbers_text_and_arrays_are_read(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    content = {"a": [1, (2, 3.5), None, True], "b": "é", "c": b"\xff", "d": {3, 1}, "e": np.int64(4), "f": np.str_("g")}
    arrays = {
        "rows": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "numbers": np.arange(3, dtype=">i4"),
        "none": np.array([]),
        "view": np.arange(12, dtype=np.float16).reshape(3, 4)[:, 1],
    }
    content |= {"names": np.array(["x", "yy"]), **arrays}
    found = read_pickle(saved(Path("x.pkl"), pickle.dumps(content, protocol)))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found.pop(name).dtype == array.dtype.newbyteorder("=")
    expected = {"a": [1, [2, 3.5], None, True], "b": "é", "c": "\udcff", "d": [1, 3], "e": 4, "f": "g"}
    assert found == {**expected, "names": ["x", "yy"]}


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_arrays_of_old_and_new_numpy_are_read(tmp_path, core):
    content = pickle.dumps(np.arange(3), protocol=0)
    content = content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", f"{core}.".encode())
    assert read_pickle(saved(tmp_path / "x.pkl", content)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8])
def test_tensors_in_a_pickle_are_read_as_arrays(tmp_path, dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for each in (tensor, tensor.transpose(0, 2), tensor[1, 1:, ::2], tensor[0, 0, 0]):
        np.testing.assert_array_equal(read_pickle(saved(tmp_path / "x.pkl", pickle.dumps(each))), each.numpy())


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"c__builtin__\nbytes\n(I1000000000\ntR.",
        b"ctorch.storage\n_load_from_bytes\n(S'cos\\nsystem\\n(S\"touch ran\"\\ntR.'\ntR.",
        pickle.dumps({"x": {"a", "b"}}),  # the order of a set of names differs from run to run
        pickle.dumps({1: 2}),
        pickle.dumps(np.array([{}])),
        pickle.dumps(np.zeros(2, complex)),
        pickle.dumps(10**6000),
        pickle.dumps(torch.zeros(2).expand(1 << 40, 2)),
        pickle.dumps([b"x" * 100_000] * 1000),
        b"\x80\x05\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
        b"]" + b"2\x86" * 60 + b".",
        b"(" * 100_000,
        b"",
    ],
    ids=[str(number) for number in range(19)],
)
def test_a_pickle_of_anything_else_is_an_input_error_and_runs_no_code(tmp_path, monkeypatch, stream):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        read_pickle(saved(tmp_path / "x.pkl", stream))
    assert [*tmp_path.iterdir()] == [tmp_path / "x.pkl"]


def test_a_dtype_that_is_changed_after_its_creation_is_refused(tmp_path):
    # An array of integers whose dtype is said to be one of objects: NumPy would take its bytes for addresses.
    state = pickle.dumps((3, "|", None, None, None, -1, -1, 63), protocol=2)[2:-1]
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"

    def content(text: bytes) -> bytes:
        dtype = b"cnumpy\ndtype\n(X" + len(text).to_bytes(4, "little") + text + b"I00\nI01\ntR" + state + b"b"
        return b"\x80\x02" + array + b"(I1\n(I1\nt" + dtype + b"I00\nS'" + 8 * b"a" + b"'\ntb."

    assert read_pickle(saved(tmp_path / "x.pkl", content(b"i8"))).dtype == np.int64
    for text in (b"O8", b"V8", b"c16", b"M8[ns]", b"i8,O", b"(1000000000,)i8"):
        with pytest.raises(InputError):
            read_pickle(saved(tmp_path / "x.pkl", content(text)))


COLLIDING = [pickle.encode_long(number * (2**61 - 1) + 1) for number in range(30_000)]  # integers of equal hash


@pytest.mark.parametrize(
    "stream",
    [
        b"(" + NESTED + b"\x91.",
        b"}(" + b"".join(b"\x8a" + bytes([len(each)]) + each + b"N" for each in COLLIDING) + b"u.",
    ],
    ids=["frozenset", "collisions"],
)
def test_a_pickle_that_would_be_hashed_for_ever_is_refused(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(pickles, "SECONDS", 1)
    with pytest.raises(InputError, match="more than 1 s"):
        read_pickle(saved(tmp_path / "x.pkl", b"\x80\x04" + stream))


def test_matlab_files_give_their_descriptors(tmp_path):
    path, rows = tmp_path / "x.mat", np.arange(6.0).reshape(2, 3)
    scipy.io.savemat(path, {"Q": rows, "X": rows.astype(np.float32), "other": "text"}, do_compression=True)
    found = read_mat(path)
    assert {name: array.dtype for name, array in found.items()} == {"Q": np.float64, "X": np.float32}
    np.testing.assert_array_equal(found["Q"], rows)
    scipy.io.savemat(path, {"Q": rows, "X": np.array([rows, "a"], dtype=object)})
    with pytest.raises(InputError):
        read_mat(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError):
        read_mat(path)
