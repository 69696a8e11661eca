"""Checks of what callers pass. Written once, here: no backend checks a shape again.

Only metadata is looked at, never data on a device, so that nothing synchronises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.contract import MAX_ROWS, MIN_P_OFF, TOP_K_OFF, TOP_P_OFF

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32)


def describe(value: object) -> str:
    """``float32 [4, 7]`` for a tensor, the repr for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def readable(value: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device, and outside of a graph."""
    return value.is_cpu and not torch.compiler.is_compiling()


def within(name: str, value: Tensor, least: int, most: int, expected: str) -> None:
    """Where values can be looked at, they are from ``least`` to ``most``."""
    if readable(value) and ((value < least) | (value > most)).any():
        raise ValueError(f"{name} must be {expected}, got {value.tolist()}")


def one_of(name: str, value: object, names: Collection[str]) -> None:
    """One of the names."""
    if value not in names:
        raise ValueError(f"{name} must be one of {sorted(names)}, got {value!r}")


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
        bounds = f"at least {least}" if end is None else f"in [{least}, {end})"
        raise ValueError(f"{name} must be {bounds}, got {value}")


#: The largest float32; a larger number would be infinite where float32 is all there is.
_MOST = torch.finfo(torch.float32).max

#: More than any vocabulary, and a whole number in float32.
_MOST_TOP_K = 1 << 24

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x <= _MOST, "finite and not negative"),
    "top_k": (lambda x: x >= 0, "at least 1 (or 0: off)"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1] (1: off)"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1] (0: off)"),
    "draft_temperature": (lambda x: 0 <= x <= _MOST, "finite and not negative"),
    "repetition_penalty": (lambda x: math.isfinite(x) and x > 0, "finite and positive (1: off)"),
    "presence_penalty": (math.isfinite, "finite (0: off)"),
    "frequency_penalty": (math.isfinite, "finite (0: off)"),
}


#: Ints that operators take as int64: the least, the end, and both in words. Seeds may be anything, as whatever else is.
_INTEGERS = {
    "seed": (-(1 << 63), 1 << 63, "[-2^63, 2^63)"),
    "position": (0, 1 << 63, "[0, 2^63)"),
    "row": (0, MAX_ROWS, f"[0, {MAX_ROWS})"),
}


def number(name: str, value: object, dim: str) -> float:
    """A sampling parameter for all requests; a tensor ``[dim]`` could stand in its place."""
    in_range, expected = _RANGES[name]
    counts = name == "top_k"
    if isinstance(value, bool) or not isinstance(value, int if counts else (int, float)):
        kinds = "an int or int64" if counts else "a float or float32"
        raise TypeError(f"{name} must be {kinds} [{dim}], got {describe(value)}")
    if not in_range(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return min(value, _MOST_TOP_K) if counts else value


def sampling(temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> tuple[Any, Any, Any, Any]:
    """Sampling parameters as operators take them: a filter that is None is off."""
    return (
        temperature,
        TOP_K_OFF if top_k is None else top_k,
        TOP_P_OFF if top_p is None else top_p,
        MIN_P_OFF if min_p is None else min_p,
    )


def repeated(name: str, value: int, size: int, device: torch.device | None) -> Tensor:
    """An int of all requests as int64 [size]."""
    least, end, expected = _INTEGERS.get(name, _INTEGERS["seed"])
    if not least <= value < end:
        raise ValueError(f"{name} must be in {expected}, got {value}")
    return torch.full((size,), value, dtype=torch.int64, device=device)


def keys(like: object, *values: Any) -> Sequence[Any]:
    """Seed, position and perhaps row as the fast path takes them: of each request, of which ``like`` has one a row."""
    for each in values:
        if type(each) is int and isinstance(like, Tensor) and like.dim():
            named = zip(_INTEGERS, values, strict=False)
            return [repeated(name, x, len(like), like.device) if type(x) is int else x for name, x in named]
    return values


#: In the order of the operators, with what changes nothing.
_SAMPLING = (("temperature", 1.0), ("top_k", TOP_K_OFF), ("top_p", TOP_P_OFF), ("min_p", MIN_P_OFF))


class ArgumentChecker:
    """Checks the arguments of one call: dtypes, sizes by the names of their dimensions, and that all are on one device.

    A size that no argument has had yet may be any, and binds those that follow.
    """

    def __init__(self, first: str, tensor: object, dim: str = "B", **sizes: int) -> None:
        """``tensor``, the argument ``first``, says where all of them are; ``dim`` is the dimension of requests."""
        self._first, self.dim, self.sizes = first, dim, {"3": 3, **sizes}
        self.device = tensor.device if isinstance(tensor, Tensor) else None  # whatever else it is, its check will say
        self._on_cpu = isinstance(tensor, Tensor) and tensor.is_cpu

    def tensor(self, name: str, value: object, dtypes: tuple[torch.dtype, ...], dims: str) -> Tensor:
        """``value`` if it is a tensor of one of ``dtypes`` and of the sizes ``dims``."""
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be {names} [{dims}], got {describe(value)}")
        named, shape = dims.split(", "), value.shape
        known = tuple(map(self.sizes.get, named))
        if known != shape:  # most sizes are known
            if len(known) != len(shape) or any(want not in (None, got) for want, got in zip(known, shape, strict=True)):
                sizes = ", ".join("*" if size is None else str(size) for size in known)
                raise ValueError(f"{name} must have shape [{dims}] = [{sizes}], got {describe(value)}")
            self.sizes.update(zip(named, shape, strict=True))
        if not (self._on_cpu and value.is_cpu):  # flags: comparing devices costs a microsecond
            self.same_device(name, value)
        return value

    def same_device(self, name: str, value: Tensor | None) -> None:
        """It is where the first argument is."""
        if value is not None and value.device != (self.device or value.device):
            raise ValueError(f"{name} must be on {self.device} like {self._first}, got {value.device}")

    def ids(self, name: str, value: object, dims: str) -> Tensor:
        """Whole numbers of either width, contiguous."""
        return self.tensor(name, value, ID_DTYPES, dims).contiguous()

    def optional(self, name: str, value: object, dtypes: tuple[torch.dtype, ...], dims: str) -> Tensor | None:
        """What may be None, contiguous."""
        return None if value is None else self.tensor(name, value, dtypes, dims).contiguous()

    def logits(self, name: str, value: object, dims: str) -> Tensor:
        """Logits: float, at least one column, the vocabulary contiguous; rows may have any stride."""
        checked = self.tensor(name, value, LOGIT_DTYPES, dims)
        if checked.stride(-1) != 1 and checked.shape[-1] > 1:
            strides = list(checked.stride())
            raise ValueError(f"{name} must be contiguous along the vocabulary (stride 1), got strides {strides}")
        if checked.shape[-1] == 0:
            raise ValueError(f"{name} must have a vocabulary of at least one token, got {describe(checked)}")
        return checked

    def integers(self, name: str, value: object) -> Tensor:
        """An int64 a request; an int is repeated."""
        if isinstance(value, int) and not isinstance(value, bool):
            return repeated(name, value, self.sizes[self.dim], self.device)
        return self.tensor(name, value, (torch.int64,), self.dim).contiguous()

    def parameter(self, name: str, value: object) -> float | Tensor:
        """A sampling parameter: one number for all requests, or a tensor with one each."""
        if not isinstance(value, Tensor):
            return number(name, value, self.dim)
        in_range, expected = _RANGES[name]
        checked = self.tensor(name, value, ID_DTYPES if name == "top_k" else (torch.float32,), self.dim)
        if readable(checked) and not all(map(in_range, checked.tolist())):
            raise ValueError(f"{name} must be {expected}, got {checked.tolist()}")
        return checked.clamp(max=_MOST_TOP_K) if name == "top_k" else checked

    def columns(self, values: Sequence[float | Tensor]) -> Tensor:
        """Parameters side by side: float32 [requests, len(values)]."""
        size, kind = (self.sizes[self.dim],), torch.float32
        return torch.stack(
            [
                x.to(kind) if isinstance(x, Tensor) else torch.full(size, x, dtype=kind, device=self.device)
                for x in values
            ],
            1,
        )

    def sampling(self, *parameters: object) -> tuple[Tensor | None, float, int, float, float]:
        """Temperature, top-k, top-p and min-p as operators take them: one float32 [requests, 4], or four scalars."""
        values: list[Any] = [
            value if value is off else self.parameter(name, value)
            for value, (name, off) in zip(parameters, _SAMPLING, strict=True)
        ]
        if any(isinstance(value, Tensor) for value in values):
            return self.columns(values), 1.0, TOP_K_OFF, TOP_P_OFF, MIN_P_OFF
        return None, *values
