"""Descriptors in shards, NAME.00003-of-00064.npy, that any machines extract independently; searched together."""

import re
from collections.abc import Sequence
from pathlib import Path

from extraction.store import differences, read_provenance
from model.errors import InputError, short_list

_NAME = re.compile(r"(?P<stem>.+)\.(?P<number>\d{5})-of-(?P<count>\d{5})")


def shard_path(path: Path, number: int, count: int) -> Path:
    """Returns the file of a shard, numbered from 0: NAME.00003-of-00064.npy for NAME.npy."""
    return path.with_name(f"{path.stem}.{number:05d}-of-{count:05d}{path.suffix}")


def is_shard(path: Path) -> bool:
    """Returns whether the file has the name of a shard."""
    return _NAME.fullmatch(path.stem) is not None


def shard_rows(total: int, number: int, count: int) -> tuple[int, int]:
    """Returns the range of rows of a shard: the first row, and the row after the last."""
    return total * number // count, total * (number + 1) // count


def find_shards(path: Path) -> list[Path]:
    """Returns the shards of NAME.npy, given that name or the name of one shard; an empty list if there are none.

    Raises:
        InputError: if one is missing, or there are shards with different total numbers.
    """
    match = _NAME.fullmatch(path.stem)
    stem = match["stem"] if match else path.stem
    found: dict[int, dict[int, Path]] = {}
    for file in path.parent.glob(f"*-of-*{path.suffix}") if path.parent.is_dir() else ():
        named = _NAME.fullmatch(file.stem)
        if named and named["stem"] == stem:
            found.setdefault(int(named["count"]), {})[int(named["number"])] = file
    if match:
        found = {count: files for count, files in found.items() if count == int(match["count"])}
    if not found:
        return []
    if len(found) > 1:
        numbers = " and ".join(map(str, sorted(found)))
        raise InputError(f"{path.parent / stem} has shards with totals of {numbers}; name one of the shards to use")
    ((count, files),) = found.items()
    missing = [shard_path(path.with_stem(stem), number, count).name for number in range(count) if number not in files]
    if missing:
        raise InputError(f"{len(missing)} of {count} shards are missing from {path.parent}: {short_list(missing, 3)}")
    return [files[number] for number in range(count)]


# Keys in which the shards of one list differ.
_OWN = ("rows", "skipped", "date", "command", "versions", "config", "device")


def check_shards(paths: Sequence[Path]) -> None:
    """Compares the provenance of the shards: the settings must be equal, and the rows consecutive.

    Raises:
        InputError: if settings differ, rows overlap or leave a gap, or a shard has no provenance file.
    """
    made = []
    for path in paths:
        provenance = read_provenance(path)
        if provenance is None or not isinstance(provenance.get("rows"), list):
            raise InputError(f"{path} has no {path.name}.json with its rows; extract the shard again")
        made.append(provenance)
    common = [{key: value for key, value in each.items() if key not in _OWN} for each in made]
    expected = 0
    for path, each, settings in zip(paths, made, common, strict=True):
        if differing := differences(settings, common[0]):
            words = short_list(differing).replace("before", "here").replace("now", f"in {paths[0].name}")
            raise InputError(f"{path} was extracted with other settings ({words})")
        start, stop, _ = each["rows"]
        if start != expected:
            problem = "overlaps the shard before it" if start < expected else "leaves a gap before it"
            raise InputError(f"{path} has the rows {start} to {stop} and {problem}: {expected} should be next")
        expected = stop
    if expected != made[0]["rows"][2]:
        raise InputError(f"{paths[-1]} ends at row {expected} of {made[0]['rows'][2]}: the last rows are missing")
