"""Checks of what callers pass. Written once, here: no backend checks a shape again.

Only metadata is looked at, never data on a device, so that nothing synchronises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec_kernels.contract import MAX_ROWS, MIN_P_OFF, TOP_K_OFF, TOP_P_OFF

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32)
BYTES = torch.uint8


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
    if checked.stride(-1) != 1 and checked.shape[-1] > 1:
        strides = list(checked.stride())
        raise ValueError(f"{name} must be contiguous along the vocabulary (stride 1), got strides {strides}")
    if checked.shape[-1] == 0:
        raise ValueError(f"{name} must have a vocabulary of at least one token, got {describe(checked)}")
    return checked


def draft_tokens(value: object) -> Tensor:
    """The drafts of chains: int64 or int32 [B, K]."""
    checked = tensor("draft_tokens", value, ID_DTYPES, "B, K", (None, None))
    if checked.shape[1] >= MAX_ROWS:
        raise ValueError(f"draft_tokens must have fewer than {MAX_ROWS} drafts, got {describe(checked)}")
    return checked


def draft_temperature(value: object, draft_logits: object, draft_stats: object) -> float | Tensor | None:
    """``draft_temperature`` of a rule that reads ``draft_logits``: there where nothing else says how they were drawn
    from, and nowhere else."""
    if value is None:
        if draft_logits is None or draft_stats is not None:
            return None
        raise ValueError(
            "draft_temperature must be given with draft_logits that come without draft_stats, got None: the drafts' "
            "own temperature cannot be guessed; pass the stats of sample as draft_stats, or draft_temperature= (0 if "
            "greedy)"
        )
    if draft_logits is None:
        raise ValueError("draft_temperature needs the draft_logits that it describes, got draft_logits=None")
    if draft_stats is not None:
        raise ValueError(
            f"draft_temperature must be None with draft_stats, which carry the drafts' own, got {describe(value)}"
        )
    size = draft_logits.shape[0] if isinstance(draft_logits, Tensor) and draft_logits.dim() else 0
    checked = parameter("draft_temperature", value, size, "B")
    return checked.contiguous() if isinstance(checked, Tensor) else float(checked)


def one_or_each(value: object, otherwise: float) -> tuple[Tensor | None, float]:
    """A parameter as operators take it: one a request, or one for all."""
    return (value, otherwise) if isinstance(value, Tensor) else (None, otherwise if value is None else value)  # type: ignore[return-value]


def filters(top_k: Any, top_p: Any, min_p: Any) -> tuple[Any, Any, Any]:
    """Filters as operators take them: what is None is off."""
    return (
        TOP_K_OFF if top_k is None else top_k,
        TOP_P_OFF if top_p is None else top_p,
        MIN_P_OFF if min_p is None else min_p,
    )


class Drafts(NamedTuple):
    """What is known of drafts beside the tokens, and what noise is keyed on: in the order of the operators."""

    logits: Tensor | None
    stats: Tensor | None
    target_to_draft: Tensor | None
    temperatures: Tensor | None
    temperature: float
    seed: Tensor
    position: Tensor


def drafts(
    target_logits: Tensor, batch: int, count: int, dim: str, rows: object, draft_stats: object,
    target_to_draft: Tensor | None, heat: object, seed: object, position: object,
) -> Drafts:  # fmt: skip
    """The same, checked: ``count`` rows a request, as wide as the target's or, with a table of its ids, as the
    drafter's own."""
    width, vocab = ("V", target_logits.shape[-1]) if target_to_draft is None else ("Vd", None)
    checked = None if rows is None else logits("draft_logits", rows, f"B, {dim}, {width}", (batch, count, vocab))
    made = Drafts(
        checked,
        stats(draft_stats, checked, f"B, {dim}, 3", (batch, count, 3)),
        target_to_draft,
        *one_or_each(heat, 1.0),
        integers("seed", seed, batch, "B", target_logits.device),
        integers("position", position, batch, "B", target_logits.device),
    )
    same_device(
        "target_logits", target_logits, draft_logits=checked, draft_stats=made.stats, draft_to_target=target_to_draft,
        draft_temperature=made.temperatures, seed=made.seed, position=made.position,
    )  # fmt: skip
    return made


def stats(value: object, draft_logits: Tensor | None, dims: str, shape: tuple[int, ...]) -> Tensor | None:
    """``draft_stats``, which say nothing without the logits they belong to."""
    if value is None:
        return None
    if draft_logits is None:
        raise ValueError("draft_stats needs the draft_logits that it describes, got draft_logits=None")
    return tensor("draft_stats", value, (torch.float32,), dims, shape).contiguous()


def same_device(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Every tensor given is where the first one is."""
    on_cpu = first.is_cpu  # a flag: comparing devices costs a microsecond
    for name, other in others.items():
        if other is None or (on_cpu and other.is_cpu):
            continue
        if other.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {first_name}, got {other.device}")


def row_offsets(name: str, value: object, batch: int, longest: int, rows: int) -> Tensor:
    """Where the rows of each of ``batch`` requests begin and end: int64 [B+1], 1 to ``longest + 1`` rows each."""
    offsets = tensor(name, value, ID_DTYPES, "B+1", (batch + 1,)).long().contiguous()
    if offsets.is_cpu and not torch.compiler.is_compiling():
        counts = offsets.diff()
        fits = bool(offsets[0] == 0 and offsets[-1] <= rows and (counts >= 1).all() and (counts <= longest + 1).all())
        if not fits:
            raise ValueError(
                f"{name} must ascend from 0 to at most {rows} in steps of 1 to {longest + 1}, got {offsets.tolist()}"
            )
    return offsets


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


def integers(name: str, value: object, size: int, dim: str, device: torch.device) -> Tensor:
    """An int64 tensor [size]; an int is repeated. A seed may be negative, a position of the text is not."""
    if isinstance(value, int) and not isinstance(value, bool):
        least = 0 if name == "position" else -(1 << 63)
        if not least <= value < 1 << 63:
            raise ValueError(f"{name} must be in [{'-2^63' if least else 0}, 2^63), got {value}")
        return torch.full((size,), value, dtype=torch.int64, device=device)
    return tensor(name, value, (torch.int64,), dim, (size,)).contiguous()


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


def parameter(name: str, value: object, size: int, dim: str) -> float | Tensor:
    """A sampling parameter: one number for all of ``size`` requests, or a tensor with one each."""
    in_range, expected = _RANGES[name]
    whole = name == "top_k"
    if isinstance(value, Tensor):
        checked = tensor(name, value, ID_DTYPES if whole else (torch.float32,), dim, (size,))
        if checked.is_cpu and not torch.compiler.is_compiling() and not all(map(in_range, checked.tolist())):
            raise ValueError(f"{name} must be {expected}, got {checked.tolist()}")
        return checked
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        kinds = "an int or int64" if whole else "a float or float32"
        raise TypeError(f"{name} must be {kinds} [{dim}], got {describe(value)}")
    if not in_range(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return value


def _at_most(value: float | Tensor, most: int) -> float | Tensor:
    return value.clamp(max=most) if isinstance(value, Tensor) else min(value, most)


def columns(values: Sequence[float | Tensor], size: int, device: torch.device) -> Tensor:
    """Parameters side by side: float32 [size, len(values)]."""
    return torch.stack(
        [
            value.to(torch.float32)
            if isinstance(value, Tensor)
            else torch.full((size,), float(value), dtype=torch.float32, device=device)
            for value in values
        ],
        1,
    )


def sampling(
    size: int, dim: str, device: torch.device, temperature: object, top_k: object, top_p: object, min_p: object
) -> tuple[Tensor | None, float, int, float, float]:
    """The sampling parameters as the operators take them: one float32 [size, 4], or None and four scalars."""
    values = (
        parameter("temperature", temperature, size, dim),
        TOP_K_OFF if top_k is None else _at_most(parameter("top_k", top_k, size, dim), _MOST_TOP_K),
        TOP_P_OFF if top_p is None else parameter("top_p", top_p, size, dim),
        MIN_P_OFF if min_p is None else parameter("min_p", min_p, size, dim),
    )
    for value in values:
        if isinstance(value, Tensor):
            return columns(values, size, device), 1.0, TOP_K_OFF, TOP_P_OFF, MIN_P_OFF
    return None, *values  # type: ignore[return-value]
