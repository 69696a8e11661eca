"""How kernels are launched: a pure function of the shape and the platform."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from specdec_kernels.contract import TILE


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles a block, warps a program, and registers a thread where the assembler has to be told."""

    tiles: int
    warps: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes beside the arguments of the kernel."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


def launch_config(vocab: int, platform: str) -> LaunchConfig:
    """The launch for ``platform``: "cuda", "hip" or "interpreter".

    A thread loads 16 bytes of bfloat16 at a time. 16 tiles over 8 warps spill nowhere, provided that ptxas (CUDA 12.9)
    is told that it may use every register: left to itself it takes half of them and spills a kilobyte. The interpreter
    takes 0.1 ms an operation whatever its size, so there a block is a whole row.
    """
    tiles, warps, registers = {"cuda": (16, 8, 255), "hip": (16, 8, None), "interpreter": (1024, 1, None)}[platform]
    return LaunchConfig(min(tiles, triton.next_power_of_2(triton.cdiv(vocab, TILE))), warps, registers)


def config_for(logits: Tensor) -> LaunchConfig:
    """The launch for these logits."""
    platform = "interpreter" if logits.device.type == "cpu" else "hip" if torch.version.hip else "cuda"
    return launch_config(logits.shape[-1], platform)
