"""Python numbers as tensors: always with a dtype and a device of their own, whatever PyTorch's defaults are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CPU = torch.device("cpu")


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or lists of equally many of them, as a tensor on a device, copied without synchronising."""
    tensor = torch.tensor(values, dtype=dtype, device=CPU)
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def padded(
    rows: Sequence[Sequence[Any]], value: float, dtype: torch.dtype = torch.int64, device: torch.device = CPU
) -> Tensor:
    """[B, longest]: rows of different lengths, ``value`` behind each."""
    longest = max(map(len, rows), default=0)
    filled = [[*row, *[value] * (longest - len(row))] for row in rows]
    return to_device(filled, dtype, device).reshape(len(rows), longest)


def longer(x: Tensor, length: int, value: float) -> Tensor:
    """``x [B, K, ...]`` with ``value`` behind its K."""
    return functional.pad(x, (*[0, 0] * (x.dim() - 2), 0, length - x.shape[1]), value=value)
