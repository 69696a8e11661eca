"""Checks of what callers pass, tensors apart, whose checks are `ops/validate.py`'s: errors name the argument, what was
expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import index
from reprlib import repr as shortened
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def describe(value: object) -> str:
    """``float32 [4, 7]`` for a tensor, the repr for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def choice(name: str, value: str, choices: Mapping[Any, T]) -> T:
    """What one of the names stands for."""
    if value not in list(choices):  # of anything, hashable or not
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}")
    return choices[value]


def flags(**named: object) -> None:
    """Each True or False."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {describe(value)}")


def whole(name: str, value: object, least: int | None = None, end: int | None = None, expected: str = "an int") -> None:
    """An int, from ``least`` on and below ``end`` where they are given; ``expected`` is what may stand in its place."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    if (least is not None and value < least) or (end is not None and value >= end):
        bounds = f"at least {least}" if end is None else f"in [{least}, {end})".replace(str(1 << 63), "2^63")
        raise ValueError(f"{name} must be {bounds}, got {value}")


def real(name: str, value: object) -> None:
    """An int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {describe(value)}")


#: The largest float32 and the smallest normal one: larger values overflow to inf, smaller ones may be flushed to 0.
MOST, LEAST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny

#: More than any vocabulary, and a whole number in float32.
MOST_TOP_K = 1 << 24

RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x <= MOST, "finite and not negative"),
    "top_k": (lambda x: x >= 0, "at least 1 (or 0: off)"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1] (1: off)"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1] (0: off)"),
    "draft_temperature": (lambda x: 0 <= x <= MOST, "finite and not negative"),
    "repetition_penalty": (lambda x: LEAST <= x <= MOST, "finite and positive (1: off)"),
    "presence_penalty": (lambda x: abs(x) <= MOST, "finite (0: off)"),
    "frequency_penalty": (lambda x: abs(x) <= MOST, "finite (0: off)"),
}


def number(name: str, value: object, dim: str) -> float:
    """A sampling parameter for all requests; a tensor ``[dim]`` could stand in its place."""
    in_range, expected = RANGES[name]
    counts = name == "top_k"
    if isinstance(value, bool) or not isinstance(value, int if counts else (int, float)):
        kinds = "an int or int64" if counts else "a float or float32"
        raise TypeError(f"{name} must be {kinds} [{dim}], got {describe(value)}")
    if not in_range(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return min(value, MOST_TOP_K) if counts else float(value)


def listed(name: str, value: Any, what: str) -> list[Any]:
    """What can be gone over, as a list."""
    try:
        items = iter(value)
    except TypeError:
        raise TypeError(f"{name} must be a list of {what}, got {shortened(value)}") from None
    return list(items)  # whose own errors are the caller's


def ids_of(name: str, value: Any, end: int = 1 << 63, what: str = "token ids") -> list[int]:
    """Numbers in [0, end) as a list of ints.

    Raises:
        TypeError, ValueError: naming what was expected and what came.
    """
    try:
        ids = [index(token) for token in (value.tolist() if isinstance(value, Tensor) else value)]
    except TypeError:
        raise TypeError(f"{name} must be a list of {what}, got {shortened(value)}") from None
    for place, token in enumerate(ids):
        if not 0 <= token < end:
            raise ValueError(f"{name} must hold {what} in [0, {end}), got {token} at index {place}")
    return ids
