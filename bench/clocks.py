"""How calls are timed: on a GPU in CUDA graphs over buffers that do not fit its cache; without one by the wall clock,
for tests of what is around the timing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from specdec_kernels.selftest.gpu import launches

X = TypeVar("X")

#: Between two uses of a buffer so many times the cache is read. A graph has at least so many calls.
CACHES, LEAST_CALLS, MOST_BUFFERS = 3, 16, 2048
#: Times a graph is replayed, and that PyTorch is called: fewer, but at least so many, where that takes so many seconds.
REPLAYS, CALLS, LEAST_TIMES, SECONDS = 50, 20, 5, 1.0
#: Calls that the host makes without waiting; less than a stream takes before it makes the host wait.
HOST_CALLS = 100


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    ordered = sorted(seconds)
    return {f"p{p}": 1e6 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (20, 50, 80)}


def waits(call: Callable[[], object]) -> int:
    """How often the host waits for the GPU in a call."""
    if not torch.cuda.is_available():
        call()
        return 0
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    # That the mode itself "does not yet detect all synchronizing operations" is a warning too.
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


class GraphClock:
    """Events of a GPU."""

    device = "cuda"

    def replayed(self, call: Callable[[X], Any], buffers: Sequence[X]) -> list[float]:
        """Seconds a call, from one graph with a call on every buffer."""
        calls = list(buffers) * -(-LEAST_CALLS // len(buffers))
        call(buffers[0])  # compiled
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in calls:
                call(x)
        graph.replay()
        return [seconds / len(calls) for seconds in self.events(graph.replay, REPLAYS)]

    def called(self, call: Callable[[X], Any], buffers: Sequence[X]) -> list[float]:
        """Seconds a call, launched as PyTorch launches."""
        for _ in range(3):
            call(buffers[-1])
        rotation = iter(list(buffers) * -(-CALLS // len(buffers)))
        return self.events(lambda: call(next(rotation)), CALLS)

    def host(self, call: Callable[[X], Any], x: X) -> float:
        """Seconds that the host needs for a call, the GPU not waited for."""
        call(x)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call(x)
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        return seconds / HOST_CALLS

    @staticmethod
    def events(call: Callable[[], object], count: int) -> list[float]:
        """Seconds of each of ``count`` calls, on the device."""
        seconds: list[float] = []
        while len(seconds) < count and (len(seconds) < LEAST_TIMES or sum(seconds) < SECONDS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return seconds

    def launches(self, call: Callable[[], object]) -> tuple[int, int]:
        """Kernels of a call, and its memsets and copies, from the profiler."""
        kernels, others = launches(call)
        return len(kernels), len(others)

    @property
    def cache(self) -> int:
        """Bytes of the last cache."""
        size: int = torch.cuda.get_device_properties(0).L2_cache_size
        return size

    def copy_bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        to = torch.empty_like(source)
        seconds = sorted(self.events(lambda: to.copy_(source), REPLAYS))
        return 2 * source.numel() / seconds[len(seconds) // 2]


class WallClock:
    """Where there is no GPU: for tests of what is around the timing."""

    device = "cpu"
    cache = 1 << 10

    def called(self, call: Callable[[X], Any], buffers: Sequence[X]) -> list[float]:
        """Seconds a call."""
        seconds = []
        for x in buffers[:1]:
            start = time.perf_counter()
            call(x)
            seconds.append(time.perf_counter() - start)
        return seconds

    replayed = called

    def host(self, call: Callable[[X], Any], x: X) -> float:
        """The same of one."""
        return self.called(call, [x])[0]

    def launches(self, call: Callable[[], object]) -> tuple[int, int]:
        """None to count."""
        call()
        return 0, 0

    def copy_bandwidth(self) -> float:
        """Not measured."""
        return float("nan")


Clock = GraphClock | WallClock
