"""Download files over HTTP from unreliable hosts, which may cut connections, or send other files."""

import contextlib
import hashlib
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
        md5: a file that begins with its MD5, if there is one.
        name: its name in the folder, if it gets another one.
    """

    hosts: tuple[str, ...]
    path: str
    folder: Path
    check: Callable[[Path], object] = lambda path: None
    md5: "File | None" = None
    name: str = ""

    @property
    def target(self) -> Path:
        return self.folder / (self.name or self.path.rpartition("/")[2])

    def verify(self, path: Path) -> None:
        """Raises InputError if the download at `path` is not this file."""
        if self.md5 is not None:
            digest = hashlib.md5(usedforsecurity=False)
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            if not self.md5.target.read_text().lower().startswith(digest.hexdigest()):
                raise InputError(f"{path} does not have the MD5 in {self.md5.target}")
        self.check(path)


class InterruptionError(InputError):
    """An incomplete answer; another request may be answered completely."""


class Fetcher:
    """Downloads each file from the first host that provides it complete and valid.

    Attributes:
        mirrors: hosts that are tried before those of a file.
        answered: whether any host has answered.
        unreachable: the hosts that do not answer, with the reason; they are tried no more.
    """

    def __init__(self, mirror: str | None = None):
        self.mirrors, self.answered, self.unreachable = (mirror,) if mirror else (), False, dict[str, str]()
        self.session = requests.Session()
        self.session.headers["Accept-Encoding"] = "identity"
        # Once more on a new connection: hosts close connections that were idle.
        retry = urllib3.Retry(1, connect=0, respect_retry_after_header=False)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))

    @property
    def offline(self) -> bool:
        """Whether no host could be reached so far."""
        return bool(self.unreachable) and not self.answered

    def size(self, file: File) -> int | None:
        """Returns the size in bytes, or None if no host tells it. Raises ConnectionError if none can be reached."""
        try:
            answer = self._try_hosts(file, lambda host: self._request("HEAD", host, file))
        except InputError:
            return None
        return int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None

    def fetch(self, file: File) -> None:
        """Downloads a file, as NAME.part until it is valid. An existing file is only verified.

        Raises:
            ConnectionError: if none of its hosts can be reached.
            InputError: if no host provides it, with the answer of each; or if the existing file is invalid.
        """
        if file.md5 is not None:
            self.fetch(file.md5)
        if file.target.exists():
            try:
                return file.verify(file.target)
            except InputError as error:
                raise InputError(f"{error}; delete {file.target} to have it downloaded again") from None
        file.target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(f"{file.target}.part")
        self._try_hosts(file, lambda host: self._fetch_from(host, file, part))
        os.replace(part, file.target)

    def _try_hosts(self, file: File, action: Callable[[str], Any]) -> Any:
        """Returns the result of the action with the first host that does not make it fail."""
        problems, hosts = [], (*self.mirrors, *file.hosts)
        for host in (host for host in hosts if host not in self.unreachable):
            try:
                return action(host)
            except requests.RequestException as error:
                self.unreachable[host] = _cause(error)
            except InputError as error:
                problems.append(f"{host}/{file.path}: {error}")
        kind = InputError if problems else ConnectionError
        problems += [f"no connection to {host}: {self.unreachable[host]}" for host in hosts if host in self.unreachable]
        raise kind(f"no address provides {file.target.name} ({'; '.join(problems)})")

    def _request(self, method: str, host: str, file: File, **options: Any) -> requests.Response:
        response = self.session.request(method, f"{host}/{file.path}", timeout=TIMEOUT, **options)
        self.answered = True
        if response.status_code not in (200, 206, 416):
            response.close()
            kind = InterruptionError if response.status_code == 429 or response.status_code >= 500 else InputError
            raise kind(f"{response.status_code} {response.reason}")
        return response

    def _fetch_from(self, host: str, file: File, part: Path) -> None:
        """Downloads and verifies the part. If it was resumed and is invalid, it is downloaded again from the start."""
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
            return file.verify(part)
        except InputError:
            part.unlink()
            if not resumed:
                raise
        self._fetch_from(host, file, part)

    def _resume(self, host: str, file: File, part: Path) -> None:
        """Requests the missing bytes of the part once. Raises InputError if some are still missing."""
        size = _size(part)
        headers = {"Range": f"bytes={size}-"} if size else {}
        with self._request("GET", host, file, headers=headers, stream=True) as answer:
            if answer.status_code == 416:  # there are no more bytes, as is verified next
                return
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                raise InputError("a web page was received instead of the file")
            start, rest = size if answer.status_code == 206 else 0, answer.raw.length_remaining
            total = None if rest is None else start + rest
            bar = {"desc": file.target.name, "total": total, "initial": start, "dynamic_ncols": True}
            cut = contextlib.suppress(urllib3.exceptions.HTTPError)
            with part.open("ab" if start else "wb") as output, tqdm.wrapattr(output, "write", **bar) as output, cut:
                # The raw bytes: a .tgz with "Content-Encoding: gzip" must stay compressed.
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
