"""Checks of what callers pass. Written once, here: no backend checks a shape again.

Only metadata is looked at, never data on a device, so that nothing synchronises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32)


def describe(value: object) -> str:
    """``float32 [4, 7]`` for a tensor, the repr for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], dims: str, shape: tuple[int | None, ...]
) -> Tensor:
    """``value`` if it is a tensor of one of ``dtypes`` and of ``shape`` (None matches any size)."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {names} [{dims}], got {describe(value)}")
    if value.shape != shape and not _matches(value.shape, shape):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{dims}] = [{sizes}], got {describe(value)}")
    return value


def _matches(actual: torch.Size, shape: tuple[int | None, ...]) -> bool:
    if len(actual) != len(shape):
        return False
    for want, got in zip(shape, actual, strict=True):  # noqa: SIM110 - a generator costs as much as the op's dispatch
        if want is not None and want != got:
            return False
    return True


def logits(name: str, value: object, dims: str, shape: tuple[int | None, ...]) -> Tensor:
    """Logits: float, at least one column, the vocabulary contiguous; rows may have any stride."""
    checked = tensor(name, value, LOGIT_DTYPES, dims, shape)
    vocab = checked.shape[-1]
    if vocab == 0:
        raise ValueError(f"{name} must have a vocabulary of at least one token, got {describe(checked)}")
    if checked.stride(-1) != 1 and vocab != 1:
        raise ValueError(
            f"{name} must be contiguous along the vocabulary (stride 1), got strides {list(checked.stride())}"
        )
    return checked


def same_device(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Every tensor given is where the first one is."""
    on_cpu = first.is_cpu  # a flag: comparing devices costs a microsecond
    for name, other in others.items():
        if other is None or (on_cpu and other.is_cpu):
            continue
        if other.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {first_name}, got {other.device}")


def integers(name: str, value: object, size: int, dim: str, device: torch.device) -> Tensor:
    """An int64 tensor [size]; an int is repeated."""
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.full((size,), value, dtype=torch.int64, device=device)
    return tensor(name, value, (torch.int64,), dim, (size,)).contiguous()


def temperature(value: object, size: int, dim: str) -> tuple[Tensor | None, float]:
    """A temperature for each of ``size`` requests, as (tensor, 0.0), or one for all, as (None, value)."""
    if isinstance(value, Tensor):
        checked = tensor("temperature", value, (torch.float32,), dim, (size,))
        if checked.is_cpu and not torch.compiler.is_compiling() and not all(map(_is_temperature, checked.tolist())):
            raise ValueError(f"temperature must be finite and not negative, got {checked.tolist()}")
        return checked.contiguous(), 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature must be a float or float32 [{dim}], got {describe(value)}")
    if not _is_temperature(value):
        raise ValueError(f"temperature must be finite and not negative, got {value!r}")
    return None, float(value)


def _is_temperature(value: float) -> bool:
    return math.isfinite(value) and value >= 0
