"""Time what a call on a GPU takes the host, without one: the launch is replaced, and all before it is as it is.

Of ``cuda`` a library stands in for the CUDA runtime, of ``triton`` a driver for Triton's.

Times are of the thread's own processor time, so that others on the machine matter little.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from specdec_kernels.bench.machine import machine, save

#: The environment in which both stand-ins can be had: kernels are compiled, not interpreted.
STAND_IN = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
    "SPECDEC_EMULATE_CUDA": "1",
    "SPECDEC_EMULATED_PROCESSORS": "132",
    "OMP_NUM_THREADS": "1",
}
BATCH, DRAFTS, VOCAB = 8, 4, 151_936
#: Calls in a row whose mean counts once, and how often.
CALLS, TIMES = 100, 40


class _Utilities:
    """Of a GPU with the shared memory of an H100."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024


Launched = Callable[..., None]


def stand_in_driver(launcher: Callable[[Any, Any], Launched]) -> None:
    """Kernels are compiled for an H100. Of the source and metadata of each, ``launcher`` makes what is called in place
    of launches, with what Triton hands its own."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:
        utils = _Utilities()
        launcher_cls = staticmethod(launcher)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())


def _idle(*_: Any) -> None:
    """In place of a launch."""


def stand_in_triton(launcher: Callable[[Any, Any], Launched]) -> None:
    """Backend "triton" takes tensors on a CPU, with that driver."""
    stand_in_driver(launcher)
    from specdec_kernels import triton_kernels
    from specdec_kernels.ops import backends

    functions = {op: getattr(triton_kernels, op) for op in backends.OPS}
    made = backends.BACKENDS["triton"] = backends.Backend("triton", "cpu", "", "a stand-in for a GPU", functions)
    backends._FAST["triton", False] = backends.connected(made)


def _stand_in(backend: str) -> None:
    """Make ``backend`` take tensors on a CPU, and launch nothing."""
    from specdec_kernels.ops import backends

    if backend == "triton":
        stand_in_triton(lambda *_: _idle)
        return
    backends.BACKENDS["cuda"].require(torch.device("cpu"))
    library = ctypes.CDLL(str(backends.BACKENDS["cuda"].library))
    library.specdec_emulate(None, ctypes.c_bool(False), ctypes.c_bool(True))


def _calls(backend: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls that are timed, by name."""
    from specdec_kernels import sample, verify_chain, verify_chain_workspace, verify_tree

    target = torch.zeros(BATCH, DRAFTS + 1, VOCAB, dtype=torch.bfloat16)
    draft, stats = target[:, :DRAFTS].contiguous(), torch.zeros(BATCH, DRAFTS, 3)
    tokens, keys = torch.zeros(BATCH, DRAFTS, dtype=torch.int64), torch.arange(BATCH)
    parents, row = torch.arange(-1, DRAFTS).repeat(BATCH, 1), target[:, 0]
    nodes = torch.zeros_like(parents)
    size = verify_chain_workspace(BATCH, DRAFTS, VOCAB)
    memory = torch.zeros(size + 256, dtype=torch.uint8)
    workspace = memory[-memory.data_ptr() % 256 :][:size]
    common: dict[str, Any] = {"seed": keys, "position": keys, "temperature": 0.7, "backend": backend}
    yield "verify_chain", lambda: verify_chain(target, tokens, draft, stats, **common)
    yield "verify_chain, workspace", lambda: verify_chain(target, tokens, draft, stats, workspace=workspace, **common)
    yield "verify_chain, ints as seeds", lambda: verify_chain(target, tokens, draft, stats, **(common | {"seed": 1}))
    yield "verify_tree, point masses", lambda: verify_tree(target, nodes, parents, **common)
    yield "sample", lambda: sample(row, row=keys, **common)


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of a call: the least mean of some in a row, and the median of such."""
    for _ in range(CALLS):
        call()
    means = []
    for _ in range(TIMES):
        start = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        means.append((time.thread_time_ns() - start) / CALLS / 1e3)
    return {"least": min(means), "median": median(means)}


def times(backend: str) -> list[dict[str, Any]]:
    """In a process of its own, since stand-ins stay."""
    code = f"from specdec_kernels.bench import host; host.show({backend!r})"
    done = subprocess.run([sys.executable, "-c", code], env=STAND_IN, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()]
        raise RuntimeError(f"the stand-in for {backend} failed: {said[-1]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def show(backend: str) -> None:
    """Print the times as JSON."""
    torch.set_num_threads(1)
    _stand_in(backend)
    print(json.dumps([{"backend": backend, "call": name, **timed(call)} for name, call in _calls(backend)]))


def main(out: Path | None, console: Console) -> None:
    """Both backends."""
    rows = [row for backend in ("cuda", "triton") for row in times(backend)]
    table = Table("backend", "call", "least us", "median us", title="What a call takes the host, its launch replaced")
    for row in rows:
        table.add_row(row["backend"], row["call"], f"{row['least']:.1f}", f"{row['median']:.1f}")
    console.print(table)
    save(out, "host", machine(), results=rows)
