"""Approximate search: an index finds the candidates of each query.

FAISS indexes are specified by factory strings ("Flat", "IVF4096,PQ64", "HNSW32", "OPQ64,IVF4096,PQ64"), see Douze et
al., "The Faiss library", 2024. They are trained with a sample, filled in blocks of rows, and saved to disk:

    NAME.IVF4096_PQ64.faiss         the index
    NAME.IVF4096_PQ64.faiss.json    its provenance: the factory string, that of the rows, the file's fingerprint

Shapes: Q queries, N database rows, D dimensions, M candidates per query, L listed rows of a query.
"""

import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extraction.files import jsonable, write_atomically, write_json
from extraction.identity import stat_record
from extraction.owner import owned
from extraction.provenance import differences, file_fingerprint, plain_name, read_provenance, sidecars
from model.errors import InputError
from modules.search import Database, SearchResult
from revisitop.measures import NOT_FOUND

log = logging.getLogger(__name__)

_ROWS = 8192
_SAMPLE = 32768  # smallest number of training rows: 128 for each of a product quantizer's 256 centroids
_PER_LIST = 40  # training rows per list of an inverted file; FAISS warns below 39
_LISTS_VISITED = 1 / 16  # the default share of the lists of an inverted file that a query visits


class IndexedDatabase(Database):
    """A database whose candidates come from an index. A subclass overrides :meth:`find`, and perhaps `rows`."""

    def find(self, queries: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Returns the numbers of each query's candidates, best first, -1 for none, and their scores. (Q, M), (Q, M)."""
        raise NotImplementedError

    def search(self, queries: Tensor, m: int, listed: Sequence[Tensor] | None = None) -> SearchResult:
        """Returns at most m candidates of each query; a listed row that is not among them counts as never found.

        Args:
            queries: (Q, D), unit descriptors.
            m: number of candidates; all rows if there are fewer.
            listed: per query, the row numbers (L,) int64 whose rank is wanted; none by default. The rank of a
                row that is not a candidate is NOT_FOUND, which adds nothing to any metric.

        Raises:
            InputError: if a query has NaN.
        """
        if len(bad := (~queries.isfinite().all(dim=1)).nonzero()):
            raise InputError(f"the descriptor of query {int(bad[0])} (from 0) has NaN; extract it again")
        ids, scores = self.find(queries.cpu().float(), min(m, len(self)))
        scores = scores.masked_fill(ids < 0, -torch.inf)
        if missing := int((ids < 0).sum()):
            log.info("the index found %d of %d candidates", ids.numel() - missing, ids.numel())
        listed = [torch.empty(0, dtype=torch.int64)] * len(ids) if listed is None else listed
        positions = [positions_of(numbers, row) for numbers, row in zip(listed, ids, strict=True)]
        if wanted := sum(map(len, positions)):
            lost = sum(int((where == NOT_FOUND).sum()) for where in positions)
            log.info(
                "%d of %d images that metrics need are not among the first %d of the index: they count as never found",
                lost, wanted, ids.shape[1],
            )  # fmt: skip
        return SearchResult(ids, scores, positions)


def positions_of(numbers: Tensor, ids: Tensor) -> Tensor:
    """Returns the 0-based place of each number among the ids, or NOT_FOUND. (L,), (M,) -> (L,).

    Each id is there at most once, but for -1, which takes a place and is never found.
    """
    found, order = torch.cat([ids, ids.new_tensor([-1])]).sort()
    places = torch.searchsorted(found, numbers).clamp(max=len(ids))
    return torch.where(found[places] == numbers, order[places], NOT_FOUND)


def by_cosine(queries: Tensor, ids: Tensor, database: Database) -> tuple[Tensor, Tensor]:
    """Returns the candidates in the order of exact search, and their cosines. (Q, M) -> (Q, M), (Q, M).

    A score is the float64 product rounded to float32; among equal scores the lower row number comes first.
    """
    ids = ids.sort(dim=1).values  # so that equal scores keep this order
    scores = torch.full(ids.shape, -torch.inf)
    for query, row, out in zip(queries.double(), ids, scores, strict=True):
        out[row >= 0] = (database.rows(row[row >= 0]).double() @ query).float() + 0.0
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order), scores.gather(1, order)


class FaissDatabase(IndexedDatabase):
    """A database with a FAISS index of its rows.

    Args:
        database: the rows.
        index: the inner-product index of the rows, in their order.
        decoded: whether rows are decoded from the index and normalised. Otherwise they are those of the
            database, and candidates are sorted by their exact cosine.
        size: the size of the index in bytes.
    """

    def __init__(self, database: Database, index: Any, decoded: bool = False, size: int = 0):
        super().__init__(database.parts)
        self.index, self.decoded, self.size, self._exact = index, decoded, size, database

    def find(self, queries: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Returns the candidates of the index, see :class:`IndexedDatabase`."""
        scores, ids = map(torch.from_numpy, self.index.search(queries.numpy(), m))
        return (ids, scores) if self.decoded else by_cosine(queries, ids, self._exact)

    def rows(self, ids: Any) -> Any:
        """Returns the rows with these numbers, exact or decoded, see Database.rows."""
        if not self.decoded or not isinstance(ids, Tensor):
            return super().rows(ids)
        rows = torch.from_numpy(self.index.reconstruct_batch(ids.flatten().cpu().numpy()))
        return torch.nn.functional.normalize(rows, dim=1).view(*ids.shape, self.dim)


def new_index(factory: str, dim: int) -> Any:
    """Returns an empty FAISS index for the inner product.

    Raises:
        InputError: if FAISS is not installed, or has no such index for this number of dimensions.
    """
    faiss = _faiss()
    if re.search(r"(?<!\d)0+(?!\d)", factory):  # filling such an index would make FAISS abort the process
        raise InputError(f"{factory!r} has a count of 0")
    with _faiss_errors(f"FAISS has no index {factory!r} for {dim} dimensions"):
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)


def indexed(
    database: Database,
    factory: str,
    path: Path,
    made_from: dict[str, Any],
    parameters: str = "",
    decoded: bool = False,
) -> FaissDatabase:
    """Returns the database with its index, which is loaded from `path` if it exists, else built and saved.

    Args:
        database: the rows.
        factory: the factory string of the index.
        path: the beginning of the file name of the index.
        made_from: the provenance of the rows, as JSON.
        parameters: FAISS's search parameters, such as "nprobe=64" or "efSearch=512". By default, a query visits
            a sixteenth of the lists of an inverted file, and all other parameters are FAISS's defaults.
        decoded: the source of the rows, see :class:`FaissDatabase`.

    Raises:
        InputError: if FAISS is not installed, does not know the index or its parameters, needs more rows
            for training, or cannot decode rows; or if a row has NaN.
    """
    faiss, file = _faiss(), Path(f"{path}.{plain_name(factory)}.faiss")
    provenance = jsonable({"factory": factory, "rows": len(database), "dim": database.dim, **made_from})
    with owned(file):
        index = _kept(file, provenance)
        if index is None:
            index = _built(database, factory)
            _keep(index, file, provenance)
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.nprobe = max(1, round(lists.nlist * _LISTS_VISITED))
    with _faiss_errors(f"invalid parameters {parameters!r} for the index {factory}"):
        faiss.ParameterSpace().set_index_parameters(index, parameters)
    if decoded:
        with _faiss_errors(f"the index {factory} cannot decode its rows; use the exact ones"):
            if isinstance(faiss.downcast_index(lists) if lists is not None else index, faiss.IndexIVFFastScan):
                raise RuntimeError("FAISS cannot map a fast-scan index")  # it would abort the process
            if lists is not None:
                lists.make_direct_map()
            index.reconstruct(0)
    return FaissDatabase(database, index, decoded, file.stat().st_size)


def _kept(file: Path, provenance: dict[str, Any]) -> Any:
    """Returns the index of an earlier run, or None if there is none with the same rows."""
    before = read_provenance(file)
    if before is None or not file.is_file():
        return None
    if differences(before, provenance) or file_fingerprint(file) != before.get("fingerprint"):
        log.info("%s: built from other rows, or damaged; it will be built again", file)
        return None
    try:
        index = _faiss().read_index(str(file))
    except (RuntimeError, MemoryError) as error:
        log.warning("%s cannot be read (%s); it will be built again", file, _reason(error))
        return None
    log.info("%s: reused, built from the same rows", file)
    return index


def _built(database: Database, factory: str) -> Any:
    """Returns a new index of all rows, trained with a sample of them."""
    index, start, n = new_index(factory, database.dim), time.perf_counter(), len(database)
    if not index.is_trained:
        count = min(n, _training_rows(index))
        sample = np.sort(np.random.default_rng(0).choice(n, count, replace=False))
        rows = database.rows(torch.from_numpy(sample)).numpy()
        _check_finite(rows, sample)
        with _faiss_errors(f"{n} rows are too few, or unsuitable, to train the index {factory}"):
            index.train(rows)
        del rows
    with tqdm(total=n, desc=f"index {factory}", unit="row", dynamic_ncols=True) as bar:
        for first, chunk in database.chunks(_ROWS):
            rows = np.ascontiguousarray(chunk.float().cpu().numpy())
            _check_finite(rows, range(first, first + len(rows)))
            hint = "; leave IDMap out, rows are numbered from 0" if "IDMap" in factory else ""
            with _faiss_errors(f"the index {factory} cannot be filled{hint}"):
                index.add(rows)
            bar.update(len(rows))
    log.info("index %s of %d rows: built in %.1f s", factory, n, time.perf_counter() - start)
    return index


def _training_rows(index: Any) -> int:
    lists = _faiss().try_extract_index_ivf(index)
    return max(_SAMPLE, _PER_LIST * lists.nlist if lists is not None else 0)


def _check_finite(rows: np.ndarray, numbers: Sequence[int]) -> None:
    if len(bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
        raise InputError(f"the descriptor of database row {numbers[bad[0]]} (from 0) has NaN; extract it again")


def _keep(index: Any, file: Path, provenance: dict[str, Any]) -> None:
    """Writes the index atomically, and then its provenance."""
    sidecars(file)[0].unlink(missing_ok=True)
    with _faiss_errors(f"{file} cannot be written"):
        write_atomically(file, lambda out: _faiss().write_index(index, _faiss().PyCallbackIOWriter(out.write)))
    own = {"fingerprint": file_fingerprint(file), "file": stat_record(file.stat())}
    write_json(sidecars(file)[0], {**provenance, **own})


def _faiss() -> Any:
    """Imports the package, which is needed only here."""
    try:
        import faiss
    except ImportError:
        raise InputError("an index needs FAISS, which is not installed: pip install faiss-cpu") from None
    return faiss


@contextmanager
def _faiss_errors(problem: str) -> Iterator[None]:
    """A context that converts FAISS's exceptions to an InputError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"{problem} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """Returns FAISS's message without the place in its source code."""
    text = " ".join(str(error).split()) or "out of memory"
    return re.sub(r".*(?:failed: |Error: |\.\w+:\d+: )", "", text)[:200].rstrip(". ")
