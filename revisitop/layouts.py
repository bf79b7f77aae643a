"""Load a dataset from a folder; its layout is recognised from its files. A new layout is a Layout in this list."""

from pathlib import Path
from typing import Any

from extraction.folder import entries_of
from model.errors import InputError, short_list
from revisitop.dataset import Dataset
from revisitop.layout_classes import CLASSES, GALLERIES, NO_CLASSES, OBJECTS, subfolders
from revisitop.layout_csv import CSV
from revisitop.layout_places import PLACES
from revisitop.layout_revisitop import REVISITOP

LAYOUTS = (REVISITOP, CSV, CLASSES, GALLERIES, PLACES, OBJECTS)


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
        raise InputError(
            f"{folder} has two layouts, remove one of them: {'; or '.join(layout.files for layout in layouts)}"
        )
    if not folder.is_dir():
        raise InputError(f"no dataset {name}: no folder {folder}")
    files = short_list([f"{path.name}{'/' * path.is_dir()}" for path in entries_of(folder)]) or "no files"
    likely = _likely_mistake(folder) or f"it needs {'; or '.join(layout.files for layout in LAYOUTS)}"
    raise InputError(f"{folder} has none of the layouts in docs/datasets.md, but {files}: {likely}")


def _likely_mistake(folder: Path) -> str:
    """Returns what probably keeps a folder from having a layout; "" if nothing is likely."""
    folders = subfolders(folder)
    parts = [path.name for path in folders if path.name.lower() in NO_CLASSES]
    capital = [name for name in parts if name != name.lower()]
    datasets = [path.name for path in folders if any(layout.fits(path) for layout in LAYOUTS)]
    truths = [path.name for path in entries_of(folder) if path.name.startswith("gnd") and path.suffix == ".pkl"]
    if truths:
        return f"rename {truths[0]} to gnd_{folder.name}.pkl"
    if capital:
        return f"rename {', '.join(f'{name}/ to {name.lower()}/' for name in capital)}: such names are in small letters"
    if datasets:
        return f"take {' or '.join(datasets[:3])} as the dataset, and {folder} as the folder of the datasets"
    if len(parts) == 1 and len(folders) > 2:
        return f"rename {parts[0]}/ if it is a class"
    if len(folders) == 1 and not parts:
        return f"with {folders[0].name}/ as its only class, no image is negative"
    return ""
