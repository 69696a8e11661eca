"""Checks of the tensors that callers pass. Written once, here: no backend checks a shape again.

Only metadata is looked at, never data on a device, so that nothing synchronises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from specdec_kernels.checks import MOST_TOP_K, RANGES, describe, number, whole
from specdec_kernels.contract import MAX_ROWS, MIN_P_OFF, SEEDS, TOP_K_OFF, TOP_P_OFF

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32)


def readable(value: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device, and outside of a graph."""
    return value.is_cpu and not torch.compiler.is_compiling() and not isinstance(value, FakeTensor)


def within(name: str, value: Tensor, least: int, most: int, expected: str) -> None:
    """Where values can be looked at, they are from ``least`` to ``most``."""
    if readable(value) and len(bad := ((value < least) | (value > most)).nonzero()):
        at = bad[0].tolist()
        raise ValueError(f"{name} must be {expected}, got {int(value[tuple(at)])} at {at}")


#: Ints that operators take as int64: the least, and the end. Seeds may be anything, as whatever else is.
_INTEGERS = {"seed": SEEDS, "position": (0, 1 << 63), "row": (0, MAX_ROWS)}


def repeated(name: str, value: int, size: int, device: torch.device | None) -> Tensor:
    """An int of all requests as int64 [size]."""
    whole(name, value, *_INTEGERS.get(name, _INTEGERS["seed"]))
    return torch.full((size,), value, dtype=torch.int64, device=device)


#: In the order of the operators, with what changes nothing.
_SAMPLING = {"temperature": 1.0, "top_k": TOP_K_OFF, "top_p": TOP_P_OFF, "min_p": MIN_P_OFF}


class ArgumentChecker:
    """Checks the arguments of one call: dtypes, sizes by the names of their dimensions, and that all are on one device.

    A size that no argument has had yet may be any, and binds those that follow.
    """

    def __init__(self, first: str, tensor: object, dim: str = "B", **sizes: int) -> None:
        """``tensor``, the argument ``first``, says where all of them are; ``dim`` is the dimension of requests."""
        self._first, self.dim, self.sizes = first, dim, {"3": 3, **sizes}
        self.device = tensor.device if isinstance(tensor, Tensor) else None  # its check will say so
        self._on_cpu = getattr(tensor, "is_cpu", False)

    def tensor(self, name: str, value: object, dtypes: tuple[torch.dtype, ...], dims: str) -> Tensor:
        """``value`` if it is a tensor of one of ``dtypes`` and of the sizes ``dims``."""
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be {names} [{dims}], got {describe(value)}")
        named, shape = dims.split(", "), value.shape
        known = tuple(map(self.sizes.get, named))
        if known != shape:  # most sizes are known
            # By `!=`: a size that torch.compile lets vary is found by no `in`.
            wrong = (want is not None and want != got for want, got in zip(known, shape, strict=False))
            if len(known) != len(shape) or any(wrong):
                sizes = ", ".join("*" if size is None else str(size) for size in known)
                raise ValueError(f"{name} must have shape [{dims}] = [{sizes}], got {describe(value)}")
            self.sizes.update(zip(named, shape, strict=True))
        if not (self._on_cpu and value.is_cpu) and value.device != (self.device or value.device):
            raise ValueError(f"{name} must be on {self.device} like {self._first}, got {value.device}")
        return value

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
        in_range, expected = RANGES[name]
        checked = self.tensor(name, value, ID_DTYPES if name == "top_k" else (torch.float32,), self.dim)
        if readable(checked) and not all(map(in_range, checked.tolist())):
            raise ValueError(f"{name} must be {expected}, got {checked.tolist()}")
        return checked.clamp(max=MOST_TOP_K) if name == "top_k" else checked

    def columns(self, parameters: Mapping[str, object]) -> Tensor:
        """Parameters side by side: float32 [requests, len(parameters)]."""
        size, kind, device = (self.sizes[self.dim],), torch.float32, self.device
        read = [self.parameter(name, value) for name, value in parameters.items()]
        each = [x.to(kind) if isinstance(x, Tensor) else torch.full(size, x, dtype=kind, device=device) for x in read]
        return torch.stack(each, 1)

    def sampling(self, each: Tensor | None, *scalars: object) -> tuple[Any, ...]:
        """Temperature, top-k, top-p and min-p as operators take them: one float32 [requests, 4], or four scalars."""
        if each is not None:
            return each, *scalars
        named = dict(zip(_SAMPLING, scalars, strict=True))
        if any(isinstance(value, Tensor) for value in scalars):
            return self.columns(named), *_SAMPLING.values()
        return None, *(number(name, value, self.dim) for name, value in named.items())


def per_request(
    dim: str, like: object, keys: tuple[Any, ...], temperature: Any, top_k: Any, top_p: Any, min_p: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Seed, position and perhaps row, and sampling parameters, as operators take them at once: ints as tensors, filters
    that are None as off, and parameters side by side if one of them is a tensor. ``like``, the ``draft_tokens [B, K]``
    or ``logits [R, V]``, has a request a row; what is wrong with it, and with numbers, is said later."""
    top_k = TOP_K_OFF if top_k is None else top_k
    top_p = TOP_P_OFF if top_p is None else top_p
    min_p = MIN_P_OFF if min_p is None else min_p
    sampling = None, temperature, top_k, top_p, min_p
    one = type(temperature) is float and not (type(top_k) is Tensor or type(top_p) is Tensor or type(min_p) is Tensor)
    ints = int in map(type, keys)
    if (ints or not one) and isinstance(like, Tensor) and like.dim() == 2:
        size, device = like.shape[0], like.device
        if ints:
            named = zip(_INTEGERS, keys, strict=False)
            keys = tuple([repeated(name, key, size, device) if type(key) is int else key for name, key in named])
        if not one:
            check = ArgumentChecker("draft_tokens" if dim == "B" else "logits", like, dim, **{dim: size})
            sampling = check.sampling(*sampling)
    return keys, sampling
