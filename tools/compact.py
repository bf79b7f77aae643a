"""Store descriptors in half or a quarter of the space: float16, or int8 with a scale per row; reports the loss.

python -m tools.compact feats_1m_RN50.pth --dtype float16 --out feats_1m_RN50.npy
python -m tools.compact feats_1m_RN50.pth --dtype int8 --out distractors_int8.npy

FILE is .npy or .pth, (N, D) unit descriptors. int8 writes the scales to NAME.scale.npy beside NAME.npy.
TEST.DISTRACTORS and the --database of tools.rerank accept both kinds. Rows are read and written in blocks; the loss is
measured with some of them as queries. For fewer dimensions use tools.whiten (PCA), for shorter codes TEST.INDEX.
"""

import logging
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from assembly import start_session
from config import CommandLine
from extraction.store import provenance_path, read_provenance, write_json
from model.errors import InputError
from modules.compact import Int8Rows
from modules.search import Database, search
from report.command import run_command
from revisitop.descriptors import load_distractors, scales_path

log = logging.getLogger(__name__)

_ROWS, _QUERIES, _FIRST = 8192, 100, 10


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, ("TEST.DEVICE",))
    line.add("file", type=Path, metavar="FILE", help="descriptors, .npy or .pth")
    line.add("--dtype", choices=("float16", "int8"), required=True, help="data type of the new file")
    line.add("--out", type=Path, required=True, metavar="FILE", help="the new file, .npy")
    args, cfg, _ = line.parse(argv)
    if args.out.suffix != ".npy":
        raise InputError(f"--out {args.out} must end in .npy: rows are written in NumPy's format")
    if args.out.resolve() == args.file.resolve():
        raise InputError(f"--out {args.out} is the input file: give another name")
    session = start_session(cfg)
    exact = Database(load_distractors(args.file))
    write_compact(exact, args.out, args.dtype)
    made_from = read_provenance(args.file) or {}
    write_json(provenance_path(args.out), {**made_from, "dtype": args.dtype})
    compact = Database(load_distractors(args.out))
    files = [args.out, *([scales_path(args.out)] if args.dtype == "int8" else [])]
    size = sum(file.stat().st_size for file in files)
    log.info(
        "%s: %d rows of %d as %s, %.1f MB, %d bytes per image",
        args.out, len(exact), exact.dim, args.dtype, size / 1e6, size // len(exact),
    )  # fmt: skip
    log.info("%s", loss(exact, compact, session.device))


def write_compact(rows: Database, path: Path, dtype: str) -> None:
    """Writes the rows as float16 or int8, atomically.

    Raises:
        InputError: if a row has NaN, or the file cannot be written.
    """
    names = [path, scales_path(path)] if dtype == "int8" else [path]
    parts = [name.with_name(f"{name.name}.{os.getpid()}.new") for name in names]
    try:
        values = np.lib.format.open_memmap(parts[0], "w+", np.dtype(dtype), (len(rows), rows.dim))
        scales = np.empty(len(rows), dtype=np.float32)
        with tqdm(total=len(rows), desc=dtype, unit="row", dynamic_ncols=True, leave=False) as bar:
            for start, chunk in rows.chunks(_ROWS):
                if len(bad := (~chunk.isfinite().all(dim=1)).nonzero()):
                    raise InputError(f"row {start + int(bad[0])} (from 0) has NaN or infinity")
                if dtype == "int8":
                    small = Int8Rows.of(chunk)
                    values[start : start + len(chunk)] = small.values.numpy()
                    scales[start : start + len(chunk)] = small.scales.numpy()
                else:
                    values[start : start + len(chunk)] = chunk.half().numpy()
                bar.update(len(chunk))
        values.flush()
        if dtype == "int8":
            with parts[1].open("wb") as file:
                np.save(file, scales)
        for part, name in zip(reversed(parts), reversed(names), strict=True):  # int8 rows never exist without scales
            part.replace(name)
    except OSError as error:
        raise InputError(f"--out {path} cannot be written ({error.strerror})") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def loss(exact: Database, compact: Database, device: torch.device) -> str:
    """Returns the error of the cosines, and of the first ten results with some rows as queries, in words."""
    numbers = torch.linspace(0, len(exact) - 1, min(_QUERIES, len(exact))).long()
    queries, largest, total = exact.rows(numbers), 0.0, 0.0
    for (_, before), (_, after) in zip(exact.chunks(_ROWS), compact.chunks(_ROWS), strict=True):
        errors = (queries.double() @ (before.double() - after.double()).T).abs()
        largest, total = max(largest, float(errors.max())), total + float(errors.sum())
    mean = total / (len(queries) * len(exact))
    first, new = (search(queries, each, _FIRST, device=device).ids for each in (exact, compact))
    kept = np.mean([np.isin(a, b).sum() for a, b in zip(first.numpy(), new.numpy(), strict=True)])
    same = int((first == new).all(dim=1).sum())
    return (
        f"error of a cosine: {largest:.1e} at most, {mean:.1e} on average; of the first {first.shape[1]}, {kept:.2f} "
        f"stay on average, and {same} of {len(queries)} queries keep them in order"
    )


if __name__ == "__main__":
    run_command(main)
