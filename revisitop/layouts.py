"""Load a dataset from a folder; its layout is recognised from its files. A new layout is a Layout in this list."""

from pathlib import Path
from typing import Any

from model.errors import InputError, short_list
from revisitop.dataset import Dataset
from revisitop.layout_classes import CLASSES
from revisitop.layout_csv import CSV
from revisitop.layout_galleries import GALLERIES
from revisitop.layout_instances import INSTANCES
from revisitop.layout_places import PLACES
from revisitop.layout_revisitop import REVISITOP

LAYOUTS = (REVISITOP, CSV, CLASSES, GALLERIES, PLACES, INSTANCES)


def dataset_folder(data_dir: Path, name: str) -> Path | None:
    """Returns the folder of the dataset in data_dir, or in its data/datasets as in revisitop, or None."""
    folders = (data_dir / name, data_dir / "data" / "datasets" / name)
    return next((folder for layout in LAYOUTS for folder in folders if layout.fits(name, folder)), None)


def load_dataset(name: str, data_dir: Path, **settings: Any) -> Dataset:
    """Reads and checks the ground truth of a dataset; the images themselves are not opened.

    Args:
        settings: settings of layouts, by their names, see Layout; a layout gets those that it has.

    Raises:
        InputError: if the dataset is missing, its folder has no layout or fits several, or its ground truth is unsafe,
            damaged or inconsistent.
    """
    folder = dataset_folder(data_dir, name) or data_dir / name
    layouts = [layout for layout in LAYOUTS if layout.fits(name, folder)]
    if len(layouts) == 1:
        (layout,) = layouts
        return layout.read(name, folder, **{key: settings[key] for key in layout.settings if key in settings})
    forms = "; or ".join(layout.form for layout in layouts or LAYOUTS).replace("NAME", name)
    if layouts:
        raise InputError(f"{folder} has two layouts, remove one of them: {forms}")
    if not folder.is_dir():
        raise InputError(f"no dataset {name}: no folder {folder}")
    seen = sorted(f"{path.name}{'/' * path.is_dir()}" for path in folder.iterdir())
    raise InputError(f"{folder} has none of the layouts: it has {short_list(seen) or 'no files'}; supported is {forms}")
