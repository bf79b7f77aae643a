"""Contenders timed in turn, each in a process of its own: medians, spread, and peak memory."""

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

# Seconds before a run, until the threads of the one before have gone to sleep.
_REST = 0.5
# Seconds that a measurement takes: shorter runs are repeated, and their mean is taken.
_AT_LEAST = 1.5


@dataclass
class Timing:
    """Of one contender: seconds of each run, the most memory at any moment in MB, what the last run gave.

    Memory is the process's anonymous memory (so without the page cache), or the GPU's where a run used one:
    `megabytes` in all, `more` beyond what stood there before the first run.
    """

    seconds: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    more: float = 0.0
    value: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(contenders: dict[str, Callable[[], Callable[[], Any]]], repeat: int) -> dict[Hashable, Timing]:
    """Times each contender `repeat` times, in turn, after a warm-up of each.

    Args:
        contenders: per name, what is called once in a new process (it must be picklable) and gives
            the function to be timed, which gives something picklable without tensors.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    for name, prepare in contenders.items():
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=_serve, args=(prepare, other), daemon=True))
        processes[-1].start()
        other.close()
    timings = {name: Timing() for name in contenders}
    for name in contenders:  # one after another, so that no preparation disturbs a run
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
    """A line per contender: median and range of a quantity (of the seconds), ratio to the baseline, memory."""
    for name, timing in timings.items():
        low, high = sorted(quantity(seconds) for seconds in (min(timing.seconds), max(timing.seconds)))
        print(
            f"{name:<12}{quantity(timing.median):10.3f} {unit} ({low:.3f} to {high:.3f})"
            f"{timings[baseline].median / timing.median:8.2f} x"
            f"{timing.megabytes:9.0f} MB, {timing.more:.0f} of it for the run"
        )


def measure(run: Callable[[], Any], repeat: int = 3, at_least: float = 0.5) -> Timing:
    """Times a function in this process, after a warm-up; it must wait for the device itself.

    Args:
        run: the function.
        repeat: measurements, of which the median counts.
        at_least: seconds that a measurement takes, see timed.
    """
    before = memory()
    run()
    timing = Timing([timed(run, at_least) for _ in range(repeat)])
    with PeakMemory() as peak:  # a run of its own: looking at the memory takes a core's time
        timing.value = run()
    timing.megabytes, timing.more = peak.megabytes, peak.megabytes - before
    return timing


def timed(run: Callable[[], Any], at_least: float) -> float:
    """Returns the mean seconds of a run; it is repeated until so many seconds have passed, and run once at least."""
    runs, start = 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < at_least:
        run()
        runs += 1
    return (time.perf_counter() - start) / runs


def machine(device: torch.device) -> str:
    """What the figures were made on."""
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
    with PeakMemory() as peak:  # a run of its own: looking at the memory takes a core's time
        value = run()
    pipe.send((value, peak.megabytes, peak.megabytes - before))


class PeakMemory:
    """The most memory in MB at any moment within a block, see Timing; looked at every 10 ms on a CPU."""

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
    """MB in use now, see Timing; 0 where the system does not tell."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def positive(text: str) -> int:
    """A whole number above 0, of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """FLOP per second of a product of two large square matrices, the best of several."""
    a = torch.rand(side, side, device=device).to(dtype)
    return 2 * side**3 / best_seconds(lambda: a @ a, device)


def best_seconds(run: Callable[[], Any], device: torch.device, times: int = 6) -> float:
    """Returns the seconds of the fastest of several runs, until the device has done them."""

    def whole() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    whole()
    return min(timed(whole, 0) for _ in range(times))
