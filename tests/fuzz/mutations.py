"""Mutated files: thousands of damaged or malicious variants of valid ones, the same in each run."""

import io
import os
import random
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model.errors import InputError

INPUTS = int(os.environ.get("FUZZ_INPUTS", 2000))  # of all kinds together
SECONDS = 10  # of processor time for an input
MEMORY = 10  # bytes for each byte of an input, in addition to what any input may take
ANY_INPUT = 64 << 20


def count_of(share: float) -> int:
    """Returns the number of inputs of a kind with this share of all, in percent."""
    return max(10, round(INPUTS * share / 100))


def mutated(samples: list[bytes], count: int, forged: bool = True) -> Iterator[bytes]:
    """Yields samples with bytes changed, cut off, repeated or taken from another sample.

    In half of the variants of an archive, the change is in one of its files, and the checksums are right; in none if
    `forged` is False.
    """
    rng = random.Random(0)
    for _ in range(count):
        sample = rng.choice(samples)
        if forged and zipfile.is_zipfile(io.BytesIO(sample)) and rng.random() < 0.5:
            yield _with_changed_member(sample, rng)
        else:
            yield _changed(sample, samples, rng)


def _changed(sample: bytes, others: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(sample)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(len(data), 300))
        kind = rng.randrange(6)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        elif kind == 3:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[place:place] = other[start : start + rng.randrange(1, 40)]
        elif kind == 4 and rng.random() < 0.3:
            del data[place:]
        elif kind == 5 and rng.random() < 0.2:  # deep nesting, long numbers
            data[place:place] = data[place : place + rng.randrange(1, 5)] * rng.choice((10, 1000, 6000))
        data = data or bytearray(b"\0")
    return bytes(data)


def _with_changed_member(sample: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(sample)) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    chosen = rng.choice([name for name, content in members.items() if content])
    members[chosen] = _changed(members[chosen], [*filter(None, members.values())], rng)
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def survives(path: Path, samples: list[bytes], read: Callable[[Path], object], share: float) -> None:
    """Reads mutated samples: each gives a value or an InputError of one line, within limits of time and memory.

    Some must be rejected. Inputs that fail are kept beside the path.

    Args:
        path: where the inputs are written.
        samples: valid inputs.
        read: reads the path.
        share: the share of all inputs, in percent.
    """
    refused, slowest, largest, failures, count = 0, 0.0, 0, {}, count_of(share)
    for number, data in enumerate(mutated(samples, count)):
        path.write_bytes(data)
        time, memory = _processor_time(), _reset_peak()
        problem = ""
        try:
            read(path)
        except InputError as error:
            refused += 1
            problem = "several lines" if "\n" in str(error) else ""
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        seconds, grown = _processor_time() - time, _peak() - memory
        slowest, largest = max(slowest, seconds), max(largest, grown)
        if seconds > SECONDS or grown > ANY_INPUT + MEMORY * len(data):
            problem = problem or f"{seconds:.1f} s, {grown / 1e6:.0f} MB for {len(data)} bytes"
        if problem and problem not in failures:
            kept = path.with_name(f"failure-{number}{path.suffix}")
            kept.write_bytes(data)
            failures[problem] = str(kept)
    print(f"\n{count} inputs, {refused} refused, at most {slowest:.2f} s and {largest / 1e6:.0f} MB each", flush=True)
    if failures:
        pytest.fail("\n".join(f"{problem}; the input is {kept}" for problem, kept in failures.items()))
    assert refused > 0


def _processor_time() -> float:
    """Returns the seconds of this process and its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _reset_peak() -> int:
    """Makes the peak of the memory the present one, and returns it; on systems without it 0."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _peak()


def _peak() -> int:
    """Returns the peak of the memory of this process in bytes; 0 where it is not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)
