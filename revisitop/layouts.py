"""Load a dataset from a folder; its layout is recognised from its files. A new layout is a Layout in this list."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extraction.folder import entries_of
from model.errors import InputError, short_list
from revisitop.dataset import Dataset
from revisitop.layout_classes import CLASSES, subfolders
from revisitop.layout_csv import CSV
from revisitop.layout_galleries import GALLERIES
from revisitop.layout_instances import INSTANCES
from revisitop.layout_places import PLACES
from revisitop.layout_revisitop import REVISITOP

LAYOUTS = (REVISITOP, CSV, CLASSES, GALLERIES, PLACES, INSTANCES)


def dataset_folder(data_dir: Path, name: str) -> Path | None:
    """Returns the folder of the dataset in data_dir, or in its data/datasets as in revisitop, or None."""
    folders = (data_dir / name, data_dir / "data" / "datasets" / name)
    return next((folder for layout in LAYOUTS for folder in folders if layout.fits(folder)), None)


def load_dataset(name: str, data_dir: Path, **settings: Any) -> Dataset:
    """Reads and checks the ground truth of a dataset; the images themselves are not opened.

    Args:
        settings: settings of layouts, by their names, see Layout; a layout gets those that it has.

    Raises:
        InputError: if the dataset is missing, its folder has no layout or fits several, or its ground truth is unsafe,
            damaged or inconsistent.
    """
    folder = dataset_folder(data_dir, name) or data_dir / name
    layouts = [layout for layout in LAYOUTS if layout.fits(folder)]
    if len(layouts) == 1:
        (layout,) = layouts
        return layout.read(name, folder, **{key: settings[key] for key in layout.settings if key in settings})
    if layouts:
        forms = "; or ".join(f"{layout.title} ({', '.join(layout.parts)})" for layout in layouts)
        raise InputError(f"{folder} has two layouts, remove one of them: {forms}")
    if not folder.is_dir():
        raise InputError(f"no dataset {name}: no folder {folder}")
    files = short_list([f"{path.name}{'/' * path.is_dir()}" for path in entries_of(folder)]) or "no files"
    raise InputError(
        f"{folder} has none of the six layouts in docs/datasets.md: it has {files}{'; '.join(['', *_advice(folder)])}"
    )


def _advice(folder: Path) -> Iterator[str]:
    """Yields the layouts of which a folder has most, with what it lacks, and its subfolders that are datasets."""
    missing = [layout.missing(folder) for layout in LAYOUTS]
    shares = [len(parts) / len(layout.parts) for layout, parts in zip(LAYOUTS, missing, strict=True)]
    nearest = [
        f"{layout.title}, which needs {' and '.join(parts)}"
        for layout, parts, share in zip(LAYOUTS, missing, shares, strict=True)
        if share == min(shares) < 1
    ]
    if nearest:
        yield f"nearest is {'; or '.join(nearest)}"
    if datasets := [path.name for path in subfolders(folder) if any(layout.fits(path) for layout in LAYOUTS)]:
        yield f"datasets themselves are {short_list(datasets)}"
