"""Download files over HTTP from unreliable hosts, which may cut connections, or send wrong lengths or other files."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from model.errors import InputError

TIMEOUT = (10, 60)  # seconds to connect, and to receive the next bytes
RETRIES = 4  # of a request without an answer, and of a download without progress
BACKOFF = 1.0  # seconds before the second try, doubled each time
CHUNK = 1 << 16  # bytes that a cut connection may lose

Check = Callable[[Path], object]  # raises InputError if a file is invalid


@dataclass(frozen=True)
class Source:
    """A file: its hosts, which are tried in turn, and its path there."""

    hosts: tuple[str, ...]
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class _SilentHostError(InputError):
    """A host does not accept connections."""


class Fetcher:
    """Downloads each file from the first address that provides it complete and valid; `fetched` counts the files.

    A file is downloaded as NAME.part, beside a NAME.part.json with its ETag or date, with which it can be resumed.

    Args:
        mirror: a URL that is tried before the hosts of a file.
    """

    def __init__(self, mirror: str | None = None):
        self.mirror, self.fetched = mirror, 0
        self.silent: set[str] = set()  # hosts that do not accept connections
        self.session = requests.Session()
        retry = urllib3.Retry(
            RETRIES, backoff_factor=BACKOFF, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
        )
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))

    def fetch(self, source: Source, folder: Path, check: Check) -> Path:
        """Downloads the file into the folder if it is missing, and returns its path. An existing file is only checked.

        Raises:
            InputError: if no address provides it, with the answer of each; or if the existing file is invalid.
            OSError: if it cannot be written.
        """
        target = folder / source.name
        if target.exists():
            try:
                check(target)
            except InputError as error:
                raise InputError(f"{error}; delete {target} to have it fetched again") from None
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(f"{target}.part")
        problems = []
        for host in (self.mirror, *source.hosts) if self.mirror else source.hosts:
            address = f"{host}/{source.path}"
            if host in self.silent:
                problems.append(f"{host}: no connection")
                continue
            try:
                self._fetch_checked(address, part, check)
            except InputError as error:
                if isinstance(error, _SilentHostError):
                    self.silent.add(host)
                problems.append(f"{address}: {error}")
                print(f"failed: {problems[-1]}", file=sys.stderr)
                continue
            os.replace(part, target)
            _discard(part)
            self.fetched += 1
            return target
        raise InputError(f"no address provides {target.name} ({'; '.join(problems) or 'none is known'})")

    def _fetch_checked(self, address: str, part: Path, check: Check) -> None:
        """Downloads and checks the file. If a resumed file is invalid, it is downloaded once more from the start."""
        resumed = part.exists()
        self._complete(address, part)
        try:
            _refuse_web_page(part)
            check(part)
        except InputError:
            _discard(part)
            if not resumed:
                raise
            self._fetch_checked(address, part, check)

    def _complete(self, address: str, part: Path) -> None:
        """Downloads the part to its full length. Raises InputError if there is no progress."""
        furthest, failures = _size(part), 0
        while problem := self._request(address, part):
            failures = 1 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures > RETRIES:
                raise InputError(problem)
            time.sleep(BACKOFF * 2 ** (failures - 1))

    def _request(self, address: str, part: Path) -> str | None:
        """Requests the missing bytes of the part once. Returns why it is incomplete, or None if it is complete.

        Raises:
            InputError: if the request is refused or not answered.
        """
        have, note = _size(part), _read_note(part)
        if have and note.get("length") == have:  # interrupted before it was checked
            return None
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if note.get("validator"):
                headers["If-Range"] = note["validator"]
        try:
            response = self.session.get(address, headers=headers, stream=True, timeout=TIMEOUT)
        except requests.RequestException as error:
            reason = getattr(error.args[0], "reason", None) if error.args else None
            if isinstance(reason, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError):
                raise _SilentHostError(_in_words(error)) from None
            raise InputError(_in_words(error)) from None
        with response:
            span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if response.status_code == 200:
                return _receive(response, part, 0, None)
            if response.status_code == 206 and span and span[1] == str(have):
                return _receive(response, part, have, None if span[2] == "*" else int(span[2]))
            if response.status_code == 416 and span and span[2] == str(have):  # it was complete already
                return None
            if have and response.status_code in (206, 416):
                _discard(part)
                return "the answer does not start where it was requested to"
            raise InputError(f"{response.status_code} {response.reason}")


def _receive(response: requests.Response, part: Path, have: int, length: int | None) -> str | None:
    """Appends the body to the first `have` bytes. Returns why the part is incomplete, or None if it is complete."""
    left = response.raw.length_remaining
    if length is None and left is not None:
        length = have + left
    etag = response.headers.get("ETag", "W/")  # weak ones cannot be used in If-Range
    validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
    _note(part).write_text(json.dumps({"validator": validator}))
    cut = None
    bar = tqdm(
        desc=part.stem, total=length, initial=have, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True
    )
    with bar, part.open("ab" if have else "wb") as file:
        try:
            # Not decoded: a .tgz with "Content-Encoding: gzip" would be decompressed.
            for block in response.raw.stream(CHUNK, decode_content=False):
                file.write(block)
                bar.update(len(block))
        except urllib3.exceptions.HTTPError as error:
            cut = _in_words(error)
    size = _size(part)
    if cut is None and length in (None, size):
        _note(part).write_text(json.dumps({"validator": validator, "length": size}))
        return None
    return f"{size} of {length or 'unknown'} bytes were received{f' ({cut})' if cut else ''}"


def _refuse_web_page(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(1024)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html")):
        raise InputError("a web page was received instead of the file")


def _note(part: Path) -> Path:
    return Path(f"{part}.json")


def _read_note(part: Path) -> dict:
    try:
        note = json.loads(_note(part).read_bytes())
    except (OSError, ValueError):  # missing or cut off: the file is checked at the end anyway
        return {}
    return note if isinstance(note, dict) else {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _in_words(error: Exception) -> str:
    """Returns the reason, extracted from the nested exceptions of requests and urllib3."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    reason = getattr(error, "reason", None) or error
    return re.sub(r"^(<[^>]*>|\w+\([^)]*\)): ", "", str(reason))
