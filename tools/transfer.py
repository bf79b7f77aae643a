"""Fetch files over HTTP from hosts that may cut connections, lie about lengths, or send something else."""

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

TIMEOUT = (10, 60)  # seconds for a connection, and for the next bytes
RETRIES = 4  # of a request that finds no answer, and of a download that gets no further
BACKOFF = 1.0  # seconds before the second try, doubled with each
CHUNK = 1 << 16  # a cut connection may lose as much

Check = Callable[[Path], object]  # raises InputError where a file is not what it should be


@dataclass(frozen=True)
class Source:
    """A file: the hosts that have it, to be tried in turn, and its path there."""

    hosts: tuple[str, ...]
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class _SilentHostError(InputError):
    """No connection can be made."""


class Fetcher:
    """Gets each file from the first address that has it whole and right; `fetched` counts them.

    A file grows as NAME.part, beside a NAME.part.json that tells its ETag or date for the next start.

    Args:
        mirror: a URL under which each file is looked for before its own hosts are asked.
    """

    def __init__(self, mirror: str | None = None):
        self.mirror, self.fetched = mirror, 0
        self.silent: set[str] = set()  # hosts that no connection could be made to
        self.session = requests.Session()
        retry = urllib3.Retry(
            RETRIES, backoff_factor=BACKOFF, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
        )
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))

    def fetch(self, source: Source, folder: Path, check: Check) -> Path:
        """Makes sure that the file is in the folder, and returns its path. One that is there is only checked.

        Raises:
            InputError: where no address gives it, with what each answered; or where the present one is wrong.
            OSError: where it cannot be written.
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
                print(f"no luck with {problems[-1]}", file=sys.stderr)
                continue
            os.replace(part, target)
            _discard(part)
            self.fetched += 1
            return target
        raise InputError(f"no address gives {target.name} ({'; '.join(problems) or 'none is known'})")

    def _fetch_checked(self, address: str, part: Path, check: Check) -> None:
        """Where the whole is wrong, the half that was there may be another host's: then all is fetched once more."""
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
        """Brings the part to its full length. Raises InputError where it gets no further."""
        furthest, failures = _size(part), 0
        while problem := self._request(address, part):
            failures = 1 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures > RETRIES:
                raise InputError(problem)
            time.sleep(BACKOFF * 2 ** (failures - 1))

    def _request(self, address: str, part: Path) -> str | None:
        """Asks once for what the part lacks. Returns why it is not complete, or None where it is.

        Raises:
            InputError: where the answer is a refusal, or none.
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
            if response.status_code == 416 and span and span[2] == str(have):  # nothing was lacking
                return None
            if have and response.status_code in (206, 416):
                _discard(part)
                return "it does not go on where it was asked to"
            raise InputError(f"{response.status_code} {response.reason}")


def _receive(response: requests.Response, part: Path, have: int, length: int | None) -> str | None:
    """Writes the body behind the first `have` bytes. Returns why the part is not complete, or None where it is."""
    left = response.raw.length_remaining
    if length is None and left is not None:
        length = have + left
    etag = response.headers.get("ETag", "W/")  # weak ones are no use for If-Range
    validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
    _note(part).write_text(json.dumps({"validator": validator}))
    cut = None
    bar = tqdm(
        desc=part.stem, total=length, initial=have, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True
    )
    with bar, part.open("ab" if have else "wb") as file:
        try:
            # Undecoded: servers that call a .tgz "Content-Encoding: gzip" would have it unpacked.
            for block in response.raw.stream(CHUNK, decode_content=False):
                file.write(block)
                bar.update(len(block))
        except urllib3.exceptions.HTTPError as error:
            cut = _in_words(error)
    size = _size(part)
    if cut is None and length in (None, size):
        _note(part).write_text(json.dumps({"validator": validator, "length": size}))
        return None
    return f"{size} of {length or 'unknown'} bytes came{f' ({cut})' if cut else ''}"


def _refuse_web_page(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(1024)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html")):
        raise InputError("a web page came instead of the file")


def _note(part: Path) -> Path:
    return Path(f"{part}.json")


def _read_note(part: Path) -> dict:
    try:
        note = json.loads(_note(part).read_bytes())
    except (OSError, ValueError):  # none, or cut off: what came is checked at the end anyway
        return {}
    return note if isinstance(note, dict) else {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _in_words(error: Exception) -> str:
    """The reason, out of the wrappings of requests and urllib3."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    reason = getattr(error, "reason", None) or error
    return re.sub(r"^(<[^>]*>|\w+\([^)]*\)): ", "", str(reason))
