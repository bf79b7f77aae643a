"""The file of a whitening: its tensors, and its provenance."""

from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoint import is_plain, load_tensors
from model.errors import InputError
from modules.whitening import Whitening


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
