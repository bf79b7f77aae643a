"""The file of a whitening: its tensors, and its provenance."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import is_plain, load_tensors
from model.errors import InputError
from modules.whitening import Whitening


def save_whitening(path: Path, whitening: Whitening, learnt_from: dict[str, Any]) -> None:
    """Saves a whitening and its provenance, which is in JSON types, as a file of tensors, atomically.

    Raises:
        InputError: if the file cannot be written.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:  # given a name, torch.save would write it into the file
            torch.save({**whitening.state_dict(), "learnt_from": learnt_from}, file)
        new.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError if the disk is full
        new.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"cannot write {path} ({reason})") from None


def load_whitening(path: Path) -> tuple[Whitening, dict[str, Any]]:
    """Loads a whitening and its provenance.

    Raises:
        InputError: if the file is missing, damaged, or not a whitening.
    """
    content = load_tensors(path)
    content = content if isinstance(content, dict) else {}
    state = {key: value for key, value in content.items() if isinstance(value, Tensor) and is_plain(value)}
    try:
        whitening = Whitening.from_state(state)
    except ValueError as error:
        raise InputError(f"{path} is not a whitening ({error})") from None
    learnt_from = content.get("learnt_from")
    return whitening, learnt_from if isinstance(learnt_from, dict) else {}
