"""Estimate the costs of each stage for a million, a hundred million and a billion images, as a Markdown table.

    python benchmarks/scale.py
    python benchmarks/scale.py --extraction 600 --search 50e9 --memory 500e9

Nothing is timed here: the rates are arguments, and the defaults are measurements from benchmarks/README.md (two cores
of a CPU) and assumptions, which are stated below the table. Give your own.
"""

import argparse
import math

SIZES = (10**6, 10**8, 10**9)
DIM = 2048
FORMS = {"float32": 4 * DIM, "float16": 2 * DIM, "int8": DIM, "PQ64 codes": 64}  # bytes per image
# Two cores read the 8.2 GB of a million rows in 6.3 s.
RATES = {
    "extraction": ("images per second and GPU", 100.0),
    "search": ("bytes of rows per second and machine, in exact search with 70 queries", 1.3e9),
    "rerank": ("seconds for the 400 candidates of a query", 0.0064),
    "reads": ("rows per second from random places of a disk", 5000.0),
    "memory": ("bytes of memory for rows per machine", 200e9),
}
DEFAULTS = {name: default for name, (_, default) in RATES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (meaning, default) in RATES.items():
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=f"{meaning} [{default:g}]")
    print("\n".join(table(**vars(parser.parse_args()))))


def table(extraction: float, search: float, rerank: float, reads: float, memory: float) -> list[str]:
    """Returns the lines of the table and of its assumptions.

    Args:
        extraction: images per second of one GPU.
        search: bytes of float32 rows that one machine searches per second, with 70 queries at once.
        rerank: seconds for one query, with the rows of its candidates in memory.
        reads: rows per second from random places of a disk.
        memory: bytes of memory for rows on one machine.
    """
    lines = [
        "| | " + " | ".join(f"{size:,} images" for size in SIZES) + " | engine |",
        "| --- |" + " --- |" * (len(SIZES) + 1),
    ]

    def row(title: str, cells: list[str], engine: str) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} | {engine} |")

    row("extraction, GPU hours", [f"{size / extraction / 3600:,.0f}" for size in SIZES], "`torchrun`, or shards")
    for form, size_of_one in FORMS.items():
        engine = "the files themselves" if form != "PQ64 codes" else "FAISS, `TEST.INDEX`"
        row(f"rows, {form}", [amount(size * size_of_one) for size in SIZES], engine)
        machines = [math.ceil(size * size_of_one / memory) for size in SIZES]
        row(f"machines that hold them, {form}", [f"{count:,}" for count in machines], engine)
    machines = [math.ceil(size * 4 * DIM / memory) for size in SIZES]
    seconds = [size * 4 * DIM / search / count for size, count in zip(SIZES, machines, strict=True)]
    row("exact search with 70 queries on these, float32", [f"{each:,.0f} s" for each in seconds], "`torchrun test.py`")
    row("approximate search of a query", ["milliseconds"] * 3, "FAISS on one machine, Milvus on many")
    row("reranking of a query, rows in memory", [f"{1000 * rerank:.1f} ms"] * 3, "`SuperGlobalReranker`")
    row("reading its 400 rows from a disk", [f"{400 / reads * 1000:,.0f} ms"] * 3, "`fetch` of your store")
    return [
        *lines,
        "",
        f"Assumed: {extraction:g} images per second and GPU; exact search of {amount(search)} of rows per second and "
        f"machine; {amount(memory)} of memory for rows per machine; {reads:g} random reads per second. "
        "Reranking does not grow with the database.",
    ]


def amount(size: float) -> str:
    """Formats bytes, such as 8.2 GB."""
    unit = max(0, min(4, int(math.log10(max(size, 1)) // 3)))
    return f"{size / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


if __name__ == "__main__":
    main()
