"""Download files over HTTP from unreliable hosts, which may cut connections, or send other files."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import urllib3
from tqdm import tqdm

from model.errors import InputError

TIMEOUT = (3.05, 60)  # seconds to connect, and to receive the next bytes
RETRIES = 4  # of a request that brings no further bytes
BACKOFF = 1.0  # seconds before the first retry, doubled each time
CHUNK = 1 << 16  # bytes that a cut connection may lose


@dataclass(frozen=True)
class File:
    """A file to download.

    Attributes:
        hosts: the hosts that have it, which are tried in turn.
        path: its path on all of them.
        folder: where it goes.
        check: raises InputError if a file is invalid.
        name: its name in the folder, if it gets another one.
    """

    hosts: tuple[str, ...]
    path: str
    folder: Path
    check: Callable[[Path], object] = lambda path: None
    name: str = ""

    @property
    def target(self) -> Path:
        return self.folder / (self.name or self.path.rpartition("/")[2])


class InterruptionError(InputError):
    """An incomplete answer; another request may be answered completely."""


class Fetcher:
    """Downloads each file from the first host that provides it complete and valid.

    Attributes:
        mirrors: hosts that are tried before those of a file.
        unreachable: the hosts that do not answer, with the reason; they are tried no more.
        answered: whether any host has answered.
        offline: whether none has, although all hosts of a file were tried; no other ones are tried then.
    """

    def __init__(self, mirror: str | None = None):
        self.mirrors, self.unreachable = (mirror,) if mirror else (), dict[str, str]()
        self.answered = self.offline = False

    def size(self, file: File) -> int | None:
        """Returns the size in bytes, or None if no host tells it. Raises ConnectionError if none can be reached."""
        try:
            with self._try_hosts(file, lambda host: self._request("HEAD", host, file)) as answer:
                return int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
        except InputError:
            return None

    def fetch(self, file: File) -> None:
        """Downloads a file, as NAME.part until it is valid. An existing file is only verified.

        Raises:
            ConnectionError: if none of its hosts can be reached.
            InputError: if no host provides it, with the answer of each; or if the existing file is invalid.
        """
        if file.target.exists():
            try:
                return file.check(file.target)
            except InputError as error:
                raise InputError(f"{error}; delete {file.target} to have it downloaded again") from None
        part = Path(f"{file.target}.part")
        self._try_hosts(file, lambda host: self._fetch_from(host, file, part))
        os.replace(part, file.target)

    def _try_hosts(self, file: File, action: Callable[[str], Any]) -> Any:
        """Returns the result of the action with the first host that does not make it fail."""
        problems, hosts = [], (*self.mirrors, *file.hosts)
        for host in (host for host in hosts if host not in self.unreachable and not self.offline):
            try:
                return action(host)
            except requests.RequestException as error:
                self.unreachable[host] = _cause(error)
            except InputError as error:
                problems.append(f"{host}/{file.path}: {error}")
        self.offline = not self.answered
        if self.offline:
            host, reason = next(iter(self.unreachable.items()))
            raise ConnectionError(f"you seem to be offline: no connection to {host} ({reason})")
        kind = InputError if problems else ConnectionError
        problems += [f"no connection to {host}: {self.unreachable[host]}" for host in hosts if host in self.unreachable]
        raise kind(f"no address provides {file.target} ({'; '.join(problems)})")

    def _request(self, method: str, host: str, file: File, start: int = 0) -> requests.Response:
        # The raw bytes of the file: a .tgz with "Content-Encoding: gzip" must stay compressed.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        options = {"headers": headers, "timeout": TIMEOUT, "stream": True, "allow_redirects": True}
        response = requests.request(method, f"{host}/{file.path}", **options)
        self.answered = True
        if response.status_code not in (200, 206, 416):
            response.close()
            kind = InterruptionError if response.status_code == 429 or response.status_code >= 500 else InputError
            raise kind(f"{response.status_code} {response.reason}")
        return response

    def _fetch_from(self, host: str, file: File, part: Path) -> None:
        """Downloads and checks the part. If it was resumed and is invalid, it is downloaded again from the start."""
        resumed, longest, failures = part.exists(), _size(part), 0
        while True:
            try:
                self._resume(host, file, part)
                break
            except (InterruptionError, requests.RequestException):
                failures = 1 if _size(part) > longest else failures + 1
                longest = max(longest, _size(part))
                if failures > RETRIES:
                    raise
                time.sleep(BACKOFF * 2 ** (failures - 1))
        try:
            return file.check(part)
        except InputError:
            part.unlink()
            if not resumed:
                raise
        self._fetch_from(host, file, part)

    def _resume(self, host: str, file: File, part: Path) -> None:
        """Requests the missing bytes of the part once. Raises InputError if some are still missing."""
        size = _size(part)
        with self._request("GET", host, file, start=size) as answer:
            if answer.status_code == 416:  # there are no more bytes, as is checked next
                return
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                raise InputError("a web page was received instead of the file")
            start, rest = size if answer.status_code == 206 else 0, answer.raw.length_remaining
            total = None if rest is None else start + rest
            bar = {"desc": file.target.name, "total": total, "initial": start, "dynamic_ncols": True}
            cut = contextlib.suppress(urllib3.exceptions.HTTPError)
            part.parent.mkdir(parents=True, exist_ok=True)  # not before there is something to put into it
            with part.open("ab" if start else "wb") as output, tqdm.wrapattr(output, "write", **bar) as output, cut:
                shutil.copyfileobj(answer.raw, output, CHUNK)
        if total not in (None, _size(part)):
            raise InterruptionError(f"{_size(part)} of {total} bytes were received")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cause(error: BaseException) -> str:
    """Returns the message of the innermost of the exceptions of requests, urllib3 and the sockets."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__
