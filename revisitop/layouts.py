"""Load a dataset from a folder; its layout, one of three, is recognised from its files."""

from pathlib import Path

from model.errors import InputError
from revisitop.dataset import Dataset
from revisitop.layout_classes import class_folders, read_classes
from revisitop.layout_csv import read_csv_dataset, solution_file
from revisitop.layout_revisitop import read_ground_truth

LAYOUTS = (
    "a file gnd_NAME.pkl and images in jpg/ (revisitop's), or index.csv, queries.csv and solution.csv (GLDv2's), "
    "or a folder of images for each class"
)


def dataset_folder(data_dir: Path, name: str) -> Path | None:
    """Returns the folder of the dataset in data_dir, or in its data/datasets as in revisitop, or None."""
    folders = (data_dir / name, data_dir / "data" / "datasets" / name)
    for folder in folders:
        if (folder / f"gnd_{name}.pkl").is_file():
            return folder
    return next((folder for folder in folders if solution_file(folder) or class_folders(folder)), None)


def load_dataset(name: str, data_dir: Path) -> Dataset:
    """Reads and checks the ground truth of a dataset; the images themselves are not opened.

    Raises:
        InputError: if the dataset is missing, or its ground truth is unsafe, damaged or inconsistent.
    """
    folder = dataset_folder(data_dir, name)
    if folder is None:
        there = (
            f"{data_dir / name} has none of the supported layouts"
            if (data_dir / name).is_dir()
            else f"no {data_dir / name}"
        )
        raise InputError(f"no dataset {name}: {there}: {LAYOUTS.replace('NAME', name)}")
    pickled = folder / f"gnd_{name}.pkl"
    if not pickled.is_file():
        return read_csv_dataset(name, folder) if solution_file(folder) else read_classes(name, folder)
    if solution := solution_file(folder):
        raise InputError(f"{folder} has both {pickled.name} and {solution.name}; remove one of them")
    return read_ground_truth(name, pickled)
