"""The device that a process works on, and the settings of the process that it wants."""

import ctypes
import platform

import torch

from model.errors import InputError

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the device of that name; "auto" is this process's GPU if there is one, and the CPU otherwise.

    Raises:
        InputError: if there is no such GPU.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device(f"cuda:{local_rank % count}" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name}: PyTorch sees {count} GPUs here", device="cpu")
    return device


def prepare_process(device: torch.device) -> None:
    """Makes settings of the whole process that extraction on this device wants; for commands, which own their process.

    On a GPU: float32 means float32, not TF32. On a CPU with glibc: freed memory is kept for the next
    image. By default large blocks go back to the system, and each new activation pays for fresh pages.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def device_name(device: torch.device) -> str:
    """The device in words: its kind and the model of the GPU or the number of CPU threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
