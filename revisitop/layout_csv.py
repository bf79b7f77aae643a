"""GLDv2's layout: index.csv, queries.csv (or test.csv) and solution.csv; images in index/ and in test/ or queries/.

index.csv has a column id; queries.csv has id and, optionally, x0, y0, x1, y1; solution.csv has id, images (index
ids separated by spaces, None if the query is ignored) and, optionally, Usage: Public, Private, Ignored or any
other name. Image files are a/b/c/<id>.jpg, with the first three characters of the id, or <id>.<suffix> in one folder.

Weyand et al., "Google Landmarks Dataset v2", CVPR 2020.
"""

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from extraction.files import write_atomically
from extraction.identity import last_places
from extraction.images import Box, ImageList, NameList, image_suffixes
from model.errors import InputError, short_list
from revisitop.dataset import Dataset, GroundTruth, Layout
from revisitop.protocols import challenge_protocols

_SOLUTIONS = ("solution.csv", "retrieval_solution_v2.1.csv")
_PLACES = ("", "metadata", "ground_truth")
_CORNERS = ("x0", "y0", "x1", "y1")


def read_csv_dataset(name: str, folder: Path) -> Dataset:
    """Reads a dataset of this layout. Ignored queries are left out.

    Raises:
        InputError: if a file is missing or has no header, an id of the solution is in no list, a query is not in
            the solution, an id is listed twice, or a box is empty.
    """
    solution, index = _find(folder, *_SOLUTIONS), _find(folder, "index.csv")
    queries, tests = _find(folder, "queries.csv"), _find(folder, "test.csv")
    listed = queries or tests
    for file_name, file in (("solution.csv", solution), ("index.csv", index), ("queries.csv (or test.csv)", listed)):
        if file is None:
            raise InputError(f"{folder} has no {file_name}, which belongs to {CSV.files}")
    ids, boxes = _ids(index), _boxes(listed)
    relevant: dict[str, list[str]] = {}
    usages: dict[str, str] = {}
    ignored, strangers = set(), []
    for query, row in _rows(solution, "id", "images"):
        if query not in boxes:
            strangers.append(query)
        if _is_ignored(row):
            ignored.add(query)
        else:
            relevant[query], usages[query] = row["images"].split(), (row.get("Usage") or "").strip()
    names = NameList(chain(*relevant.values()))
    places = dict(zip(names, last_places(ids.array, names.array).tolist(), strict=True))
    unknown = [name for name, place in places.items() if place < 0]
    for kind, file, known, missing in (("queries", listed, boxes, strangers), ("images", index, ids, unknown)):
        if missing:
            others = missing[0].removesuffix(".jpg"), f"{missing[0]}.jpg"
            hint = "; with .jpg in one file and without in the other" if any(each in known for each in others) else ""
            raise InputError(f"{solution}: {len(missing)} {kind} are not in {file.name} ({short_list(missing)}){hint}")
    if queries and (without := [query for query in boxes if query not in relevant and query not in ignored]):
        raise InputError(f"{solution} has no line for {len(without)} queries of {queries.name} ({short_list(without)})")
    if not relevant:
        raise InputError(f"{solution}: every query is ignored")
    titles = {*usages.values()}
    if "" in titles and len(titles) > 1:
        raise InputError(f"{solution}: Usage is empty in some lines and not in others")
    order = sorted(titles - {""}, key=lambda usage: (("Public", "Private", usage).index(usage), usage))
    truth = {}
    for query, images in relevant.items():
        numbers = np.array([*dict.fromkeys(places[image] for image in images)], dtype=np.int64)
        truth[query] = GroundTruth({"relevant": numbers}, usages[query])
    query_names = [query for query in boxes if query in truth]
    roots = [folder / root for root in (("queries", "test") if queries else ("test", "queries"))]
    root = next((root for root in roots if root.is_dir()), roots[0])
    return Dataset(
        name,
        folder,
        _images(root, query_names, [boxes[query] for query in query_names]),
        _images(folder / "index", ids),
        [truth[query] for query in query_names],
        challenge_protocols(order),
        f"CSV, {listed.name}, {index.name} and {solution.name}, {len(ignored)} queries ignored",
        query_names,
        ids,
    )


def _images(root: Path, ids: Sequence[str], boxes: Sequence[Box | None] | None = None) -> ImageList:
    """Returns the images below a folder by their ids: a/b/c/<id>.jpg, or <id>.<suffix>, or the name of a file."""
    if any((root / _nested(each)).is_file() for each in ids[:100]):
        return ImageList(root, NameList(map(_nested, ids)), boxes)
    files: dict[str, str] = {}
    suffixes = image_suffixes()
    for name in sorted(os.listdir(root)) if root.is_dir() else ():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes:
            files.setdefault(stem, name)
            files[name] = name
    return ImageList(root, NameList(files.get(each, f"{each}.jpg") for each in ids), boxes)


def read_predictions(path: Path, dataset: Dataset) -> list[np.ndarray]:
    """Reads predictions in the format of the challenge, `id,images`, as database numbers, best first.

    An image that is not in the database, or that is repeated in a line, keeps its rank as -1. A query
    without a line has no predictions; lines of queries that the solution ignores are skipped.

    Raises:
        InputError: if the file has no header `id,images`, a query twice, or an unknown query.
    """
    solution = _find(dataset.folder, *_SOLUTIONS)
    queries = [dataset.query_name(number) for number in range(len(dataset.queries))]
    places = {dataset.database_name(number): number for number in range(len(dataset.database))}
    if len(places) < len(dataset.database) or len({*queries}) < len(queries):
        raise InputError(f"{path}: names in {dataset.name} are not unique, so that they cannot be looked up")
    known, found = set(queries), {}
    ignored = {query for query, row in _rows(solution, "id", "images") if _is_ignored(row)} if solution else set()
    for query, row in _rows(path, "id", "images"):
        if query not in known and query not in ignored:
            raise InputError(f"{path}: {query} is not a query of {dataset.name}")
        numbers, seen = [], set()
        for image in row["images"].split():
            number = places.get(image, -1)
            numbers.append(-1 if number in seen else number)
            seen.add(number)
        found[query] = np.array(numbers, dtype=np.int64)
    return [found.get(query, np.empty(0, dtype=np.int64)) for query in queries]


def write_predictions(path: Path, queries: Sequence[str], names: Sequence[str], ids: np.ndarray) -> None:
    """Writes the results of each query in the format of the challenge. ids (Q, R), in which -1 becomes -.

    Raises:
        InputError: if the name of a result contains a space, or the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "images"])
    for query, row in zip(queries, ids, strict=True):
        found = [names[number] if number >= 0 else "-" for number in np.trim_zeros(row + 1, "b") - 1]
        if spaced := next((name for name in found if len(name.split()) != 1), None):
            raise InputError(f"{path}: {spaced!r} contains a space, which separates results in this format")
        writer.writerow([query, " ".join(found)])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _is_ignored(row: dict[str, str]) -> bool:
    return (row.get("Usage") or "").strip().lower() == "ignored" or row["images"].split() == ["None"]


CSV = Layout(
    "index.csv, queries.csv (or test.csv) and solution.csv, with images in index/ and queries/ (or test/)",
    lambda folder: _find(folder, *_SOLUTIONS, "index.csv", "queries.csv", "test.csv") is not None,
    read_csv_dataset,
)


def _find(folder: Path, *names: str) -> Path | None:
    files = [folder / place / name for place in _PLACES for name in names]
    return next((file for file in files if file.is_file()), None)


def _nested(image: str) -> str:
    return f"{image[:1]}/{image[1:2]}/{image[2:3]}/{image}.jpg"


def _rows(path: Path, *columns: str, unique: bool = True) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the id of each line of a CSV file, and its values by column.

    Raises:
        InputError: if the file is missing or damaged, or an id is repeated, which is not checked without `unique`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    encoding = "utf-8-sig"
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        encoding = "latin-1"
    lines = csv.DictReader(io.TextIOWrapper(io.BytesIO(content), encoding, newline=""), skipinitialspace=True)
    seen: set[str] = set()
    try:
        header = [name.strip() for name in lines.fieldnames or []]
        if missing := [name for name in columns if name not in header]:
            words = f"{path}: the first line must be a header with {', '.join(columns)}; {missing[0]} is missing"
            raise InputError(f"{words}, it has {', '.join(header) or 'nothing'}")
        lines.fieldnames = header
        for row in lines:
            if None in row or any(row[name] is None for name in columns):
                raise InputError(f"{path}, line {lines.line_num}: the number of columns differs from the header")
            name = row["id"].strip()
            if not name or name in seen:
                raise InputError(f"{path}, line {lines.line_num}: {name!r} is {'listed twice' if name else 'no id'}")
            if unique:
                seen.add(name)
            yield name, row
    except csv.Error as error:
        raise InputError(f"{path}, line {lines.line_num}: {error}") from None


def _ids(path: Path) -> NameList:
    """Returns the ids of a list, of which there may be a million. Raises InputError if one is repeated or invalid."""
    ids = NameList(_checked(path, image) for image, _ in _rows(path, "id", unique=False))
    ordered = np.sort(ids.array)
    if len(repeated := ordered[1:][ordered[1:] == ordered[:-1]]):
        raise InputError(f"{path}: {os.fsdecode(repeated[0])} is listed twice")
    if spaced := next((image for image in ids if len(image.split()) != 1), None):
        raise InputError(f"{path}: {spaced!r} contains a space, which separates the images of a solution")
    if not len(ids):
        raise InputError(f"{path} lists no image")
    return ids


def _checked(path: Path, image: str) -> str:
    """Returns the id. Raises InputError if it is not that of a file in the folder of the images."""
    if "/" in image or "\\" in image or "\0" in image or image in (".", "..") or len(image) > 200:
        raise InputError(f"{path}: {image[:50]!r} is not a valid id of an image")
    return image


def _boxes(path: Path) -> dict[str, Box | None]:
    """Returns the box of each query, or None, by its id."""
    boxes: dict[str, Box | None] = {}
    for query, row in _rows(path, "id"):
        cells = [(row.get(corner) or "").strip() for corner in _CORNERS]
        try:
            box = tuple(float(cell) for cell in cells) if any(cells) else None
        except ValueError:
            raise InputError(f"{path}: query {query} has no box of four numbers x0, y0, x1, y1: {cells}") from None
        if box and not (all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]):
            raise InputError(f"{path}: the box of query {query} is empty: {', '.join(cells)}")
        boxes[_checked(path, query)] = box
    return boxes
