"""How kernels are launched: pure functions of the shape and the platform."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from specdec_kernels.contract import TILE

#: Programs that one multiprocessor should have to choose from. What more there are finds rows decided.
PROGRAMS_A_PROCESSOR = 4
#: Whose GPUs kernels are compiled for; :mod:`.compile` sets it.
PLATFORM = "hip" if torch.version.hip else "cuda"
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

    @property
    def constants(self) -> dict[str, int]:
        """What is compiled into a kernel that measures rows."""
        return {"ENTRIES": self.entries, "TILES": self.tiles}

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes beside the arguments of the kernel."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


def entries(vocab: int) -> int:
    """Of the table of a row."""
    count: int = triton.next_power_of_2(triton.cdiv(vocab, TILE))
    return count


def launch_config(vocab: int, platform: str, large: bool) -> LaunchConfig:
    """The launch for ``platform``: "cuda", "hip" or "interpreter"; ``large``: of a kernel that takes all registers.

    A thread loads 16 bytes of bfloat16 at a time. 16 tiles over 8 warps spill nowhere, provided that ptxas (CUDA 12.9)
    is told how many registers it may use: left to itself it spilled a kilobyte of the large kernels. The others do with
    128, so that a multiprocessor runs two programs at a time. The interpreter takes 0.1 ms an operation whatever its
    size, so there a block is a whole row.
    """
    limit = 255 if large else 128
    tiles, warps, registers = {"cuda": (16, 8, limit), "hip": (16, 8, None), "interpreter": (1024, 1, None)}[platform]
    return LaunchConfig(min(tiles, entries(vocab)), entries(vocab), warps, registers)


def config_for(logits: Tensor, *processing: Tensor | None, large: bool = False) -> LaunchConfig:
    """The launch for these logits; ``large`` are the kernels for trees and for the block rule, and all where there is
    any ``processing`` of the logits."""
    platform = "interpreter" if logits.device.type == "cpu" else PLATFORM
    return launch_config(logits.shape[-1], platform, large or any(x is not None for x in processing))


def processors_of(device: torch.device) -> int:
    """Multiprocessors; the interpreter counts for one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else _ABSENT_PROCESSORS


def slices(rows: int, blocks: int, processors: int) -> int:
    """Programs that measure one of ``rows`` rows together, each some of its ``blocks``: as many as it takes to keep
    every multiprocessor busy. The results do not depend on it."""
    wanted: int = triton.next_power_of_2(triton.cdiv(PROGRAMS_A_PROCESSOR * processors, rows))
    return min(wanted, blocks)


def slices_of(rows: int, config: LaunchConfig, device: torch.device) -> int:
    """The same on a device; the interpreter runs one program after the other."""
    if device.type == "cpu":
        return 1
    return slices(rows, triton.cdiv(config.entries, config.tiles), processors_of(device))


def scratch_in(workspace: Tensor, counters: int, memory: int, tables: int) -> tuple[Tensor, Tensor, Tensor]:
    """(int32, float64 and float32 scratch) of so many elements in what was handed in: the counters at its begin, all
    else at its end, so that calls of different sizes never write over each other's counters, which have to be 0."""
    end = workspace.shape[0] // 16 * 16
    middle = end - 4 * tables
    return (
        workspace[: 4 * counters].view(torch.int32),
        workspace[middle - 8 * memory : middle].view(torch.float64),
        workspace[middle:end].view(torch.float32),
    )


_COUNTERS: dict[tuple[int, int], Tensor] = {}


def counters_at_rest(count: int, device: torch.device) -> Tensor:
    """int32 counters that are 0; who uses them leaves them so, which saves a launch. Calls on one stream follow each
    other and share them; a graph may be replayed beside anything, so each has its own."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    place = stream.device_index, stream.stream_id
    if place not in _COUNTERS or _COUNTERS[place].numel() < count:
        _COUNTERS[place] = torch.zeros(triton.next_power_of_2(count), dtype=torch.int32, device=device)
    return _COUNTERS[place]
