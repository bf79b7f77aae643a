"""Time contenders in turn, in one process with the same settings: medians, ranges, ratios and peak memory."""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.device import PeakMemory

# Seconds to wait before a run, until the threads of the previous one sleep.
_REST = 0.2


@dataclass
class Timing:
    """The seconds of each run of a contender, its result, and the MB that a run needs beyond what was in use before."""

    seconds: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    value: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(
    contenders: dict[str, Callable[[], Any]], device: torch.device, repeat: int = 5, at_least: float = 0.5
) -> dict[str, Timing]:
    """Times each contender `repeat` times, in turn, after a warm-up.

    Args:
        contenders: the functions to time, by name.
        device: the device that they use, which is waited for and whose memory is measured.
        repeat: number of measurements of each.
        at_least: shortest measurement in seconds: shorter runs are repeated and averaged.
    """
    timings = {name: Timing(value=run()) for name, run in contenders.items()}
    for _ in range(repeat):
        for name, run in contenders.items():
            time.sleep(min(_REST, at_least))
            timings[name].seconds.append(timed(run, device, at_least))
    for name, run in contenders.items():
        with PeakMemory(device) as peak:
            run()
        timings[name].megabytes = (peak.bytes or 0) / 2**20
    return timings


def timed(run: Callable[[], Any], device: torch.device, at_least: float = 0) -> float:
    """Returns the mean seconds of a run, which is repeated until `at_least` seconds have passed."""
    runs, start = 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < at_least:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        runs += 1
    return (time.perf_counter() - start) / runs


def report(timings: dict[str, Timing], baseline: str, unit: str, quantity: Callable[[float], float]) -> None:
    """Prints a line per contender: median and range of a quantity computed from the seconds, ratio, memory."""
    for name, timing in timings.items():
        low, high = sorted(quantity(seconds) for seconds in (min(timing.seconds), max(timing.seconds)))
        print(
            f"{name:<24}{quantity(timing.median):10.3f} {unit} ({low:.3f} to {high:.3f})"
            f"{timings[baseline].median / timing.median:8.2f} x{timing.megabytes:9.0f} MB",
            flush=True,
        )


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """Returns the FLOP per second of a product of two large square matrices, the best of several."""
    a = torch.rand(side, side, device=device).to(dtype)
    return 2 * side**3 / min(timed(lambda: a @ a, device) for _ in range(6))


def machine(device: torch.device) -> str:
    """Returns the machine and date of the measurements."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        where = f"{torch.get_num_threads()} threads, {names[0] if names else platform.processor()}"
    return f"{where}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def positive(text: str) -> int:
    """Parses a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
