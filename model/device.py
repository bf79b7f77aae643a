"""Choose the device of a process, and the settings of the process for that device."""

import ctypes
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from model.errors import InputError

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# Messages of PyTorch, cuDNN and cuBLAS when the memory is full, in addition to the exception types.
_FULL = (
    *("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "ALLOCATION_FAILED"),
    "CUBLAS_STATUS_NOT_INITIALIZED",
)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the device with this name; "auto" is a GPU if there is one, else the CPU.

    Args:
        name: auto, cpu, cuda or cuda:N. "cuda" and "auto" select the GPU of this process.
        local_rank: the number of this process on its machine.

    Raises:
        InputError: if there is no such GPU.
    """
    count = torch.cuda.device_count()
    device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    if device.type == "cuda" and device.index is None and count:
        return torch.device("cuda", local_rank % count)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name}: PyTorch sees {count} GPUs here; choose cpu")
    return device


def prepare_process(device: torch.device) -> None:
    """Changes process-wide settings for extraction on this device; for commands, which own their process.

    On a GPU: TF32 is disabled, and the GPU becomes the current device. On a CPU with glibc: freed memory is kept
    for the next image. By default large blocks are returned to the system, and every new activation costs page
    faults.
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
    """Makes float32 products and convolutions on GPUs use float32, regardless of earlier settings.

    PyTorch 2.9 introduced a second set of these settings, which must not contradict the first.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        cudnn: Any = torch.backends.cudnn  # its stubs do not know `conv`
        cudnn.conv.fp32_precision = "ieee"


def device_name(device: torch.device) -> str:
    """Returns the device in words: its kind, and the model of the GPU or the number of CPU threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception means that the memory of the device is full."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in _FULL)


class PeakMemory:
    """Measures the largest growth of the memory in use during a block, in bytes.

    On a GPU it is the memory that PyTorch allocated there; on Linux without a GPU, the resident memory of the
    process, including pages of files that it read. On other systems it is unknown.

    Attributes:
        bytes: the result, after the block; None if unknown.
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
                ctypes.CDLL(None).malloc_trim(0)  # freed memory that would be reused without being counted
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        if peak is not None and self._before is not None:
            self.bytes = max(0, peak - self._before)


def _resident(field: str) -> int | None:
    """Returns a field of /proc/self/status in bytes, or None if there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
