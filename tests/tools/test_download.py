"""The download command with a local server, a proxy for all hosts, that misbehaves in configured ways."""

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import re
import resource
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import Layout
from served import (
    CMP,
    FEATURES,
    MILLION_IMAGES,
    MILLION_LIST,
    NETWORKS,
    OXFORD_IMAGES,
    OXFORD_TRUTH,
    PARIS_IMAGES,
    PARIS_TRUTH,
    PTAK,
    VGG,
    Answer,
    images,
    publish,
    serving,
    tgz,
)

from model.errors import InputError
from revisitop.layouts import load_dataset
from tools import download, transfer

pytestmark = pytest.mark.slow  # serves and unpacks archives

MIRROR = "http://mirror.local/files"


@pytest.fixture
def site(monkeypatch):
    yield from serving(monkeypatch)


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def get(site, data, tmp_path, capsys):
    """Runs the command. Returns whether everything is complete, and what it printed."""

    def run(*arguments: str) -> tuple[bool, str]:
        problem = ""
        try:
            download.main([*arguments, "--data-dir", str(data), "--weights-dir", str(tmp_path / "weights")])
        except InputError as error:
            problem = str(error)
        return not problem, "".join(capsys.readouterr()) + problem

    return run


def mat() -> bytes:
    scipy.io.savemat(content := io.BytesIO(), {"Q": np.eye(3), "X": np.eye(3)})
    return content.getvalue()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def oxford(site, tmp_path) -> Layout:
    publish(site, layout := Layout(tmp_path / "origin"))
    return layout


@pytest.fixture
def paris(site, tmp_path) -> Layout:
    publish(site, layout := Layout(tmp_path / "origin", "rparis6k"))
    return layout


@pytest.fixture
def million(site, data) -> list[str]:
    """Archives 1 to 6 contain two images each, with the returned names; the others are marked as unpacked."""
    names = [f"{n}/{i}/{n}_{i}.jpg" for n in range(1, 7) for i in range(2)]
    site[MILLION_LIST] = Answer("\n".join(names).encode())
    for n, path in enumerate(MILLION_IMAGES[:6], start=1):
        site[path] = Answer(tgz({name: b"not looked at" for name in names if name.startswith(f"{n}/")}))
    (data / "revisitop1m").mkdir(parents=True)
    (data / "revisitop1m/unpacked.txt").write_text("".join(f"revisitop1m.{n}.tar.gz\n" for n in range(7, 101)))
    return names


# Addresses and places of files


def test_images_are_in_one_folder_beside_the_ground_truth_also_in_the_layout_of_revisitop(get, data, oxford, paris):
    folders = {"roxford5k": data / "data" / "datasets" / "roxford5k", "rparis6k": data / "rparis6k"}
    folders["roxford5k"].mkdir(parents=True)
    (folders["roxford5k"] / "gnd_roxford5k.pkl").write_bytes(oxford.ground_truth_file.read_bytes())
    complete, output = get("roxford5k", "rparis6k")
    assert complete, output
    for layout in (oxford, paris):
        folder, truth = folders[layout.name], layout.ground_truth_file
        assert (folder / truth.name).read_bytes() == truth.read_bytes()
        assert {path.name: path.read_bytes() for path in (folder / "jpg").iterdir()} == images(layout)
        assert files(folder) == {truth.name, "unpacked.txt"} | {f"jpg/{name}" for name in images(layout)}
    assert not (data / "roxford5k").exists()


def test_features_are_in_the_data_folder_and_distractors_keep_their_folders(get, data, site, million):
    for path in FEATURES:
        site[path] = Answer(mat())
    assert get("features", "revisitop1m")[0]
    listed = {f"revisitop1m/{name}" for name in ("revisitop1m.txt", "unpacked.txt", *(f"jpg/{n}" for n in million))}
    assert files(data) == listed | {path.rpartition("/")[2] for path in FEATURES}


def test_the_published_addresses_are_asked(get, site, oxford, paris):
    lists = [OXFORD_TRUTH, PARIS_TRUTH, MILLION_LIST]
    site[MILLION_LIST] = Answer(b"1.jpg")
    for path in [OXFORD_IMAGES, *PARIS_IMAGES]:
        del site[path]
    assert not get("roxford5k", "rparis6k", "revisitop1m", "features", "weights")[0]
    assert set(site.asked()) == {
        *(f"{host}{path}" for host in (CMP, PTAK) for path in [*MILLION_IMAGES, *FEATURES]),
        *(f"{CMP if path != MILLION_LIST else PTAK}{path}" for path in lists),
        *(f"{VGG}{path}" for path in [OXFORD_IMAGES, *PARIS_IMAGES]),
        *(f"{PTAK}{path}" for path in NETWORKS),
    }


def test_a_mirror_is_asked_first_and_the_own_hosts_for_what_it_lacks(get, site, oxford):
    site[f"{MIRROR}{OXFORD_TRUTH}"] = site.pop(OXFORD_TRUTH)
    assert get("roxford5k", "--mirror", f"{MIRROR}/")[0]
    assert site.asked() == [f"{MIRROR}{OXFORD_TRUTH}", f"{MIRROR}{OXFORD_IMAGES}", f"{VGG}{OXFORD_IMAGES}"]


def test_the_total_size_is_told(get, site, oxford):
    site[OXFORD_IMAGES] = Answer(b"no archive" * 700_000)
    _, output = get("roxford5k", "features")
    assert "roxford5k: 2 files, 0.007 GB" in output
    assert "features: 2 files, 0.000 GB, 2 of unknown size" in output


# Connections and lengths


def test_a_cut_download_is_resumed_in_this_run_and_in_the_next(get, data, site, oxford):
    site[OXFORD_IMAGES].cuts = [20_000] + [0] * 50
    site[OXFORD_IMAGES].headers = {"Content-Encoding": "gzip"}  # the archive stays as it is
    assert not get("roxford5k")[0]
    assert (data / "roxford5k/oxbuild_images-v1.tgz.part").stat().st_size == 20_000
    site[OXFORD_IMAGES].cuts, site.requests = [30_000], []
    assert get("roxford5k")[0]
    assert site.requests == [(f"{VGG}{OXFORD_IMAGES}", f"bytes={start}-") for start in (20_000, 50_000)]
    assert (data / "roxford5k/jpg/db_0.jpg").read_bytes() == oxford.image("db_0").read_bytes()


@pytest.mark.parametrize("excess", [-100, 0, 100])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_partial_file_of_something_else_is_downloaded_from_the_start(get, data, site, oxford, excess, ranges):
    site[OXFORD_IMAGES].ranges = ranges
    (data / "roxford5k").mkdir(parents=True)
    size = len(site[OXFORD_IMAGES].body) + excess
    (data / "roxford5k/oxbuild_images-v1.tgz.part").write_bytes(b"x" * size)
    assert get("roxford5k")[0]
    assert site.ranges(OXFORD_IMAGES)[0] == f"bytes={size}-"


def test_a_server_that_always_cuts_or_is_busy_is_asked_again_and_then_the_next(get, site, oxford):
    site[f"{CMP}{OXFORD_TRUTH}"] = Answer(b"", status=503)
    site[OXFORD_IMAGES].ranges, site[OXFORD_IMAGES].cuts = False, [20_000] * 50
    assert not get("roxford5k")[0]
    assert site.asked(OXFORD_TRUTH) == [f"{CMP}{OXFORD_TRUTH}"] * (transfer.RETRIES + 1) + [f"{PTAK}{OXFORD_TRUTH}"]
    assert len(site.asked(OXFORD_IMAGES)) == transfer.RETRIES + 1


@pytest.mark.parametrize(
    ("excess", "ranges", "believed"), [(100, True, True), (100, False, False), (-100, True, False)]
)
def test_a_wrong_content_length_is_detected(get, data, site, oxford, excess, ranges, believed):
    """A length above the true one may be corrected by a server with ranges."""
    good = site[OXFORD_TRUTH].body
    site[f"{CMP}{OXFORD_TRUTH}"] = Answer(good, excess=excess, ranges=ranges)
    assert get("roxford5k")[0]
    assert (f"{PTAK}{OXFORD_TRUTH}" in site.asked()) == (not believed)
    assert (data / "roxford5k/gnd_roxford5k.pkl").read_bytes() == good


@pytest.fixture
def closed_port():
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_without_any_connection_each_missing_file_is_named_with_its_address(get, data, monkeypatch, closed_port):
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr(transfer, "BACKOFF", 1e9)  # a connection that never was is not tried again
    tried, connect = [], transfer.requests.request
    monkeypatch.setattr(transfer.requests, "request", lambda *a, **o: tried.append(a[1]) or connect(*a, **o))
    complete, output = get(*download.ITEMS)
    assert not complete
    assert output.count("you seem to be offline") == len(download.ITEMS)
    assert f"{CMP}{OXFORD_TRUTH} as {data / 'roxford5k/gnd_roxford5k.pkl'}" in output
    assert f"{PTAK}{NETWORKS[1]} as " in output
    assert tried == [f"{CMP}{OXFORD_TRUTH}", f"{PTAK}{OXFORD_TRUTH}"]  # then it is clear


def test_a_mirror_without_connection_is_left_out(get, site, oxford, monkeypatch, closed_port):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "BACKOFF", 1e9)
    assert get("roxford5k", "--mirror", f"http://127.0.0.1:{closed_port}")[0]


# Invalid bytes


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


def damaged(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]


@pytest.mark.parametrize(
    ("item", "path", "make"),
    [
        ("roxford5k", OXFORD_TRUTH, lambda body: body[:-100]),
        ("roxford5k", OXFORD_TRUTH, lambda body: pickle.dumps(Harmful())),
        ("roxford5k", OXFORD_IMAGES, lambda body: body[:-5000]),
        ("roxford5k", OXFORD_IMAGES, lambda body: body[:-6] + b"\0\0" + body[-4:]),  # the checksum
        ("roxford5k", OXFORD_IMAGES, damaged),
        ("roxford5k", OXFORD_IMAGES, lambda body: gzip.compress(b"no tar" * 1000)),
        ("revisitop1m", MILLION_IMAGES[0], lambda body: tgz({"a": b"file", "a/b.jpg": b""})),
        ("revisitop1m", MILLION_LIST, lambda body: b"1/1.jpg\n1/2.jpg\n1/3.j"),
        ("features", FEATURES[0], lambda body: b"MATLAB" * 100),
        ("weights", NETWORKS[0], lambda body: b"PK\x03\x04" + b"no checkpoint"),
    ],
)  # fmt: skip
def test_invalid_bytes_never_get_the_final_name(get, site, oxford, million, tmp_path, item, path, make):
    site[path] = Answer(make(site[path].body if path in site else b""))
    complete, output = get(item)
    name = path.rpartition("/")[2]
    assert not complete
    assert re.search(f"^{item}: .*{name}", output, re.MULTILINE)
    assert [file for file in files(tmp_path) if name in file and not file.startswith("origin")] == []


@pytest.mark.parametrize("path", [OXFORD_TRUTH, OXFORD_IMAGES])
@pytest.mark.parametrize("body", [b"<!DOCTYPE html>Please log in", None], ids=["web page", "damaged"])
def test_after_invalid_bytes_the_next_address_is_tried(get, data, site, oxford, path, body):
    headers = {"Content-Type": "text/html"} if body else {}
    site[f"{MIRROR}{path}"] = Answer(body or damaged(site[path].body), headers=headers)
    assert get("roxford5k", "--mirror", MIRROR)[0]
    assert len(files(data / "roxford5k/jpg")) == 27


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../../evil.jpg", tarfile.REGTYPE, ""),
        ("a/../../../evil.jpg", tarfile.REGTYPE, ""),
        ("ROOT/evil.jpg", tarfile.REGTYPE, ""),
        ("../evil.jpg", tarfile.DIRTYPE, ""),
        ("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("evil.jpg", tarfile.LNKTYPE, "/etc/passwd"),
        ("evil.jpg", tarfile.FIFOTYPE, ""),
        ("evil.jpg", tarfile.CHRTYPE, ""),
    ],
)
def test_a_hostile_archive_writes_only_files_and_only_into_its_folder(tmp_path, name, kind, target, flat):
    member = tarfile.TarInfo(name.replace("ROOT", str(tmp_path)))
    member.type, member.linkname = kind, target
    archive, into = tmp_path / "hostile.tgz", tmp_path / "a" / "b" / "images"
    archive.write_bytes(tgz({"good.jpg": b"1"}, member))
    with contextlib.suppress(InputError):
        download.unpack(into, archive, flat=flat)
    assert all(path.is_file() and not path.is_symlink() for path in into.rglob("*.jpg"))
    assert {file for file in files(tmp_path) if not file.startswith("a/b/images/")} == {"hostile.tgz"}


# Repeated and interrupted runs


def test_a_second_run_downloads_nothing_and_says_so(get, data, site, oxford, paris, million):
    items = ("roxford5k", "rparis6k", "revisitop1m")
    assert "nothing was downloaded" not in get(*items)[1]
    before, site.requests = files(data), []
    assert "nothing was downloaded" in get(*items)[1]
    assert site.requests == []
    assert files(data) == before


@pytest.mark.parametrize("kind", ["all", "images", "archive"])
def test_files_from_another_source_are_used(get, data, site, oxford, kind):
    folder = data / "roxford5k"
    data.mkdir()
    if kind == "archive":
        folder.mkdir()
        (folder / "oxbuild_images-v1.tgz").write_bytes(site[OXFORD_IMAGES].body)
    else:
        oxford.folder.rename(folder)
    if kind == "images":
        (folder / "gnd_roxford5k.pkl").unlink()
    assert get("roxford5k")[0]
    assert site.asked() == ([] if kind == "all" else [f"{CMP}{OXFORD_TRUTH}"])
    assert not (folder / "oxbuild_images-v1.tgz").exists()


@pytest.mark.parametrize("name", ["gnd_roxford5k.pkl", "oxbuild_images-v1.tgz"])
def test_a_damaged_file_of_the_user_is_named_and_kept(get, data, oxford, name):
    (data / "roxford5k").mkdir(parents=True)
    (data / "roxford5k" / name).write_bytes(b"damaged")
    complete, output = get("roxford5k")
    assert not complete
    assert f"delete {data / 'roxford5k' / name}" in output
    assert (data / "roxford5k" / name).read_bytes() == b"damaged"


def test_the_million_resumes_with_the_archives_that_are_not_unpacked(get, data, site, million):
    late = {path: site.pop(path) for path in (MILLION_IMAGES[2], MILLION_IMAGES[4])}
    assert not get("revisitop1m")[0]
    assert files(data / "revisitop1m/jpg") == {name for name in million if name[0] not in "35"}
    site |= late
    site.requests = []
    assert get("revisitop1m")[0]
    assert site.asked() == [f"{PTAK}{path}" for path in late]
    assert files(data / "revisitop1m/jpg") == set(million)


def test_a_connection_that_is_lost_for_good_ends_the_item_with_one_line(get, data, site, million):
    for path in MILLION_IMAGES[2:6]:
        site[path].status = 0
    complete, output = get("revisitop1m")
    assert not complete
    assert len(re.findall("^revisitop1m: no address", output, re.MULTILINE)) == 1
    assert files(data / "revisitop1m/jpg") == set(million[:4])
    assert not site.asked(MILLION_IMAGES[3])


@pytest.mark.parametrize("where", ["unpacking", "moving"])
def test_an_interrupted_unpacking_is_done_again_without_a_download(get, data, site, oxford, monkeypatch, where):
    replace, data_filter, moved = os.replace, tarfile.data_filter, []

    def interrupted_replace(source, target):
        if ".unpacking" in str(source):
            moved.append(target)
            if len(moved) > 5:
                raise KeyboardInterrupt
        replace(source, target)

    def interrupted_filter(member, folder):
        if where == "unpacking" and member.name == "db_5.jpg":
            raise KeyboardInterrupt
        return data_filter(member, folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted_replace)
        patch.setattr(tarfile, "data_filter", interrupted_filter)
        with pytest.raises(KeyboardInterrupt):
            get("roxford5k")
    assert len(files(data / "roxford5k/jpg")) == {"unpacking": 0, "moving": 5}[where]
    site.requests = []
    assert get("roxford5k")[0]
    assert site.ranges() == [f"bytes={len(site[OXFORD_IMAGES].body)}-"]
    assert len(files(data / "roxford5k/jpg")) == 27


# The check of the images


@pytest.mark.parametrize("harm", ["not in the archive", "not decodable", "a distractor"])
def test_an_image_that_is_missing_or_damaged_is_named_and_can_be_fetched_again(get, data, site, oxford, million, harm):
    item, image, archive = "roxford5k", data / "roxford5k/jpg/query_1.jpg", site[OXFORD_IMAGES]
    if harm == "not in the archive":
        members = images(oxford)
        del members["query_1.jpg"]
        site[OXFORD_IMAGES] = Answer(tgz({**members, "not_listed.jpg": b"damaged"}))
    elif harm == "not decodable":
        assert get(item)[0]
        image.write_bytes(image.read_bytes()[:1000])
    else:
        item, image = "revisitop1m", data / "revisitop1m/jpg/4/1/4_1.jpg"
        assert get(item)[0]
        image.unlink()
    complete, output = get(item)
    assert not complete
    assert image.name in output
    site[OXFORD_IMAGES] = archive
    unpacked = image.parents[3 if item == "revisitop1m" else 1] / "unpacked.txt"
    unpacked.write_text("".join(line for line in unpacked.read_text().splitlines(True) if "1m.4.tar" not in line))
    if item == "roxford5k":
        unpacked.unlink()
    assert get(item)[0]
    assert image.is_file()


# Weights


def test_both_checkpoints_are_downloaded_and_one_of_another_network_is_removed(
    get, site, tmp_path, checkpoint_50, checkpoint_101, monkeypatch
):
    monkeypatch.setattr(transfer, "CHUNK", 1 << 20)
    for path in NETWORKS:
        site[path] = Answer(checkpoint_50.read_bytes())
    complete, output = get("weights")
    assert not complete
    assert files(tmp_path / "weights") == {checkpoint_50.name}
    assert re.search(r"^weights: .*CVNet_R101.*weights/README\.md", output, re.MULTILINE)
    site[NETWORKS[1]] = Answer(checkpoint_101.read_bytes())
    assert get("weights")[0]
    assert files(tmp_path / "weights") == {checkpoint_50.name, checkpoint_101.name}


def test_existing_checkpoints_with_other_names_are_found(get, site, tmp_path, checkpoint_50, checkpoint_101):
    (tmp_path / "weights").mkdir()
    for path in (checkpoint_50, checkpoint_101):
        (tmp_path / "weights" / f"my_{path.name}").symlink_to(path)
    assert get("weights")[0]
    assert site.requests == []


# Errors and arguments


def test_one_item_that_fails_does_not_stop_the_others(get, site, oxford, paris):
    del site[PARIS_IMAGES[0]]
    complete, output = get("features", "rparis6k", "roxford5k")
    assert not complete
    assert "roxford5k is complete" in output
    assert "features, rparis6k" in output


def test_a_full_disk_is_reported_and_the_download_is_resumed(get, site, oxford):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        assert not get("roxford5k")[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert get("roxford5k")[0]
    assert site.ranges(OXFORD_IMAGES) == [None, "bytes=30000-"]


@pytest.mark.parametrize("arguments", [["roxford"], [], ["features", "--mirror", "my.server"]])
def test_bad_arguments_are_refused_before_any_request(get, site, arguments):
    assert not get(*arguments)[0]
    assert site.requests == []


# Google Landmarks v2


@pytest.fixture
def landmarks(site, monkeypatch):
    """Google Landmarks v2 at a mirror, with three archives of index images and two of test images."""
    monkeypatch.setattr(download, "LANDMARK_ARCHIVES", {"index": 3, "test": 2})
    root, index = f"{MIRROR}/google-landmark", [f"{number:02x}{'0' * 14}" for number in range(6)]
    solution = f"id,images,Usage\nt00,{index[0]} {index[5]},Public\nt01,None,Ignored\nt03,{index[2]},Private\n"
    site[f"{root}/metadata/index.csv"] = Answer("\n".join(["id", *index]).encode())
    site[f"{root}/metadata/test.csv"] = Answer(b"id\nt00\nt01\nt02\nt03\n")
    site[f"{root}/ground_truth/retrieval_solution_v2.1.csv"] = Answer(solution.encode())
    parts = {"index": [index[:2], index[2:4], index[4:]], "test": [["t00", "t01"], ["t02", "t03"]]}
    for kind, archives in parts.items():
        for number, names in enumerate(archives):
            body = gzip.decompress(tgz({f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg": b"image" * 900 for name in names}))
            site[f"{root}/{kind}/images_{number:03}.tar"] = Answer(body)
            line = f"{hashlib.md5(body).hexdigest()}  images_{number:03}.tar\n"
            site[f"{root}/md5sum/{kind}/md5.images_{number:03}.txt"] = Answer(line.encode())
    return ["gldv2", "--mirror", MIRROR]


@pytest.mark.parametrize(
    ("flags", "kept"), [([], ["t00", "t03"]), (["--all-test-images"], ["t00", "t01", "t02", "t03"])]
)
def test_of_gldv2_all_images_are_kept_but_those_that_are_no_queries(get, landmarks, data, site, flags, kept):
    landmarks += flags
    complete, output = get(*landmarks)
    assert complete, output
    dataset = load_dataset("gldv2", data)
    dataset.check_files()
    assert (len(dataset.queries), len(dataset.database)) == (2, 6)
    assert sorted(path.stem for path in (data / "gldv2" / "test").rglob("*.jpg")) == kept
    assert not list((data / "gldv2").rglob("*.tar"))
    site.requests = []
    assert "nothing was downloaded" in get(*landmarks)[1]
    assert site.requests == []


@pytest.mark.parametrize("harm", ["md5", "cut", "missing", "no md5"])
def test_an_invalid_archive_of_gldv2_is_never_used(get, landmarks, data, site, harm):
    path = "md5sum/index/md5.images_001.txt" if harm == "no md5" else "index/images_001.tar"
    address = f"{MIRROR}/google-landmark/{path}"
    whole = site.pop(address)
    if harm in ("md5", "cut"):
        site[address] = Answer(whole.body[:-600] if harm == "cut" else whole.body.replace(b"image", b"imagf"))
    complete, output = get(*landmarks)
    assert not complete
    assert "images_001" in output
    others = 4 if harm != "no md5" else 0  # whose images are unpacked
    assert len(list((data / "gldv2" / "index").rglob("*.jpg"))) == others
    site[address], site.requests = whole, []
    assert get(*landmarks)[0]
    assert len(site.asked("index/images_000.tar")) == (others == 0)
    load_dataset("gldv2", data).check_files()
