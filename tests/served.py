"""A local server, a proxy for all hosts, that serves small datasets, and misbehaves in configured ways."""

import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from conftest import Layout

from tools import transfer

VGG, CMP, PTAK = "http://www.robots.ox.ac.uk", "http://cmp.felk.cvut.cz", "http://ptak.felk.cvut.cz"
OXFORD_TRUTH = "/revisitop/data/datasets/roxford5k/gnd_roxford5k.pkl"
OXFORD_IMAGES = "/~vgg/data/oxbuildings/oxbuild_images-v1.tgz"
PARIS_TRUTH = "/revisitop/data/datasets/rparis6k/gnd_rparis6k.pkl"
PARIS_IMAGES = [f"/~vgg/data/parisbuildings/paris_{n}-v1.tgz" for n in (1, 2)]
FEATURES = [f"/revisitop/data/features/{name}_resnet_rsfm120k_gem.mat" for name in ("roxford5k", "rparis6k")]
MILLION_LIST = "/revisitop/revisitop1m/revisitop1m.txt"
MILLION_IMAGES = [f"/revisitop/revisitop1m/jpg/revisitop1m.{n}.tar.gz" for n in range(1, 101)]
NETWORKS = [f"/personal/sumapave/public/ames/networks/CVPR2022_CVNet_{end}" for end in ("R50.pyth", "R101.pt")]


@dataclass
class Answer:
    """The answer of the server; `cuts` are the numbers of bytes after which the next answers to GET end."""

    body: bytes
    status: int = 200  # 0: the connection of a GET is closed without an answer
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    excess: int = 0  # by which the declared length exceeds the true one
    headers: dict[str, str] = field(default_factory=dict)


class Site(dict):
    """The answers by address, or by path for any host; `requests` are (address, range) of each GET."""

    def __init__(self):
        self.requests: list[tuple[str, str | None]] = []

    def asked(self, end: str = "") -> list[str]:
        return [address for address, _ in self.requests if address.endswith(end)]

    def ranges(self, end: str = "") -> list[str | None]:
        return [span for address, span in self.requests if address.endswith(end)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        site, self.close_connection = self.server.site, True
        answer = site.get(self.path) or site.get(urlsplit(self.path).path) or Answer(b"", 404)
        if self.command == "GET":
            site.requests.append((self.path, self.headers["Range"]))
            if not answer.status:
                return
        start, status, size = 0, answer.status or 200, len(answer.body)
        if answer.ranges and status == 200 and (asked := self.headers["Range"]):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status, span = (206, f"{start}-{size - 1}") if start < size else (416, "*")
        body = answer.body[start:]
        self.send_response(status)
        if start:
            self.send_header("Content-Range", f"bytes {span}/{size}")
        for key, value in {**answer.headers, "Content-Length": len(body) + answer.excess}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: answer.cuts.pop(0)] if answer.cuts else body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Yields a Site behind http_proxy: the published addresses are requested, but no other host is contacted."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for scheme in ("http", "https"):  # CONNECT, for https, is refused
        monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(transfer, "BACKOFF", 0)
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    yield server.site
    server.shutdown()
    thread.join()
    server.server_close()


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


def publish(site: Site, layout: Layout) -> None:
    """Puts the ground truth and the images of a layout under the addresses, and into the archives, of the originals."""
    truth, archives, place = {
        "roxford5k": (OXFORD_TRUTH, [OXFORD_IMAGES], "{name}"),
        "rparis6k": (PARIS_TRUTH, PARIS_IMAGES, "paris/{name:.2}/{name}"),
    }[layout.name]
    site[truth] = Answer(layout.ground_truth_file.read_bytes())
    members = [(place.format(name=name), content) for name, content in images(layout).items()]
    half = 10 if len(archives) > 1 else len(members)
    for path, part in zip(archives, (members[:half], members[half:]), strict=False):
        site[path] = Answer(tgz(dict(part)))
