"""Decoders that take the column of a cache for the position of a token, told which positions there are.

BART, Marian, Pegasus and Whisper number rows from the length of the cache on; T5 measures distances between columns.
With holes between a request's columns, and rows of trees side by side, both would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor, nn

from specdec_kernels.decode.mixing import Mixin, mix_in


class Positions(NamedTuple):
    """Of one pass: of its rows [B, R], and of all columns that they look at [B, S]."""

    rows: Tensor
    columns: Tensor


#: Of the pass that this thread makes; None where modules do what they did.
_told: ContextVar[Positions | None] = ContextVar("positions", default=None)


@contextmanager
def told(positions: Positions) -> Iterator[None]:
    """Tell the modules of a decoder the positions of a pass."""
    before = _told.set(positions)
    try:
        yield
    finally:
        _told.reset(before)


class _Embeddings(Mixin):
    """Embeddings of positions."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """As of the module, but [B, R, H] of the positions that it was told."""
        look_up: Any = super().forward  # type: ignore[misc]
        if (positions := _told.get()) is None:
            rows: Tensor = look_up(*arguments, **named)
            return rows
        rows = look_up(*arguments, **{**named, "position_ids": positions.rows.flatten()})
        return rows.reshape(*positions.rows.shape, -1)


class _Bias(Mixin):
    """Attention with a bias that depends on distances between tokens."""

    def compute_bias(self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0) -> Tensor:
        """As of the module, but [B, heads, R, S] by the positions that it was told."""
        bias: Any = super().compute_bias  # type: ignore[misc]
        if (positions := _told.get()) is None:
            by_column: Tensor = bias(query_length, key_length, device=device, past_seen_tokens=past_seen_tokens)
            return by_column
        last = key_length - 1  # no two tokens are further apart; a row there has all distances
        table = bias(1, key_length, device=device, past_seen_tokens=last)[0, :, 0]
        distances = positions.rows[..., None] - positions.columns[:, None]
        by_position: Tensor = table[:, last - distances.clamp(0, last)].transpose(0, 1)
        return by_position


def listen_for_positions(decoder: nn.Module) -> None:
    """Have the modules of a decoder that take columns for positions do what they are told, where they are."""
    for module in decoder.modules():
        if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias"):
            mix_in(_Bias, module)
        elif isinstance(module, nn.Embedding) and "position_ids" in signature(module.forward).parameters:
            mix_in(_Embeddings, module)
