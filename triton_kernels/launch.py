"""How kernels are launched: a pure function of the shape and the platform."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from specdec_kernels.contract import TILE


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles a block, and warps a program."""

    tiles: int
    warps: int


def launch_config(vocab: int, platform: str) -> LaunchConfig:
    """The launch for ``platform``: "cuda", "hip" or "interpreter".

    A thread loads 16 bytes of bfloat16 at a time. 32 tiles over 16 warps is what spills on none of sm_80, sm_90 and
    sm_100 (over 8 and 4 warps one kernel does, ptxas of CUDA 12.9), 16 over 8 what does not on gfx942. The
    interpreter takes 0.1 ms an operation whatever its size, so there a block is a whole row.
    """
    tiles, warps = {"cuda": (32, 16), "hip": (16, 8), "interpreter": (1024, 1)}[platform]
    return LaunchConfig(min(tiles, triton.next_power_of_2(triton.cdiv(vocab, TILE))), warps)


def config_for(logits: Tensor) -> LaunchConfig:
    """The launch for these logits."""
    platform = "interpreter" if logits.device.type == "cpu" else "hip" if torch.version.hip else "cuda"
    return launch_config(logits.shape[-1], platform)
