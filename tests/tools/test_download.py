"""The download command with a local server, a proxy for all hosts, that misbehaves in configured ways."""

import gzip
import hashlib
import io
import os
import pickle
import re
import resource
import socket
import sys
import tarfile
import threading
import webbrowser
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import scipy.io
from conftest import Layout

from revisitop.layouts import load_dataset
from tools import gldv2, transfer

VGG, CMP, PTAK = "http://www.robots.ox.ac.uk", "http://cmp.felk.cvut.cz", "http://ptak.felk.cvut.cz"
OXFORD_TRUTH = "/revisitop/data/datasets/roxford5k/gnd_roxford5k.pkl"
OXFORD_IMAGES = "/~vgg/data/oxbuildings/oxbuild_images-v1.tgz"
PARIS_TRUTH = "/revisitop/data/datasets/rparis6k/gnd_rparis6k.pkl"
PARIS_IMAGES = [f"/~vgg/data/parisbuildings/paris_{n}-v1.tgz" for n in (1, 2)]
FEATURES = [f"/revisitop/data/features/{name}_resnet_rsfm120k_gem.mat" for name in ("roxford5k", "rparis6k")]
MILLION_LIST = "/revisitop/revisitop1m/revisitop1m.txt"
MILLION_IMAGES = [f"/revisitop/revisitop1m/jpg/revisitop1m.{n}.tar.gz" for n in range(1, 101)]
LANDMARKS = "http://mirror.local/files/google-landmark"
NETWORK = "/personal/sumapave/public/ames/networks/CVPR2022_CVNet_R50.pyth"
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@dataclass
class Answer:
    """The answer of the server to a GET; `cuts` are the numbers of bytes after which its next answers end."""

    body: bytes
    status: int = 200
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    excess: int = 0  # by which the declared length exceeds the true one
    headers: dict[str, str] = field(default_factory=dict)


class Request(NamedTuple):
    url: str
    range: str | None
    if_range: str | None


class Site:
    """A server with `answers` by address, or by path for any host; `requests` are the received GETs, in order."""

    def __init__(self):
        self.answers: dict[str, Answer] = {}
        self.requests: list[Request] = []

    def put(self, address: str, body: bytes, **how) -> None:
        self.answers[address] = Answer(body, **how)

    def asked(self, end: str = "") -> list[str]:
        return [request.url for request in self.requests if request.url.endswith(end)]

    def ranges(self, end: str) -> list[str | None]:
        return [request.range for request in self.requests if request.url.endswith(end)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        site = self.server.site
        site.requests.append(Request(self.path, self.headers["Range"], self.headers["If-Range"]))
        answers, missing = site.answers, Answer(b"not here", 404, ranges=False)
        answer = answers.get(self.path) or answers.get(urlsplit(self.path).path) or missing
        start, status, headers = 0, answer.status, dict(answer.headers)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if asked and answer.ranges and self.headers["If-Range"] in (None, headers.get("ETag")):
            start, status, size = int(asked[1]), 206, len(answer.body)
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            if start >= size:
                status, headers["Content-Range"] = 416, f"bytes */{size}"
        body = answer.body[start:]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) + answer.excess))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: answer.cuts.pop(0)] if answer.cuts else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """A Site behind http_proxy, so that the published addresses are requested, but no other host is contacted."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for scheme in ("http", "https"):  # CONNECT, for https, is refused
        monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "BACKOFF", 0)
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    yield server.site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def here(tmp_path):
    """The data folder for the command."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def download(command, site, here, tmp_path):
    def run(*arguments):
        return command("tools/download.py", *arguments, "--data-dir", here, "--weights-dir", tmp_path / "weights")

    return run


def tgz(members: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)
    return file.getvalue()


def images(layout: Layout) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((layout.folder / "jpg").iterdir())}


@pytest.fixture
def oxford(site, tmp_path) -> Layout:
    layout = Layout(tmp_path / "origin")
    site.put(OXFORD_TRUTH, layout.ground_truth_file.read_bytes())
    site.put(OXFORD_IMAGES, tgz(images(layout)), headers={"ETag": '"one"'})
    return layout


@pytest.fixture
def paris(site, tmp_path) -> Layout:
    layout = Layout(tmp_path / "origin", "rparis6k")
    members = [(f"paris/{name[:2]}/{name}", content) for name, content in images(layout).items()]
    site.put(PARIS_TRUTH, layout.ground_truth_file.read_bytes())
    for path, half in zip(PARIS_IMAGES, (members[:10], members[10:]), strict=True):
        site.put(path, tgz(dict(half)))
    return layout


@pytest.fixture
def million(site, here) -> list[str]:
    """Archives 1 to 6 contain two images each, with the returned names; the others are marked as unpacked."""
    names = [f"{n}/{i}/{n}_{i}.jpg" for n in range(1, 7) for i in range(2)]
    site.put(MILLION_LIST, "\n".join(names).encode())
    for n, path in enumerate(MILLION_IMAGES[:6], start=1):
        site.put(path, tgz({name: b"not looked at" for name in names if name.startswith(f"{n}/")}))
    (here / "revisitop1m").mkdir()
    (here / "revisitop1m/unpacked.txt").write_text("".join(f"revisitop1m.{n}.tar.gz\n" for n in range(7, 101)))
    return names


def errors(outcome) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", outcome.err) if line.startswith("error: ")]


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


# Places of files


def test_images_of_both_benchmarks_are_in_one_folder_beside_the_ground_truth(download, here, oxford, paris):
    outcome = download("roxford5k", "rparis6k")
    assert outcome.code == 0, outcome.err
    for layout in (oxford, paris):
        assert (
            here / layout.name / layout.ground_truth_file.name
        ).read_bytes() == layout.ground_truth_file.read_bytes()
        there = {path.name: path.read_bytes() for path in (here / layout.name / "jpg").iterdir()}
        assert there == images(layout)
        kept = {layout.ground_truth_file.name, "unpacked.txt"}
        assert files(here / layout.name) == kept | {f"jpg/{name}" for name in there}


def test_a_folder_in_the_layout_of_revisitop_is_completed_where_it_is(download, here, oxford):
    folder = here / "data" / "datasets" / "roxford5k"
    folder.mkdir(parents=True)
    (folder / "gnd_roxford5k.pkl").write_bytes(oxford.ground_truth_file.read_bytes())
    assert download("roxford5k").code == 0
    assert len(list((folder / "jpg").iterdir())) == 27
    assert not (here / "roxford5k").exists()


def test_features_are_in_the_data_folder(download, here, site):
    content = io.BytesIO()
    scipy.io.savemat(content, {"Q": np.eye(3), "X": np.eye(3)})
    for path in FEATURES:
        site.put(path, content.getvalue())
    assert download("features").code == 0
    assert files(here) == {path.rpartition("/")[2] for path in FEATURES}


def test_distractors_keep_their_folders(download, here, million):
    assert download("revisitop1m").code == 0
    assert files(here / "revisitop1m") == {"revisitop1m.txt", "unpacked.txt"} | {f"jpg/{name}" for name in million}


def test_the_published_addresses_are_asked(download, site):
    outcome = download("roxford5k", "rparis6k", "revisitop1m", "features", "weights")
    assert outcome.code == 2
    felk = [OXFORD_TRUTH, PARIS_TRUTH, MILLION_LIST, *MILLION_IMAGES, *FEATURES]
    assert set(site.asked()) == {
        *(f"{host}{path}" for host in (CMP, PTAK) for path in felk),
        *(f"{VGG}{path}" for path in [OXFORD_IMAGES, *PARIS_IMAGES]),
        f"{PTAK}{NETWORK}",
    }
    assert f"https{VGG[4:]}{OXFORD_IMAGES}: " in outcome.err


def test_a_mirror_is_asked_first_and_the_own_hosts_for_what_it_lacks(download, site, oxford):
    truth = site.answers.pop(OXFORD_TRUTH).body
    site.put(f"http://mirror.test/copies{OXFORD_TRUTH}", truth)
    assert download("roxford5k", "--mirror", "http://mirror.test/copies/").code == 0
    mirror = "http://mirror.test/copies"
    assert site.asked() == [f"{mirror}{OXFORD_TRUTH}", f"{mirror}{OXFORD_IMAGES}", f"{VGG}{OXFORD_IMAGES}"]


# Connections and lengths


def test_a_cut_download_is_resumed(download, here, site, oxford):
    site.answers[OXFORD_IMAGES].cuts = [20_000, 30_000]
    assert download("roxford5k").code == 0
    assert site.ranges(OXFORD_IMAGES) == [None, "bytes=20000-", "bytes=50000-"]
    assert site.requests[-1].if_range == '"one"'
    assert (here / "roxford5k/jpg/db_0.jpg").read_bytes() == oxford.image("db_0").read_bytes()


def test_an_interrupted_download_of_an_earlier_run_is_resumed(download, here, site, oxford):
    site.answers[OXFORD_IMAGES].cuts = [20_000] + [0] * 50
    outcome = download("roxford5k")
    assert outcome.code == 2
    assert f"20000 of {len(site.answers[OXFORD_IMAGES].body)} bytes were received" in outcome.err
    assert (here / "roxford5k/oxbuild_images-v1.tgz.part").stat().st_size == 20_000
    site.answers[OXFORD_IMAGES].cuts, site.requests = [], []
    assert download("roxford5k").code == 0
    assert site.requests == [Request(f"{VGG}{OXFORD_IMAGES}", "bytes=20000-", '"one"')]


@pytest.mark.parametrize("headers", [{"ETag": '"two"'}, {}], ids=["told by its ETag", "not told"])
def test_a_partial_file_of_something_else_is_downloaded_from_the_start(download, here, site, oxford, headers):
    folder = here / "roxford5k"
    folder.mkdir()
    (folder / "oxbuild_images-v1.tgz.part").write_bytes(b"of another file")
    (folder / "oxbuild_images-v1.tgz.part.json").write_text('{"validator": "\\"one\\""}' if headers else "")
    site.answers[OXFORD_IMAGES].headers = headers
    outcome = download("roxford5k")
    assert outcome.code == 0, outcome.err
    assert site.ranges(OXFORD_IMAGES)[0] == "bytes=15-"


def test_a_server_without_ranges_sends_the_whole_file_again(download, site, oxford):
    site.answers[OXFORD_IMAGES].ranges = False
    site.answers[OXFORD_IMAGES].cuts = [20_000]
    assert download("roxford5k").code == 0
    assert site.ranges(OXFORD_IMAGES) == [None, "bytes=20000-"]


def test_a_server_that_always_cuts_at_the_same_place_is_abandoned(download, here, site, oxford):
    site.answers[OXFORD_IMAGES].ranges = False
    site.answers[OXFORD_IMAGES].cuts = [20_000] * 50
    assert download("roxford5k").code == 2
    assert len(site.asked(OXFORD_IMAGES)) == transfer.RETRIES + 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_content_length_above_the_true_one_is_detected(download, here, site, oxford, ranges):
    """A server with ranges can confirm that the file is complete; one without ranges cannot."""
    good = site.answers[OXFORD_TRUTH].body
    site.put(f"{CMP}{OXFORD_TRUTH}", good, excess=100, ranges=ranges)
    outcome = download("roxford5k")
    assert outcome.code == 0, outcome.err
    assert (f"{len(good)} of {len(good) + 100} bytes were received" in outcome.err) == (not ranges)
    assert (f"{PTAK}{OXFORD_TRUTH}" in site.asked()) == (not ranges)
    assert (here / "roxford5k/gnd_roxford5k.pkl").read_bytes() == good


@pytest.mark.parametrize("path", [OXFORD_TRUTH, OXFORD_IMAGES], ids=["ground truth", "archive"])
def test_a_content_length_below_the_true_one_is_detected(download, site, oxford, path):
    site.put(f"http://mirror.test{path}", site.answers[path].body, excess=-100)
    outcome = download("roxford5k", "--mirror", "http://mirror.test")
    assert outcome.code == 0
    assert f"failed: http://mirror.test{path}: " in outcome.err
    assert site.asked(path) == [f"http://mirror.test{path}", f"{CMP if path == OXFORD_TRUTH else VGG}{path}"]


def test_an_archive_served_as_gzip_encoding_is_kept_as_it_is(download, site, oxford):
    site.answers[OXFORD_IMAGES].headers = {"Content-Encoding": "gzip"}
    assert download("roxford5k").code == 0


def test_a_request_to_a_busy_server_is_repeated(download, site, oxford):
    site.put(f"{CMP}{OXFORD_TRUTH}", b"", status=503)
    assert download("roxford5k").code == 0
    assert site.asked(OXFORD_TRUTH) == [f"{CMP}{OXFORD_TRUTH}"] * (transfer.RETRIES + 1) + [f"{PTAK}{OXFORD_TRUTH}"]


# Invalid bytes


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


def damaged(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]


@pytest.mark.parametrize(
    ("item", "path", "make", "words"),
    [
        ("roxford5k", OXFORD_TRUTH, lambda body: PAGE, "a web page was received instead"),
        ("roxford5k", OXFORD_TRUTH, lambda body: body[:-100], "damaged or no pickle"),
        ("roxford5k", OXFORD_TRUTH, lambda body: pickle.dumps(["a", "b"]), "is not a ground truth"),
        ("roxford5k", OXFORD_TRUTH, lambda body: pickle.dumps(Harmful()), "refused: it would call posix.system"),
        ("roxford5k", OXFORD_IMAGES, lambda body: PAGE, "a web page was received instead"),
        ("roxford5k", OXFORD_IMAGES, lambda body: b"", "damaged or no archive"),
        ("roxford5k", OXFORD_IMAGES, lambda body: body[:-5000], "damaged or no archive"),
        ("roxford5k", OXFORD_IMAGES, lambda body: body[:-6] + b"\0\0" + body[-4:], "CRC check failed"),
        ("roxford5k", OXFORD_IMAGES, damaged, "damaged or no archive"),
        ("roxford5k", OXFORD_IMAGES, lambda body: gzip.compress(b"no tar" * 1000), "damaged or no archive"),
        ("roxford5k", OXFORD_IMAGES, lambda body: tgz({}), "contains no file"),
        ("revisitop1m", MILLION_IMAGES[0], lambda body: tgz({"a": b"file", "a/b.jpg": b""}), "damaged or no archive"),
        ("revisitop1m", MILLION_LIST, lambda body: b"1/1.jpg\n1/2.jpg\n1/3.j", "is not a list of images"),
        ("revisitop1m", MILLION_LIST, lambda body: b"\n", "is not a list of images"),
        ("features", FEATURES[0], lambda body: b"MATLAB" * 100, "damaged or no MATLAB file"),
        ("weights", NETWORK, lambda body: PAGE, "a web page was received instead"),
        ("weights", NETWORK, lambda body: b"PK\x03\x04" + b"no checkpoint", "is truncated or damaged"),
    ],
)  # fmt: skip
def test_invalid_bytes_are_reported_and_never_get_the_final_name(
    download, here, site, oxford, million, item, path, make, words
):
    wrong = make(site.answers[path].body if path in site.answers else b"")
    for answer in (path, f"http://mirror.test{path}"):
        site.put(answer, wrong)
    outcome = download(item, "--mirror", "http://mirror.test")
    assert outcome.code == 2
    assert f"failed: http://mirror.test{path}: " in outcome.err
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert len(errors(outcome)) == 1
    name = path.rpartition("/")[2]
    assert [file for file in files(here.parent) if name in file and not file.startswith("origin")] == []


def test_after_invalid_bytes_the_next_address_is_tried(download, here, site, oxford):
    site.put(f"{CMP}{OXFORD_TRUTH}", PAGE)
    site.put(f"http://mirror.test{OXFORD_IMAGES}", damaged(site.answers[OXFORD_IMAGES].body))
    assert download("roxford5k", "--mirror", "http://mirror.test").code == 0
    assert len(list((here / "roxford5k/jpg").iterdir())) == 27


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "archive",
    [
        tgz({"good.jpg": b"1", "../../evil.jpg": b"2"}),
        tgz({"good.jpg": b"1", "a/../../../evil.jpg": b"2"}),
        tgz({"good.jpg": b"1", "/tmp/evil.jpg": b"2"}),
        tgz({"good.jpg": b"1", "..\\evil.jpg": b"2"}),
        tgz({"good.jpg": b"1", "C:evil.jpg": b"2"}),
        tgz({"good.jpg": b"1"}, special("../evil.jpg", tarfile.DIRTYPE)),
        tgz({"good.jpg": b"1"}, special("evil.jpg", tarfile.SYMTYPE, "/etc/passwd")),
        tgz({"good.jpg": b"1"}, special("evil.jpg", tarfile.LNKTYPE, "good.jpg")),
        tgz({"good.jpg": b"1"}, special("evil.jpg", tarfile.FIFOTYPE)),
        tgz({"good.jpg": b"1"}, special("evil.jpg", tarfile.CHRTYPE)),
    ],
    ids=["up", "down and up", "absolute", "backslash", "drive", "folder", "symlink", "hardlink", "fifo", "device"],
)  # fmt: skip
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "with folders"])
def test_a_hostile_archive_is_refused_by_the_name_of_its_member(download, here, site, oxford, million, archive, flat):
    item, path = ("roxford5k", OXFORD_IMAGES) if flat else ("revisitop1m", MILLION_IMAGES[0])
    (here / "revisitop1m/unpacked.txt").write_text("\n".join(path.rpartition("/")[2] for path in MILLION_IMAGES[1:]))
    before = files(here.parent)
    site.put(path, archive)
    outcome = download(item)
    assert outcome.code == 2
    assert re.search(r"refused: its member '[^']*evil\.jpg' (would leave the folder|is a link or device)", outcome.err)
    assert files(here.parent) - before == {f"here/{item}/{'gnd_roxford5k.pkl' if flat else 'revisitop1m.txt'}"}


# Repeated and interrupted runs


def test_a_second_run_downloads_nothing_and_says_so(download, here, site, oxford, paris, million):
    items = ("roxford5k", "rparis6k", "revisitop1m")
    assert "nothing was downloaded" not in download(*items).out
    before, site.requests = files(here), []
    outcome = download(*items)
    assert outcome.code == 0
    assert "everything is complete already, nothing was downloaded" in outcome.out
    assert site.requests == []
    assert files(here) == before


def test_images_from_another_source_are_not_downloaded(download, here, site, oxford):
    oxford.folder.rename(here / "roxford5k")
    assert download("roxford5k").code == 0
    assert site.requests == []


def test_an_archive_from_another_source_is_used(download, here, site, oxford):
    (here / "roxford5k").mkdir()
    (here / "roxford5k/oxbuild_images-v1.tgz").write_bytes(site.answers[OXFORD_IMAGES].body)
    assert download("roxford5k").code == 0
    assert site.asked(OXFORD_IMAGES) == []
    assert not (here / "roxford5k/oxbuild_images-v1.tgz").exists()


@pytest.mark.parametrize("name", ["gnd_roxford5k.pkl", "oxbuild_images-v1.tgz"])
def test_a_damaged_file_of_the_user_is_named_and_kept(download, here, site, oxford, name):
    (here / "roxford5k").mkdir()
    (here / "roxford5k" / name).write_bytes(b"damaged")
    outcome = download("roxford5k")
    assert outcome.code == 2
    assert f"delete {here / 'roxford5k' / name} to have it fetched again" in outcome.err
    assert (here / "roxford5k" / name).read_bytes() == b"damaged"


def test_the_million_resumes_with_the_archives_that_are_not_unpacked(download, here, site, million):
    late = {path: site.answers.pop(path) for path in MILLION_IMAGES[2:6]}
    outcome = download("revisitop1m")
    assert outcome.code == 2
    assert "revisitop1m: no address provides revisitop1m.3.tar.gz" in outcome.err
    site.answers |= late
    site.requests = []
    assert download("revisitop1m").code == 0
    assert site.asked() == [f"{PTAK}{path}" for path in MILLION_IMAGES[2:6]]
    assert files(here / "revisitop1m/jpg") == set(million)


def test_one_archive_that_fails_does_not_stop_the_others(download, here, site, million):
    site.put(MILLION_IMAGES[4], PAGE)
    assert download("revisitop1m").code == 2
    assert files(here / "revisitop1m/jpg") == {name for name in million if not name.startswith("5/")}


@pytest.mark.parametrize("stop", [0, 5], ids=["while unpacking", "while moving"])
def test_an_interrupted_unpacking_is_done_again_without_a_download(download, here, site, oxford, monkeypatch, stop):
    replace, extract, moved = os.replace, tarfile.TarFile.extractfile, []

    def interrupted_replace(source, target):
        if ".unpacking" in str(source):
            moved.append(target)
            if len(moved) > stop > 0:
                raise KeyboardInterrupt
        replace(source, target)

    def interrupted_extract(tar, member):
        if not stop and member.name == "db_5.jpg":
            raise KeyboardInterrupt
        return extract(tar, member)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted_replace)
        patch.setattr(tarfile.TarFile, "extractfile", interrupted_extract)
        assert download("roxford5k").code == 130
    assert len(files(here / "roxford5k/jpg")) == stop
    site.requests = []
    assert download("roxford5k").code == 0
    assert site.requests == []
    assert len(files(here / "roxford5k/jpg")) == 27


# The check of the images


def test_an_image_that_no_archive_has_is_named(download, here, site, oxford):
    members = images(oxford)
    del members["query_1.jpg"]
    site.put(OXFORD_IMAGES, tgz(members))
    outcome = download("roxford5k")
    assert outcome.code == 2
    assert f"1 images are missing or damaged ({here / 'roxford5k/jpg/query_1.jpg'}: no such file)" in outcome.err
    assert len(errors(outcome)) == 1


def test_an_image_that_cannot_be_decoded_is_named(download, here, oxford):
    assert download("roxford5k").code == 0
    image = here / "roxford5k/jpg/db_7.jpg"
    image.write_bytes(image.read_bytes()[:1000])
    outcome = download("roxford5k")
    assert outcome.code == 2
    assert f"{image}: cannot be decoded" in outcome.err
    assert f"delete {here / 'roxford5k/unpacked.txt'} to have the archives fetched again" in outcome.err
    (here / "roxford5k/unpacked.txt").unlink()
    assert download("roxford5k").code == 0
    assert image.read_bytes() == oxford.image("db_7").read_bytes()


def test_a_damaged_image_that_is_not_listed_does_no_harm(download, site, oxford):
    site.put(OXFORD_IMAGES, tgz({**images(oxford), "not_listed.jpg": b"damaged"}))
    assert download("roxford5k").code == 0


def test_a_distractor_that_is_missing_is_named(download, here, million):
    assert download("revisitop1m").code == 0
    (here / "revisitop1m/jpg/4/1/4_1.jpg").unlink()
    outcome = download("revisitop1m")
    assert outcome.code == 2
    assert "revisitop1m/jpg/4/1/4_1.jpg: no such file" in outcome.err


# Weights


def test_one_checkpoint_is_downloaded_and_there_are_instructions_for_the_other(
    download, site, tmp_path, checkpoint_50, monkeypatch
):
    site.put(NETWORK, checkpoint_50.read_bytes())
    monkeypatch.setattr(transfer, "CHUNK", 1 << 20)
    outcome = download("weights")
    assert outcome.code == 2
    assert files(tmp_path / "weights") == {"CVPR2022_CVNet_R50.pyth"}
    assert [line for line in outcome.err.splitlines() if line.startswith("weights: ")] == [
        "weights: no address provides CVPR2022_CVNet_R101.pyth (none is known); get CVPR2022_CVNet_R101.pyth from the "
        f"web drive linked at https://github.com/sungonce/CVNet and put it into {tmp_path / 'weights'}"
    ]
    site.requests = []
    assert download("weights").code == 2
    assert site.requests == []


def test_existing_checkpoints_with_other_names_are_found(download, site, tmp_path, checkpoint_50, checkpoint_101):
    (tmp_path / "weights").mkdir()
    for path in (checkpoint_50, checkpoint_101):
        (tmp_path / "weights" / f"my_{path.name}").symlink_to(path)
    outcome = download("weights")
    assert outcome.code == 0
    assert site.requests == []


@pytest.mark.parametrize("attended", [True, False])
def test_the_drive_is_opened_in_a_browser_if_there_is_one(download, monkeypatch, attended):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: attended)
    assert download("weights").code == 2
    assert opened == (["https://github.com/sungonce/CVNet"] if attended else [])


# Messages and exit codes


def test_one_item_that_fails_does_not_stop_the_others(download, here, site, oxford, paris):
    del site.answers[PARIS_IMAGES[0]]
    outcome = download("features", "rparis6k", "roxford5k")
    assert outcome.code == 2
    assert "roxford5k is complete" in outcome.out
    last = outcome.err.splitlines()[-1]
    assert errors(outcome) == [last]
    assert "not complete: features, rparis6k;" in last
    assert f"rparis6k: no address provides paris_1-v1.tgz (https{VGG[4:]}{PARIS_IMAGES[0]}: " in outcome.err
    assert f"{VGG}{PARIS_IMAGES[0]}: 404 Not Found" in outcome.err


def test_images_are_fetched_without_their_ground_truth(download, here, site, oxford):
    truth = site.answers.pop(OXFORD_TRUTH)
    assert download("roxford5k").code == 2
    site.answers[OXFORD_TRUTH], site.requests = truth, []
    assert download("roxford5k").code == 0
    assert site.asked() == [f"{CMP}{OXFORD_TRUTH}"]


def test_a_full_disk_is_reported_in_one_line(download, here, oxford):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        outcome = download("roxford5k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 2
    assert f"roxford5k: {here}: File too large" in outcome.err.splitlines()
    assert download("roxford5k").code == 0


def test_a_file_in_place_of_the_folder_is_reported_in_one_line(download, here, oxford):
    here.rmdir()
    here.touch()
    outcome = download("roxford5k")
    assert outcome.code == 2
    assert f"roxford5k: {here / 'roxford5k'}: Not a directory" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["roxford"], "choose from '?roxford5k'?, '?rparis6k'?, '?revisitop1m'?, '?gldv2'?, '?features'?, '?weights'?"),
        ([], "required: ITEM"),
        (["features", "--mirror", "my.server"], "'my.server' is not an http:// or https:// address"),
    ],
)
def test_bad_arguments_are_one_line(download, site, arguments, words):
    outcome = download(*arguments)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == len(errors(outcome)) == 1
    assert re.search(words, outcome.err)
    assert site.requests == []


def test_help_lists_the_items_and_the_paths_on_a_mirror(download):
    outcome = download("--help")
    assert outcome.code == 0
    assert "rparis6k     ground truth and images" in outcome.out
    assert f"is looked for as URL{FEATURES[0]}" in outcome.out


def test_a_host_that_refuses_connections_is_tried_for_only_one_file(download, site, monkeypatch):
    content = io.BytesIO()
    scipy.io.savemat(content, {"Q": np.eye(3), "X": np.eye(3)})
    for path in FEATURES:
        site.put(path, content.getvalue())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        outcome = download("features", "--mirror", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("failed: http://127.0.0.1") == 1


@pytest.fixture
def landmarks(site, monkeypatch):
    """Google Landmarks v2 at a mirror, with three archives of index images and two of test images."""
    monkeypatch.setattr(gldv2, "ARCHIVES", {"index": 3, "test": 2})
    mirror = "http://mirror.local/files"
    index = [f"{number:02x}{'0' * 14}" for number in range(6)]
    solution = f"id,images,Usage\nt00,{index[0]} {index[5]},Public\nt01,None,Ignored\nt03,{index[2]},Private\n"
    site.put(f"{LANDMARKS}/metadata/index.csv", "\n".join(["id", *index]).encode())
    site.put(f"{LANDMARKS}/metadata/test.csv", b"id\nt00\nt01\nt02\nt03\n")
    site.put(f"{LANDMARKS}/ground_truth/retrieval_solution_v2.1.csv", solution.encode())
    parts = {"index": [index[:2], index[2:4], index[4:]], "test": [["t00", "t01"], ["t02", "t03"]]}
    for kind, archives in parts.items():
        for number, names in enumerate(archives):
            body = gzip.decompress(tgz({f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg": b"image" * 900 for name in names}))
            site.put(f"{LANDMARKS}/{kind}/images_{number:03}.tar", body)
            line = f"{hashlib.md5(body).hexdigest()}  images_{number:03}.tar\n"
            site.put(f"{LANDMARKS}/md5sum/{kind}/md5.images_{number:03}.txt", line.encode())
    return ["gldv2", "--mirror", mirror]


def test_gldv2_is_downloaded_checked_and_unpacked_and_only_queries_are_kept(download, landmarks, here, site):
    outcome = download(*landmarks)
    assert outcome.code == 0, outcome.err
    dataset = load_dataset("gldv2", here)
    dataset.check_files()
    assert (len(dataset.queries), len(dataset.database)) == (2, 6)
    assert sorted(path.stem for path in (here / "gldv2" / "test").rglob("*.jpg")) == ["t00", "t03"]
    assert not list((here / "gldv2").rglob("*.tar"))
    before = len(site.requests)
    assert "everything is complete already" in download(*landmarks).out
    assert len(site.requests) == before


def test_all_test_images_of_gldv2_are_kept_where_asked_for(download, landmarks, here):
    assert download(*landmarks, "--all-test-images").code == 0
    assert len(list((here / "gldv2" / "test").rglob("*.jpg"))) == 4


@pytest.mark.parametrize("harm", ["md5", "cut", "missing", "no md5"])
def test_an_invalid_archive_of_gldv2_is_never_used(download, landmarks, here, site, harm):
    name = f"{LANDMARKS}/{'md5sum/index/md5.images_001.txt' if harm == 'no md5' else 'index/images_001.tar'}"
    whole = site.answers.pop(name)
    if harm in ("md5", "cut"):
        site.put(name, whole.body[:-600] if harm == "cut" else whole.body.replace(b"image", b"imagf"))
    outcome = download(*landmarks)
    assert outcome.code == 2
    assert "images_001" in outcome.err
    assert len(list((here / "gldv2" / "index").rglob("*.jpg"))) == 4  # those of the other archives
    site.answers[name] = whole
    before = len(site.asked("index/images_000.tar"))
    assert download(*landmarks).code == 0
    assert len(site.asked("index/images_000.tar")) == before  # unpacked archives are not downloaded again
    load_dataset("gldv2", here).check_files()


def test_a_download_of_gldv2_that_was_interrupted_is_resumed(download, landmarks, here, site):
    archive = site.answers[f"{LANDMARKS}/index/images_002.tar"]
    archive.headers["ETag"], archive.cuts = '"1"', [3000, *[0] * 9]
    assert download(*landmarks).code == 2
    archive.cuts = []
    assert download(*landmarks).code == 0
    assert site.ranges("index/images_002.tar")[-1] == "bytes=3000-"
    load_dataset("gldv2", here).check_files()
