"""How kernels are launched: with what, a pure function of the shape and the platform; their scratch; and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from specdec_kernels.workspace import entries, power_of_two

try:
    from specdec_kernels._native import launch_key
except ImportError:  # another Python

    def launch_key(*arguments: object) -> bytes | None:
        """Nothing is known of the arguments."""
        return None


#: Programs that one multiprocessor should have to choose from. What more there are finds rows decided.
PROGRAMS_A_PROCESSOR = 4
#: Whose GPUs kernels are compiled for; what compiles for others sets it.
PLATFORM = "hip" if torch.version.hip else "cuda"
INTERPRETED = bool(triton.knobs.runtime.interpret)
#: Multiprocessors of the GPU that tensors on "meta" stand for: an H100.
_ABSENT_PROCESSORS = 132


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles a block, entries of a row's table, warps a program, and registers a thread where the assembler has to be
    told."""

    tiles: int
    entries: int
    warps: int
    registers: int | None = None

    @cached_property
    def named(self) -> dict[str, int]:
        """What a launch of a kernel that measures rows takes by name: constants of the kernel, then options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"ENTRIES": self.entries, "TILES": self.tiles, "num_warps": self.warps, **limit}


@cache
def launch_config(vocab: int, platform: str, tiles: int, large: bool) -> LaunchConfig:
    """The launch for ``platform``: "cuda", "hip" or "interpreter"; ``tiles`` of a block, at most; ``large``: of a
    kernel that takes all registers.

    ptxas (CUDA 12.9) is told how many there are: left to itself it spilled a kilobyte of the large kernels. The others
    do with 128, so that a multiprocessor runs two programs at a time. The interpreter takes 0.1 ms an operation
    whatever its size, so there a block is a whole row.
    """
    registers = {"cuda": 255 if large else 128}.get(platform)
    tiles, warps = (1024, 1) if platform == "interpreter" else (tiles, 8)
    return LaunchConfig(min(tiles, entries(vocab)), entries(vocab), warps, registers)


def config_for(
    vocab: int, device: torch.device, *processing: Tensor | None, large: bool = False, race: bool = False
) -> LaunchConfig:
    """The launch for rows of ``vocab`` ids; ``large`` are the kernels for trees (by Triton 3.8 and 3.9 a walk spills
    with 128 registers), and all where there is any ``processing`` of the logits; ``race``: rows are measured with the
    race of all ids.

    A thread of 8 warps has 32 ids of a block of 64 tiles, so that what a block costs beside its ids is little, and asks
    for those of the next one before it sums them: 16 KB of bfloat16 a program. Of what takes more registers for an id
    it has fewer.
    """
    processed = any(x is not None for x in processing)
    tiles = 16 if processed else 32 if race else 64
    return launch_config(vocab, _platform_of(device), tiles, large or processed)


def _platform_of(device: torch.device) -> str:
    return "interpreter" if INTERPRETED and device.type == "cpu" else PLATFORM


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors; the interpreter counts for one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if _platform_of(device) == "interpreter" else _ABSENT_PROCESSORS


class Multiprocessor(NamedTuple):
    """What a program may have of one: bytes of shared memory, and Hopper's products of 64 rows by four warps."""

    shared: int
    warpgroups: bool


@cache
def _of_gpu(index: int) -> Multiprocessor:
    target, properties = driver.active.get_current_target(), driver.active.utils.get_device_properties(index)
    return Multiprocessor(properties["max_shared_mem"], (target.backend, target.arch) == ("cuda", 90))


def multiprocessor_of(device: torch.device) -> Multiprocessor:
    """That of a device; of none, that of the GPU which kernels are compiled for."""
    if device.type == "cuda":
        return _of_gpu(device.index)
    if PLATFORM == "hip":
        return Multiprocessor(65_536, False)
    interpreted = _platform_of(device) == "interpreter"
    return Multiprocessor(232_448, interpreted or driver.active.get_current_target().arch == 90)


@cache
def slices(rows: int, blocks: int, processors: int) -> int:
    """Programs that measure one of ``rows`` rows together, each some of its ``blocks``: as many as it takes to keep
    every multiprocessor busy. The results do not depend on it."""
    return min(power_of_two(-(-PROGRAMS_A_PROCESSOR * processors // rows)), blocks)


def slices_of(rows: int, config: LaunchConfig, device: torch.device) -> int:
    """The same on a device."""
    return slices(rows, -(-config.entries // config.tiles), processors_of(device))


def empty(like: Tensor, *kinds: tuple[torch.dtype, tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Results of these dtypes and shapes."""
    return tuple(like.new_empty(shape, dtype=dtype) for dtype, shape in kinds)


def scratch_in(workspace: Tensor, _counters: int, memory: int, tables: int) -> tuple[Tensor, Tensor, Tensor]:
    """(int32, float64 and float32 scratch) of so many elements in what was handed in: the counters at its begin, all
    else at its end, so that calls of different sizes never write over each other's counters, which have to be 0."""
    rest = workspace.shape[0] % 16
    whole = workspace[:-rest] if rest else workspace
    words = whole.view(torch.float32)
    first = words.shape[0] - tables
    return whole.view(torch.int32), whole.view(torch.float64)[first // 2 - memory :], words[first:]


#: By device and stream: how many elements there are, and where.
_SCRATCH: dict[tuple[int | None, int], tuple[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]]] = {}


def scratch(device: torch.device, counters: int, memory: int, tables: int) -> tuple[Tensor, Tensor, Tensor]:
    """(int32, float64 and float32 scratch) of at least so many elements. The int32 are counters that are 0; who uses
    them leaves them so, which saves a launch. Calls on one stream follow each other and share what they need; a graph
    may be replayed beside anything, so each of its calls has its own, and so has one that is interpreted, which an
    exception may end in the middle of a kernel."""
    kind = device.type  # which makes a string
    if INTERPRETED or kind == "meta" or (kind == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _new_scratch(device, counters, memory, tables)
    slot = device.index, driver.active.get_current_stream(device.index)
    (some, more, most), cached = _SCRATCH.get(slot, ((-1, -1, -1), None))
    if cached is None or counters > some or memory > more or tables > most:
        sizes = max(counters, some), max(memory, more), max(tables, most)
        cached = _new_scratch(device, *sizes)
        _SCRATCH[slot] = sizes, cached
    return cached


def _new_scratch(device: torch.device, counters: int, memory: int, tables: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(counters, dtype=torch.int32, device=device),
        torch.empty(memory, dtype=torch.float64, device=device),
        torch.empty(tables, dtype=torch.float32, device=device),
    )


#: By kernel: compiled kernels with their constants, by all that Triton compiles a kernel apart for.
_COMPILED: dict[int, dict[Any, tuple[Any, tuple[Any, ...]]]] = {}


def launch(kernel: JITFunction[Any], programs: int, *arguments: Any, **constants: Any) -> None:
    """``kernel[(programs,)](*arguments, **constants)``, where the constants are the last parameters of the kernel.

    Triton looks at each argument anew in every launch, which takes a kernel of 45 arguments as long as all else of the
    call. C++ looks here (csrc/native/fast_path.cpp), more closely than Triton, so that what is found was compiled for
    such arguments. Not for AMD's GPUs, where it also matters how much memory a tensor lies in.
    """
    key = None if INTERPRETED or PLATFORM != "cuda" else launch_key(*arguments)
    if key is None:
        kernel[(programs,)](*arguments, **constants)
        return
    of_kernel = _COMPILED.setdefault(id(kernel), {})
    slot = driver.active.get_current_device(), key, *constants.values()
    found = of_kernel.get(slot)
    if found is None:
        names = kernel.arg_names[len(arguments) :]
        of_kernel[slot] = kernel[(programs,)](*arguments, **constants), tuple(constants[name] for name in names)
        return
    compiled, last = found
    compiled[(programs, 1, 1)](*arguments, *last)
