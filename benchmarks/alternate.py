"""Time contenders in turn, each in a process of its own: medians, ranges, and peak memory."""

import argparse
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Seconds to wait before a run, until the threads of the previous one sleep.
_REST = 0.5
# Shortest measurement in seconds: shorter runs are repeated and averaged.
_AT_LEAST = 1.5


@dataclass
class Timing:
    """The results of one contender: seconds of each run, peak memory in MB, and the result of the last run.

    Memory is the anonymous memory of the process (without the page cache), or the memory of the GPU if a run
    used one: `megabytes` in total, `more` beyond the memory in use before the first run.
    """

    seconds: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    more: float = 0.0
    value: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(contenders: dict[str, Callable[[], Callable[[], Any]]], repeat: int) -> dict[Hashable, Timing]:
    """Times each contender `repeat` times, in turn, after a warm-up.

    Args:
        contenders: per name, a picklable function that is called once in a new process and returns the
            function to time, whose result must be picklable and contain no tensors.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    for name, prepare in contenders.items():
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=_serve, args=(prepare, other), daemon=True))
        processes[-1].start()
        other.close()
    timings = {name: Timing() for name in contenders}
    for name in contenders:  # one after another, so that the preparation does not disturb a run
        pipes[name].send("prepare")
        pipes[name].recv()
    for _ in range(repeat):
        for name, timing in timings.items():
            time.sleep(_REST)
            pipes[name].send("run")
            timing.seconds.append(pipes[name].recv())
    for name, process in zip(contenders, processes, strict=True):
        pipes[name].send("end")
        timings[name].value, timings[name].megabytes, timings[name].more = pipes[name].recv()
        process.join()
    return timings


def report(timings: dict[str, Timing], baseline: str, unit: str, quantity: Callable[[float], float]) -> None:
    """Prints a line per contender: median and range of a quantity computed from the seconds, ratio, memory."""
    for name, timing in timings.items():
        low, high = sorted(quantity(seconds) for seconds in (min(timing.seconds), max(timing.seconds)))
        print(
            f"{name:<12}{quantity(timing.median):10.3f} {unit} ({low:.3f} to {high:.3f})"
            f"{timings[baseline].median / timing.median:8.2f} x"
            f"{timing.megabytes:9.0f} MB, {timing.more:.0f} of them for the run"
        )


def measure(run: Callable[[], Any], repeat: int = 3, at_least: float = 0.5) -> Timing:
    """Times a function in this process, after a warm-up; it must wait for the device itself.

    Args:
        run: the function.
        repeat: number of measurements, whose median is used.
        at_least: shortest measurement in seconds, see timed.
    """
    before = memory()
    run()
    timing = Timing([timed(run, at_least) for _ in range(repeat)])
    with PeakMemory() as peak:  # a separate run, because watching the memory takes time of a core
        timing.value = run()
    timing.megabytes, timing.more = peak.megabytes, peak.megabytes - before
    return timing


def timed(run: Callable[[], Any], at_least: float) -> float:
    """Returns the mean seconds of a run, which is repeated until `at_least` seconds have passed."""
    runs, start = 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < at_least:
        run()
        runs += 1
    return (time.perf_counter() - start) / runs


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


def _serve(prepare: Callable[[], Callable[[], Any]], pipe: Connection) -> None:
    pipe.recv()
    run = prepare()
    before = memory()
    run()
    pipe.send(None)
    while pipe.recv() == "run":
        pipe.send(timed(run, _AT_LEAST))
    with PeakMemory() as peak:  # a separate run, because watching the memory takes time of a core
        value = run()
    pipe.send((value, peak.megabytes, peak.megabytes - before))


class PeakMemory:
    """Measures the peak memory of a block in MB, see Timing; on a CPU it is sampled every 10 ms."""

    def __enter__(self) -> "PeakMemory":
        self.megabytes, self._stop = memory(), threading.Event()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._watcher.join()
        if torch.cuda.is_initialized():
            self.megabytes = torch.cuda.max_memory_allocated() / 2**20

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.megabytes = max(self.megabytes, memory())


def memory() -> float:
    """Returns the MB in use now, see Timing; 0 if unknown."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def positive(text: str) -> int:
    """Parses a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """Returns the FLOP per second of a product of two large square matrices, the best of several."""
    a = torch.rand(side, side, device=device).to(dtype)
    return 2 * side**3 / best_seconds(lambda: a @ a, device)


def best_seconds(run: Callable[[], Any], device: torch.device, times: int = 6) -> float:
    """Returns the seconds of the fastest of several runs, including the work of the device."""

    def whole() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    whole()
    return min(timed(whole, 0) for _ in range(times))
