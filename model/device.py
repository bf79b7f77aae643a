"""The device that a process works on, and the settings of the process that it wants."""

import ctypes
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from model.errors import InputError

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the device of that name; "auto" is a GPU if there is one, and the CPU otherwise.

    Args:
        name: auto, cpu, cuda or cuda:N. "cuda" and "auto" are this process's own GPU.
        local_rank: number of this process on its machine.

    Raises:
        InputError: if there is no such GPU.
    """
    count = torch.cuda.device_count()
    device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    if device.type == "cuda" and device.index is None and count:
        return torch.device("cuda", local_rank % count)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name}: PyTorch sees {count} GPUs here", device="cpu")
    return device


def prepare_process(device: torch.device) -> None:
    """Makes settings of the whole process that extraction on this device wants; for commands, which own their process.

    On a GPU: float32 means float32, not TF32, and this GPU is the process's current one. On a CPU with
    glibc: freed memory is kept for the next image. By default large blocks go back to the system, and each
    new activation pays for fresh pages.
    """
    if device.type == "cuda":
        forbid_tf32()
        if device.index is not None:
            torch.cuda.set_device(device)
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def forbid_tf32() -> None:
    """Float32 products and convolutions on GPUs are made in float32, whatever was chosen before.

    PyTorch 2.9 got a second set of these settings, which must not contradict the first.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        cudnn: Any = torch.backends.cudnn  # its stubs do not know `conv`
        cudnn.conv.fp32_precision = "ieee"


def device_name(device: torch.device) -> str:
    """The device in words: its kind and the model of the GPU or the number of CPU threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


class PeakMemory:
    """Measures by how much the memory in use grew at most while a block ran, in bytes.

    On a GPU that is what PyTorch held there; on Linux without one, what the process held, pages of files
    that it read among them. Elsewhere it is not known.

    Attributes:
        bytes: after the block; None where it is not known.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            if platform.libc_ver()[0] == "glibc":
                ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, and would be taken again unseen
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, see proc(5)
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        if peak is not None and self._before is not None:
            self.bytes = max(0, peak - self._before)


def _resident(field: str) -> int | None:
    """Bytes of a field of /proc/self/status; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
