"""List or delete the descriptors in TEST.OUT_DIR/descriptors, with their provenance and size.

python -m tools.cache
python -m tools.cache --delete toy-3f2a9c0d1e4b
python -m tools.cache --delete all

Each recipe and list of images has a folder of its own, which all commands reuse.
"""

import shutil
import sys
from datetime import datetime
from pathlib import Path

from extraction.cache import Kept, kept_descriptors

from config import ADVICE, CommandLine
from extraction.owner import owned
from model.errors import InputError, printable, run_command, short_list


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, ("TEST.OUT_DIR",), "python -m tools.cache")
    line.add("--delete", action="append", metavar="NAME", help="delete this folder (several: repeat), or all")
    args, cfg, _ = line.parse(argv)
    root = Path(cfg.TEST.OUT_DIR) / "descriptors"
    kept = kept_descriptors(root)
    if args.delete:
        delete(chosen(kept, args.delete, root))
        return
    for each in kept:
        print("\n".join(in_words(each)))
    size = sum(each.size for each in kept)
    print(f"{len(kept)} folders of descriptors in {root}, {megabytes(size)}")


def chosen(kept: list[Kept], names: list[str], root: Path) -> list[Kept]:
    """Returns the folders with these names, or all. Raises InputError if a name does not exist."""
    if names == ["all"]:
        return kept
    by_name = {each.folder.name: each for each in kept}
    if unknown := [name for name in names if name not in by_name]:
        there = f"there are {short_list([*by_name])}" if by_name else "it is empty"
        raise InputError(f"--delete {unknown[0]}: no such folder in {root}; {there}")
    return [by_name[name] for name in dict.fromkeys(names)]


def delete(kept: list[Kept]) -> None:
    for each in kept:
        with owned(each.folder):  # waits for a run that uses it
            shutil.rmtree(each.folder)
        print(f"deleted {each.folder}, {megabytes(each.size)}")


def in_words(kept: Kept) -> list[str]:
    """Returns a line with name, size and date, and one with the provenance."""
    written = datetime.fromtimestamp(kept.used).isoformat(" ", "minutes")
    state = "" if kept.complete else ", not complete"
    facts = {key: f"{value}"[:12] if key.endswith("sha256") else value for key, value in kept.made_from.items()}
    facts.pop("images", None)
    made_from = ", ".join(f"{key} {'off' if value is None else value}" for key, value in facts.items())
    return [
        printable(f"{kept.folder.name}  {megabytes(kept.size)}, written {written}{state}"),
        printable(f"    {made_from or 'unknown provenance'}"),
    ]


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    run_command(main, ADVICE)
