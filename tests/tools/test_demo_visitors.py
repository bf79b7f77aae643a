"""The demo as a server: two visitors, one of whom asks for more than the page shows."""

import importlib.util
import io
import json
import urllib.error
import urllib.request
import uuid

import numpy as np
import pytest
from conftest import ROOT, Layout, running_demo
from PIL import Image

NETWORK = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.ReLU())
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    folder = tmp_path_factory.mktemp("visitors")
    layout = Layout(folder / "data")
    (folder / "mine.py").write_text(NETWORK)
    words = ["MODEL.NAME", f"{folder / 'mine.py'}:build", "TEST.SCALE_LIST", 1, "TEST.DEVICE", "cpu"]
    words += ["TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "DATA_LOADER.NUM_WORKERS", 0]
    with running_demo(folder, *words) as address:
        yield address


class Visitor:
    """A browser's requests, without a browser."""

    def __init__(self, address: str):
        self.address, self.session = address, uuid.uuid4().hex[:11]
        config = json.loads(self.get("/config").read())
        ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
        self.events = {}
        for number, each in enumerate(config["dependencies"]):
            for target, name in each["targets"]:
                self.events[target, name] = number
        self.upload_event = self.events[ids["upload"], "upload"]
        self.load_event = next(number for (_, name), number in self.events.items() if name == "load")

    def get(self, path: str, **headers: str):
        return urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=60)

    def post(self, path: str, body: bytes, kind: str):
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    def act(self, event: int, data: list) -> str:
        """Returns what the page shows after an event, as JSON."""
        body = {"data": data, "fn_index": event, "session_hash": self.session, "event_data": None, "trigger_id": None}
        self.post("/gradio_api/queue/join", json.dumps(body).encode(), "application/json")
        for line in self.get(f"/gradio_api/queue/data?session_hash={self.session}"):
            if b'"process_completed"' in line:
                return line.decode()
        raise AssertionError("no answer")

    def open(self) -> str:
        return self.act(self.load_event, [None, *SETTINGS])

    def upload(self, name: str, image: bytes) -> str:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + image + b"\r\n--x--\r\n"
        (path,) = self.post("/gradio_api/upload", body, "multipart/form-data; boundary=x")
        return path

    def search(self, path: str) -> str:
        file = {"path": path, "orig_name": path.rpartition("/")[2], "meta": {"_type": "gradio.FileData"}}
        return self.act(self.upload_event, [file, *SETTINGS])


SETTINGS = ["roxford5k", ["GeM+", "Regional-GeM"], "", 20, 9, 0.15]


def image_of(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def status(visitor: Visitor, path: str) -> int:
    try:
        return visitor.get(path).status
    except urllib.error.HTTPError as error:
        return error.code


def test_two_visitors_never_see_each_others_images(address):
    first, second = Visitor(address), Visitor(address)
    path = first.upload("secret-of-the-first.png", image_of(1))
    assert "secret-of-the-first" in first.search(path)
    assert "secret-of-the-first" not in second.open()
    assert "secret-of-the-second" in second.search(second.upload("secret-of-the-second.png", image_of(2)))
    assert "secret-of-the-second" not in first.open()
    for each in (first, second):  # even those who know where it lies
        assert status(each, f"/gradio_api/file={path}") == 403


def test_what_the_page_was_not_given_cannot_be_read(address):
    visitor = Visitor(address)
    for path in ("/etc/hostname", str(ROOT / "README.md"), "../../etc/hostname"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            assert status(visitor, f"{route}{path}") in (403, 404)
        answer = visitor.search(path)
        assert '"success": false' in answer or '"success":false' in answer


def test_a_page_elsewhere_is_not_answered(address):
    visitor = Visitor(address)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        visitor.get("/config", Host="evil.example")
    answer = visitor.get("/config", Origin="http://evil.example")
    assert answer.headers.get("Access-Control-Allow-Origin") is None
