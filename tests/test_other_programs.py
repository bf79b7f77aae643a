"""Files of other programs are read, or refused with a line that helps; what we write is read by us and by them."""

import csv
import json
import pickle

import numpy as np
import pytest
import scipy.io
import torch
from conftest import latest, run_script
from drawn_descriptors import draw_descriptors
from PIL import Image

from extraction.arrays import read_arrays_of
from model.errors import InputError
from revisitop.descriptors import load_features, load_ranking, load_rows, ranking_of, unit_rows
from revisitop.evaluate import evaluate
from revisitop.layouts import load_dataset

Q, N, D = 3, 24, 16  # of the layout


def unit(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def dataset(layout):
    return load_dataset("roxford5k", layout.data_dir)


QUERIES, ROWS = unit(Q, 1), unit(N, 2)


def h5(path, content):
    h5py = pytest.importorskip("h5py", reason="optional")
    with h5py.File(path, "w") as file:
        for name, array in content.items():
            file[name] = array
    return path


def save(path, array):
    """Saves one array in the format of the suffix."""
    kind = path.suffix
    if kind == ".npy":
        np.save(path, array)
    elif kind == ".npz":
        np.savez(path, features=array)
    elif kind == ".pth":
        torch.save(torch.from_numpy(np.ascontiguousarray(array)), path)
    elif kind == ".hdf5":
        h5(path, {"features": array})
    elif kind == ".mat":
        scipy.io.savemat(path, {"X": array.T})
    else:
        path.write_bytes(pickle.dumps(array))
    return path


VARIANTS = {
    "float16": lambda rows: rows.astype(np.float16),
    "float64": lambda rows: rows.astype(np.float64),
    "Fortran order": np.asfortranarray,
    "big-endian": lambda rows: rows.astype(">f4"),
    "not normalised": lambda rows: 3 * rows,
}


@pytest.mark.parametrize("kind", [".npy", ".npz", ".pth", ".hdf5", ".mat", ".pkl"])
def test_one_reader_takes_every_kind_of_file(tmp_path, kind):
    path = save(tmp_path / f"rows{kind}", ROWS)
    path = path.rename(tmp_path / "rows.bin") if kind != ".mat" else path  # the content decides
    np.testing.assert_allclose(unit_rows(load_rows(path), str(path)).numpy(), ROWS, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [".npy", ".hdf5", ".pkl"])
def test_one_reader_takes_every_kind_of_numbers(tmp_path, kind, variant):
    rows = unit_rows(load_rows(save(tmp_path / f"rows{kind}", VARIANTS[variant](ROWS))), "rows")
    np.testing.assert_allclose(rows.float().numpy(), ROWS, atol=1e-3 if variant == "float16" else 1e-6)


@pytest.mark.parametrize("content", [b"", b"1.0,2.0\n3.0,4.0\n", np.arange(40, dtype=np.int32).tobytes()])
def test_a_file_of_another_kind_is_refused_with_what_is_accepted(tmp_path, content):
    path = tmp_path / "vectors.fvecs"
    path.write_bytes(content)
    with pytest.raises(InputError, match="HDF5"):
        load_rows(path)


def test_names_in_a_file_of_hloc_are_matched_with_the_dataset(dataset, tmp_path):
    named = {f"jpg/query_{number}.jpg": row for number, row in enumerate(QUERIES)}
    named |= {f"db_{number}.jpg": row for number, row in enumerate(ROWS)} | {"another.jpg": ROWS[0]}
    content = {f"{name}/global_descriptor": named[name].astype(np.float16) for name in [*named][::-1]}
    path = h5(tmp_path / "global-feats-netvlad.h5", content | {"another.jpg/image_size": np.array([4, 3])})
    found = load_features(path, dataset)
    np.testing.assert_allclose(found.queries, QUERIES, atol=1e-3)
    np.testing.assert_allclose(found.database, ROWS, atol=1e-3)
    del content["db_7.jpg/global_descriptor"]
    with pytest.raises(InputError, match=r"db_7\.jpg"):
        load_features(h5(tmp_path / "fewer.h5", content), dataset)


def test_a_name_that_fits_two_images_is_refused(tmp_path, layout):
    for name in ("a", "b"):
        for folder in ("mine/a", "mine/b"):
            target = layout.data_dir / folder / f"{name}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(layout.image("db_0").read_bytes())
    dataset = load_dataset("mine", layout.data_dir)
    names = [f"{folder}/{name}.jpg" for folder in "ab" for name in "ab"]
    path = h5(tmp_path / "x.h5", {f"{name}/global_descriptor": row for name, row in zip(names, ROWS, strict=False)})
    np.testing.assert_array_equal(load_features(path, dataset).database, ROWS[:4])
    with pytest.raises(InputError, match=r"a\.jpg fits both"):
        load_features(h5(tmp_path / "y.h5", {f"{name}.jpg/global_descriptor": ROWS[0] for name in "ab"}), dataset)


def test_the_two_files_of_ames_are_read_in_the_order_of_their_lists(dataset, tmp_path):
    h5(tmp_path / "dinov2_query_global.hdf5", {"features": QUERIES.astype(np.float16)})
    h5(tmp_path / "dinov2_gallery_global.hdf5", {"features": ROWS[::-1]})
    np.testing.assert_array_equal(load_features(tmp_path, dataset).database, ROWS[::-1])
    lines = [f"jpg/db_{number}.jpg,{number},640,480" for number in range(N)][::-1]
    (tmp_path / "test_gallery.txt").write_text("\n".join(lines) + "\n")
    for name in ("dinov2_query_global.hdf5", "dinov2_gallery_global.hdf5"):  # either stands for both
        np.testing.assert_array_equal(load_features(tmp_path / name, dataset).database, ROWS)


def rankings(seed: int = 0) -> np.ndarray:
    return np.stack([np.random.default_rng(seed + query).permutation(N) for query in range(Q)])


@pytest.mark.parametrize(
    ("form", "length"),
    [*((form, 10) for form in ("ranks.npy", "ranks.mat", "ours.npy", "nn.pkl", "nn as tensor.pkl", "nn.hdf5")),
     ("ranks.npy", N), ("ours.npy", N)],
)  # fmt: skip
def test_rankings_of_others_have_the_metrics_of_their_numbers(dataset, layout, tmp_path, form, length):
    ids, path = rankings()[:, :length], tmp_path / form
    both = np.stack([np.linspace(1, 0, length * Q).reshape(Q, -1), ids]).astype(np.float32)
    if form == "ranks.npy":
        np.save(path, ids.T)
    elif form == "ranks.mat":
        scipy.io.savemat(path, {"ranks": ids.T.astype(np.float64)})
    elif form == "nn.hdf5":
        h5(path, {"nn": both})
    else:
        save(path, ids if form == "ours.npy" else torch.from_numpy(both) if "tensor" in form else both)
    ranking = load_features(path, dataset)
    assert ranking.ids.tolist() == ids.tolist()
    places = {(query, number): place for query in range(Q) for place, number in enumerate(ids[query].tolist())}
    for query, truth in enumerate(dataset.ground_truth):
        expected = [places.get((query, number), 1 << 40) for number in truth.listed.tolist()]
        assert ranking.positions[query].tolist() == expected
    assert set(evaluate(ranking, dataset.ground_truth)) == {"E", "M", "H"}


def test_a_square_ranking_is_read_by_rows_or_columns_or_refused(tmp_path):
    ids = np.stack([np.roll(np.arange(4), query)[[0, 2, 1, 3]] for query in (0, 1, 2, 2)])  # columns have repetitions
    for array in (ids, ids.T):
        found, _ = ranking_of(read_arrays_of(save(tmp_path / "x.npy", array)), 4, 4)
        assert found.tolist() == ids.tolist()
    latin = np.stack([np.roll(np.arange(4), query) for query in range(4)])
    with pytest.raises(InputError, match="-1"):
        ranking_of(read_arrays_of(save(tmp_path / "x.npy", latin)), 4, 4)
    longer = np.concatenate([latin.T, np.full((1, 4), -1)])
    found, _ = ranking_of(read_arrays_of(save(tmp_path / "x.npy", longer)), 4, 4)
    assert found[:, :4].tolist() == latin.tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of test.py with all exports, on drawn descriptors; the run, and the options of its dataset."""
    pytest.importorskip("h5py", reason="optional")
    folder = tmp_path_factory.mktemp("exported")
    draw_descriptors(folder / "data", folder / "features", "new", 0)
    words = ("TEST.DATA_DIR", folder / "data", "TEST.DATASET_LIST", "new")
    forms = ("TEST.EXPORT", "nn,ranks,csv,ames,hloc", "SupG.rerank_m", 30)
    outcome = run_script("test.py", [*words, "TEST.FEATURES", folder / "features", *forms], folder)
    assert outcome.code == 0, outcome.err
    return latest(folder / "output").resolve(), words, outcome


def metric_lines(outcome) -> list[str]:
    return [line.partition(": ")[2] for line in outcome.out.splitlines() if " results: " in line]


def test_what_we_write_is_read_back_to_the_bit(exported, command):
    run, words, outcome = exported
    folder = words[1].parent
    lines = metric_lines(outcome)  # two of each stage
    for form in ("nn_new_{}.pkl", "ranks_new_{}.npy", "predictions_new_{}.csv"):
        for number, stage in enumerate(("retrieval", "reranking")):
            again = command("test.py", *words, "TEST.FEATURES", run / form.format(stage))
            assert again.code == 0, again.err
            assert metric_lines(again) == lines[2 * number : 2 * number + 2]
    queries, rows = (np.load(folder / "features" / f"new_{kind}.npy") for kind in ("query", "db"))
    dataset = load_dataset("new", folder / "data")
    for path in (run / "ames_new", run / "global-feats-new.h5"):
        found = load_features(path, dataset)
        np.testing.assert_array_equal(found.queries, queries)
        np.testing.assert_array_equal(found.database, rows)
    saved = [
        load_ranking(run / f"{name}_new_reranking{kind}", dataset).ids
        for name, kind in (("nn", ".pkl"), ("ranks", ".npy"))
    ]
    assert saved[0].tolist() == saved[1].tolist()


def test_what_we_write_is_what_their_readers_expect(exported):
    import h5py

    run, *_ = exported
    # AMES: utils.pickle_load, then nn[0] are similarities and nn[1].long() numbers
    with (run / "nn_new_reranking.pkl").open("rb") as file:
        nn = pickle.load(file)
    assert isinstance(nn, torch.Tensor)
    assert nn.shape == (2, 12, 120)
    assert (nn[0].diff(dim=1) <= 0).all()
    ranks = np.load(run / "ranks_new_reranking.npy")
    assert ranks.shape == (120, 12)
    assert (ranks == nn[1].long().numpy().T).all()
    # AMES: h5py.File(...)["features"], and the lists of images
    with h5py.File(run / "ames_new" / "superglobal_gallery_global.hdf5") as file:
        assert file["features"].shape == (120, 32)
    names = (run / "ames_new" / "test_gallery.txt").read_text().splitlines()
    assert len(names) == 120
    # hloc: utils.io.list_h5_names, then fd[name]["global_descriptor"].__array__()
    with h5py.File(run / "global-feats-new.h5", libver="latest") as file:
        found = []
        file.visititems(
            lambda _, each: found.append(each.parent.name.strip("/")) if isinstance(each, h5py.Dataset) else None
        )
        assert set(names) < set(found)
        assert file[names[3]]["global_descriptor"].__array__().shape == (32,)
    with (run / "predictions_new_reranking.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["id", "images"]
    assert len(lines) == 12


def test_rerank_takes_and_writes_the_forms_of_others(exported, tmp_path, command):
    run, *_ = exported
    folder = tmp_path / "reranked"
    folder.mkdir()
    ames = run / "ames_new"
    files = [ames / f"superglobal_{kind}_global.hdf5" for kind in ("query", "gallery")]
    words = ("--queries", files[0], "--database", files[1], "--out", folder / "x.npy")
    words = (*words, "SupG.rerank_m", 30, "TEST.EXPORT", "nn,ranks,csv,ames,hloc")
    outcome = command("tools/rerank.py", *words)
    assert outcome.code == 0, outcome.err
    expected = np.load(run / "ranks_new_reranking.npy")
    assert (np.load(folder / "ranks_x_reranking.npy") == expected).all()
    for form in ("ames_x/superglobal_gallery_global.hdf5", "ames_x/superglobal_query_global.hdf5"):
        original = run / form.replace("_x", "_new")
        np.testing.assert_array_equal(load_rows(folder / form), load_rows(original))
    assert len(read_arrays_of(folder / "global-feats-x.h5").names) == 132
    outcome = command("tools/rerank.py", *words, "--ids", run / "nn_new_retrieval.pkl")
    assert outcome.code == 0, outcome.err
    assert (np.load(folder / "ranks_x_reranking.npy") == expected).all()


def test_exports_of_descriptors_are_refused_for_a_ranking(exported, command):
    run, words, _ = exported
    outcome = command("test.py", *words, "TEST.FEATURES", run / "nn_new_retrieval.pkl", "TEST.EXPORT", "hloc")
    assert outcome.code == 2
    assert "TEST.EXPORT: hloc" in outcome.err


def test_what_a_search_writes_is_read_back_to_the_bit(command, two_layers, tmp_path):
    folder, rng = tmp_path / "shop", np.random.default_rng(0)
    for name in (
        "query/bag/1.jpg",
        "query/hat/1.png",
        *(f"gallery/{kind}/{n}.jpg" for kind in ("bag", "hat") for n in "234"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    words = ("--database", folder / "gallery", "--queries", folder / "query", *two_layers, "SupG.rerank_k", 2)
    outcome = command("tools/search.py", *words, "--json", "TEST.EXPORT", "nn,ranks,csv,ames,hloc")
    assert outcome.code == 0, outcome.err
    run, dataset = latest(tmp_path / "work" / "output"), load_dataset("shop", tmp_path)
    expected = [[each["file"] for each in query["results"]] for query in json.loads(outcome.out)["queries"]]
    for form in ("nn_search_reranking.pkl", "ranks_search_reranking.npy", "predictions_search_reranking.csv"):
        found = load_features(run / form, dataset)
        assert [[dataset.names[number] for number in row] for row in found.ids.tolist()] == expected
    saved = {path.stem: np.load(path) for path in (tmp_path / "work" / "output" / "descriptors").rglob("*.npy")}
    for form in ("ames_search", "global-feats-search.h5"):
        found = load_features(run / form, dataset)
        np.testing.assert_array_equal(found.queries, saved["queries"])
        np.testing.assert_array_equal(found.database, saved["database"])
