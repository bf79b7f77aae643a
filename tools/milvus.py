"""Keep the descriptors of a folder in Milvus: a file of Milvus Lite in this process, or a server, with the same calls.

Each folder and recipe has a collection with one entity per image. The key of an entity is computed from the name of
the image, and its field `content` from the descriptor, so that a changed folder is updated in place, an interrupted
update is resumed by the next one, and there are no duplicates. A new collection has a flat index, whose search is
exact; another index, created with Milvus's own tools, is used if there is one.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import InputError
from revisitop.index import IndexedDatabase, by_cosine

log = logging.getLogger(__name__)

_FIELDS = {"key", "name", "content", "vector"}
_ASKED = 16000  # entities per request; Milvus allows 16384, and Milvus Lite reads all of them for each request
_SENT_BYTES = 4 << 20  # of vectors per upload
_QUERIES = 100  # per search
_NAME_BYTES = 16384
_TIMEOUT = 20.0  # seconds until a server counts as unreachable


def connect(uri: str) -> Any:
    """Returns the client of a file NAME.db, or of a server, whose token is the environment variable MILVUS_TOKEN.

    Raises:
        InputError: if pymilvus is not installed, or the server does not answer.
    """
    try:
        import pymilvus
    except ImportError:
        raise InputError("Milvus needs its client: pip install pymilvus milvus-lite") from None
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # its messages are also raised
    with _milvus_errors(uri):
        return pymilvus.MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=_TIMEOUT)


class MilvusDatabase(IndexedDatabase):
    """Images in a collection of Milvus, which provides the candidates; their rows are those of the descriptors.

    Args:
        client: the client of pymilvus.
        uri: its file or server.
        collection: the name of the collection, which is created if it is missing.
        names: the names of the N images, each once.
        rows: (N, D), their descriptors, float32.

    Raises:
        InputError: if the collection has other contents, or the server fails.
    """

    def __init__(self, client: Any, uri: str, collection: str, names: Sequence[str], rows: Tensor):
        super().__init__(rows)
        self.client, self.uri, self.collection = client, uri, collection
        self.numbers = {_digest(os.fsencode(name)): number for number, name in enumerate(names)}
        with _milvus_errors(uri):
            self._open()
            self._update(names)

    def _open(self) -> None:
        """Prepares the collection for search, after creating it if it is missing."""
        from pymilvus import DataType

        if self.client.has_collection(self.collection):
            fields = {field["name"]: field for field in self.client.describe_collection(self.collection)["fields"]}
            width = fields.get("vector", {}).get("params", {}).get("dim")
            if fields.keys() != _FIELDS or int(width or 0) != self.dim:
                raise InputError(
                    f"the collection {self.collection} in {self.uri} belongs to another database "
                    f"({', '.join(fields)}; {width} dimensions, not {self.dim}): drop it, or give another address"
                )
            self.client.load_collection(self.collection)
            return
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("name", DataType.VARCHAR, max_length=_NAME_BYTES)
        schema.add_field("content", DataType.VARCHAR, max_length=64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dim)
        index = self.client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="IP")
        self.client.create_collection(self.collection, schema=schema, index_params=index, consistency_level="Strong")

    def _update(self, names: Sequence[str]) -> None:
        """Updates the collection so that it contains exactly these images; an interrupted update is resumed."""
        (rows,), keys = self.parts, list(self.numbers)
        contents = [_digest(row.numpy().tobytes()) for row in rows]
        before, pages = {}, self.client.query_iterator(self.collection, _ASKED, output_fields=["key", "content"])
        while page := pages.next():
            before |= {entity["key"]: entity["content"] for entity in page}
        pages.close()
        gone = sorted(before.keys() - self.numbers.keys())
        for start in range(0, len(gone), _ASKED):
            self.client.delete(self.collection, ids=gone[start : start + _ASKED])
        fresh = [i for i, key in enumerate(keys) if before.get(key) != contents[i]]
        size = max(1, _SENT_BYTES // (4 * self.dim))
        for start in tqdm(range(0, len(fresh), size), desc=f"into {self.uri}", unit="block", dynamic_ncols=True):
            self.client.upsert(
                self.collection,
                [
                    {"key": keys[i], "name": _text(names[i]), "content": contents[i], "vector": rows[i].numpy()}
                    for i in fresh[start : start + size]
                ],
            )
        log.info(
            "%s, collection %s: %d images new or changed, %d removed, %d unchanged",
            self.uri, self.collection, len(fresh), len(gone), len(keys) - len(fresh),
        )  # fmt: skip

    def find(self, queries: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Returns the candidates of Milvus, sorted by their exact cosine, see IndexedDatabase."""
        ids = torch.full((len(queries), m), -1, dtype=torch.int64)
        with _milvus_errors(self.uri):
            for start in range(0, len(queries), _QUERIES):
                data = list(queries[start : start + _QUERIES].numpy())
                found = self.client.search(self.collection, data=data, limit=m, output_fields=["key"])
                for row, hits in zip(ids[start:], found, strict=False):
                    numbers = [self.numbers[hit["key"]] for hit in hits if hit["key"] in self.numbers]
                    row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return by_cosine(queries, ids, self)


def collection_name(name: str) -> str:
    """Returns the name in the form that Milvus allows: letters, digits and underscores."""
    return f"superglobal_{re.sub(r'[^A-Za-z0-9_]', '_', name)}"


@contextmanager
def _milvus_errors(uri: str) -> Iterator[None]:
    """A context that converts exceptions of Milvus to an InputError with one line."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        reason = " ".join(str(error.message or error).split())[:300]
        raise InputError(f"Milvus at {uri}: {reason}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _text(name: str) -> str:
    """Returns the name as valid UTF-8."""
    return os.fsencode(name).decode(errors="replace").encode()[: _NAME_BYTES - 4].decode(errors="ignore")
