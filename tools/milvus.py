"""A folder's descriptors in Milvus: a file of Milvus Lite inside this process, or a server, by the same calls.

A collection for each folder and recipe holds an entity per image. Its key follows from the image's name and `content`
from its descriptor, so that a folder that has changed is updated in place, an interrupted update is resumed by the next
one, and nothing stands twice. A collection that is made here has a flat index, whose search is exact; give it another
one with Milvus's own tools, and it is used.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import InputError
from modules.checks import as_tensor
from revisitop.index import IndexedDatabase, by_cosine

log = logging.getLogger(__name__)

_FIELDS = {"key", "name", "content", "vector"}
_ASKED = 16000  # entities that are asked for at once; Milvus takes 16384, and Milvus Lite reads all for each request
_SENT_BYTES = 4 << 20  # of vectors that are sent at once
_GOT_BYTES = 32 << 20  # of vectors that come at once
_KEPT_BYTES = 1 << 30  # of vectors of a search's candidates that are kept for what follows
_NAME_BYTES = 16384
_TIMEOUT = 20.0  # seconds until a server counts as not there


@dataclass(frozen=True)
class Milvus:
    """An open connection.

    Attributes:
        uri: a file NAME.db, or a server's address.
        client: pymilvus's.
    """

    uri: str
    client: Any

    @classmethod
    def connect(cls, uri: str) -> "Milvus":
        """Opens the file or the server; a server's token is MILVUS_TOKEN of the environment.

        Raises:
            InputError: if pymilvus is not installed, or nothing answers.
        """
        try:
            import pymilvus
        except ImportError:
            raise InputError("Milvus needs its client: pip install pymilvus milvus-lite") from None
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # what it tells is raised, too
        with _milvus_errors(uri):
            token = os.environ.get("MILVUS_TOKEN", "")
            return cls(uri, pymilvus.MilvusClient(uri, token=token, timeout=_TIMEOUT))

    def collection(self, name: str, dim: int) -> None:
        """Makes the collection if it is not there, and readies it for search.

        Raises:
            InputError: if it is, and holds something else.
        """
        from pymilvus import DataType

        with _milvus_errors(self.uri):
            if self.client.has_collection(name):
                fields = {field["name"]: field for field in self.client.describe_collection(name)["fields"]}
                width = fields.get("vector", {}).get("params", {}).get("dim")
                if fields.keys() != _FIELDS or int(width or 0) != dim:
                    raise InputError(
                        f"the collection {name} in {self.uri} is of another database "
                        f"({', '.join(fields)}; {width} dimensions, not {dim}): drop it, or give another address"
                    )
                self.client.load_collection(name)
                return
            schema = self.client.create_schema(auto_id=False)
            schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
            schema.add_field("name", DataType.VARCHAR, max_length=_NAME_BYTES)
            schema.add_field("content", DataType.VARCHAR, max_length=64)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
            index = self.client.prepare_index_params()
            index.add_index("vector", index_type="FLAT", metric_type="IP")
            self.client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")

    def update(self, collection: str, names: Sequence[str], rows: Tensor) -> "MilvusDatabase":
        """Returns the collection after it was made to hold these images and no others.

        Args:
            names: of the images, N of them, each once.
            rows: (N, D), their descriptors, float32.

        Raises:
            InputError: if the collection is of another database, or the server fails; the next update resumes.
        """
        self.collection(collection, rows.shape[1])
        keys = [_digest(os.fsencode(name)) for name in names]
        contents = [_digest(row.numpy().tobytes()) for row in rows]
        with _milvus_errors(self.uri):
            before = self._contents(collection)
            gone = sorted(before.keys() - set(keys))
            for start in range(0, len(gone), _ASKED):
                self.client.delete(collection, ids=gone[start : start + _ASKED])
            fresh = [i for i, key in enumerate(keys) if before.get(key) != contents[i]]
            size = max(1, _SENT_BYTES // (4 * rows.shape[1]))
            for start in tqdm(range(0, len(fresh), size), desc=f"into {self.uri}", unit="block", dynamic_ncols=True):
                self.client.upsert(
                    collection,
                    [
                        {"key": keys[i], "name": _text(names[i]), "content": contents[i], "vector": rows[i].numpy()}
                        for i in fresh[start : start + size]
                    ],
                )
        log.info(
            "%s, collection %s: %d images new or changed, %d gone, %d as before",
            self.uri, collection, len(fresh), len(gone), len(keys) - len(fresh),
        )  # fmt: skip
        return MilvusDatabase(self, collection, rows, keys)

    def _contents(self, collection: str) -> dict[str, str]:
        """What the collection holds: content by key."""
        found, pages = {}, self.client.query_iterator(collection, _ASKED, output_fields=["key", "content"])
        while page := pages.next():
            found |= {entity["key"]: entity["content"] for entity in page}
        pages.close()
        return found


class MilvusDatabase(IndexedDatabase):
    """A collection as a database: candidates and rows come from Milvus, numbered as the images are.

    Args:
        milvus: the connection.
        collection: its name.
        rows: (N, D), of the images in their order.
        keys: theirs.
    """

    def __init__(self, milvus: Milvus, collection: str, rows: Tensor, keys: Sequence[str]):
        super().__init__(rows)
        self.milvus, self.collection, self.keys = milvus, collection, list(keys)
        self.numbers = {key: number for number, key in enumerate(keys)}
        self._recent: dict[int, Tensor] = {}

    def find(self, queries: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Returns Milvus's candidates in the order of their exact cosine, see IndexedDatabase."""
        ids = torch.full((len(queries), m), -1, dtype=torch.int64)
        self._recent = {}
        block = max(1, _GOT_BYTES // (4 * self.dim * m))
        with _milvus_errors(self.milvus.uri):
            for start in range(0, len(queries), block):
                data = list(queries[start : start + block].numpy())
                found = self.milvus.client.search(self.collection, data=data, limit=m, output_fields=["key", "vector"])
                for row, hits in zip(ids[start:], found, strict=False):
                    known = [hit["entity"] for hit in hits if hit["key"] in self.numbers]
                    row[: len(known)] = torch.tensor([self.numbers[each["key"]] for each in known], dtype=torch.int64)
                    self._keep(known)
        return by_cosine(queries, ids, self)

    def rows(self, ids: Any) -> Any:
        """The rows with these numbers, from Milvus, see Database.rows."""
        if not isinstance(ids, Tensor):
            return self.rows(as_tensor(ids, "ids")).numpy()
        unique, inverse = ids.flatten().cpu().unique(return_inverse=True)
        rows = torch.empty(len(unique), self.dim)
        block = max(1, min(_ASKED, _GOT_BYTES // (4 * self.dim)))
        for part, out in zip(unique.split(block), rows.split(block), strict=True):
            numbers = part.tolist()
            known = {number: self._recent[number] for number in numbers if number in self._recent}
            known |= self._got([number for number in numbers if number not in known])
            for place, number in enumerate(numbers):
                out[place] = known[number]
        return rows[inverse].view(*ids.shape, self.dim)

    def _keep(self, entities: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the vectors of candidates, which a reranker will ask for, as far as there is room."""
        for entity in entities:
            if len(self._recent) * 4 * self.dim < _KEPT_BYTES:
                self._recent[self.numbers[entity["key"]]] = torch.as_tensor(entity["vector"], dtype=torch.float32)

    def _got(self, numbers: list[int]) -> dict[int, Tensor]:
        """The rows with these numbers, from Milvus."""
        if not numbers:
            return {}
        keys = [self.keys[number] for number in numbers]
        with _milvus_errors(self.milvus.uri):
            got = self.milvus.client.get(self.collection, ids=keys, output_fields=["key", "vector"])
        rows = {self.numbers[each["key"]]: torch.as_tensor(each["vector"], dtype=torch.float32) for each in got}
        if len(rows) < len(numbers):
            raise InputError(f"{self.milvus.uri} has lost images of {self.collection}; start again to put them back")
        return rows


def collection_name(name: str) -> str:
    """A name as Milvus takes it, of letters, digits and underscores."""
    return f"superglobal_{re.sub(r'[^A-Za-z0-9_]', '_', name)}"


@contextmanager
def _milvus_errors(uri: str) -> Iterator[None]:
    """Milvus's exceptions inside become an InputError in one line."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        reason = " ".join(str(error.message or error).split())[:300]
        raise InputError(f"Milvus at {uri}: {reason}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _text(name: str) -> str:
    """The name as UTF-8 can hold it."""
    return os.fsencode(name).decode(errors="replace").encode()[: _NAME_BYTES - 4].decode(errors="ignore")
