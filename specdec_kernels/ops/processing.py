"""Penalties and logit bias, as callers give them and as the operators take them.

The operators take *edits*: for each request the ids that any of its rows may touch, ascending, with how often each
occurs in the prompt and in the output so far, and its bias. Row r adds the r drafts before it. So nothing of the size
of the vocabulary is ever written, and no backend counts a text again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec_kernels.contract import MAX_ROWS
from specdec_kernels.ops import validate


@dataclass(frozen=True)
class Penalties:
    """Penalties on tokens that occurred: repetition, then frequency and presence, on float32 logits before temperature.

    ``logit = logit / repetition if logit > 0 else logit * repetition`` for tokens of prompt and output;
    ``logit -= frequency * count + presence`` for tokens of the output, where the drafts before a row count as output.

    Source: Keskar et al., arXiv:1909.05858 (repetition); OpenAI's API (presence, frequency).
    """

    prompt: Tensor
    """int64 or int32 [B, Lp], -1 where there is none."""
    output: Tensor
    """int64 or int32 [B, Lo], the tokens generated so far, -1 where there is none."""
    repetition: Tensor | float = 1.0
    """float32 [B] or float, positive; 1 is off."""
    presence: Tensor | float = 0.0
    """float32 [B] or float; 0 is off."""
    frequency: Tensor | float = 0.0
    """float32 [B] or float; 0 is off."""


class LogitBias(NamedTuple):
    """What is added to the logits of a few tokens, before the penalties."""

    tokens: Tensor
    """int64 or int32 [B, M], -1 where there is none."""
    values: Tensor
    """float32 [B, M]; biases of the same token add up."""


Edits = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_EDITS: Edits = (None, None, None, None)


def _texts(name: str, value: object, size: int, dim: str, vocab: int) -> Tensor:
    """Token ids [size, *] with everything that is none moved to ``vocab``."""
    ids = validate.tensor(name, value, validate.ID_DTYPES, f"{dim}, *", (size, None)).long()
    if ids.is_cpu and not torch.compiler.is_compiling() and ((ids < -1) | (ids >= vocab)).any():
        raise ValueError(f"{name} must be -1 or in [0, {vocab}), got {ids.tolist()}")
    return ids.masked_fill((ids < 0) | (ids > vocab), vocab)


def edits(
    penalties: Penalties | None,
    bias: LogitBias | None,
    draft_tokens: Tensor | None,
    logits: Tensor,
    size: int,
    dim: str,
) -> Edits:
    """(ids int32 [B, M], counts int32 [B, M, 2] in prompt and output, bias float32 [B, M], penalties float32 [B, 3]).

    ``ids`` ascend, those behind the last hold the size of the vocabulary.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if penalties is None and bias is None:
        return NO_EDITS
    vocab, device = logits.shape[-1], logits.device
    nothing = torch.empty((size, 0), dtype=torch.int64, device=device)
    prompt = output = biased = drafted = nothing
    values = nothing.float()
    strengths: tuple[float | Tensor, ...] = (1.0, 0.0, 0.0)
    if penalties is not None:
        if not isinstance(penalties, Penalties):
            raise TypeError(f"penalties must be Penalties, got {validate.describe(penalties)}")
        prompt = _texts("penalties.prompt", penalties.prompt, size, dim, vocab)
        output = _texts("penalties.output", penalties.output, size, dim, vocab)
        strengths = tuple(
            validate.parameter(name, getattr(penalties, name), size, dim)
            for name in ("repetition", "presence", "frequency")
        )
        if draft_tokens is not None:
            drafted = draft_tokens.long()
            drafted = drafted.masked_fill((drafted < 0) | (drafted > vocab), vocab)
    if bias is not None:
        if not isinstance(bias, tuple) or len(bias) != 2:
            raise TypeError(f"logit_bias must be LogitBias, got {validate.describe(bias)}")
        biased = _texts("logit_bias[0]", bias[0], size, dim, vocab)
        values = validate.tensor("logit_bias[1]", bias[1], (torch.float32,), f"{dim}, M", tuple(biased.shape))
    validate.same_device("logits", logits, prompt=prompt, output=output, logit_bias=biased)
    end = torch.full((size, 1), vocab, dtype=torch.int64, device=device)
    ids = torch.cat([prompt, output, biased, drafted, end], 1).sort(1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    ids = ids.masked_fill(again, vocab).sort(1).values
    counts = torch.zeros((size, ids.shape[1], 2), dtype=torch.int32, device=device)
    for column, text in enumerate((prompt, output)):
        counts[..., column].scatter_add_(1, torch.searchsorted(ids, text), torch.ones_like(text, dtype=torch.int32))
    added = torch.zeros(ids.shape, dtype=torch.float32, device=device)
    added.scatter_add_(1, torch.searchsorted(ids, biased), values)
    return ids.int(), counts, added, validate.columns(strengths, size, device)


def bitmask(value: object, logits: Tensor, rows_name: str = "K+1") -> Tensor | None:
    """A mask of allowed tokens, one bit each, for every row of ``logits [R, V]`` or ``[B, rows, V]``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if value is None:
        return None
    *rows, vocab = logits.shape
    dims = f"B, {rows_name}, ceil(V/32)" if len(rows) == 2 else "R, ceil(V/32)"
    return validate.tensor("bitmask", value, (torch.int32,), dims, (*rows, -(-vocab // 32))).contiguous()


def row_arguments(
    logits: object,
    seed: object,
    position: object,
    row: object,
    temperature: object,
    top_k: object,
    top_p: object,
    min_p: object,
    mask: object,
    penalties: Penalties | None,
    bias: LogitBias | None,
) -> tuple[Any, ...]:
    """What a draw from rows ``logits [R, V]`` takes, checked and in the operators' order.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    rows = validate.logits("logits", logits, "R, V", (None, None))
    count, device = rows.shape[0], rows.device
    if isinstance(row, int) and not 0 <= row < MAX_ROWS:
        raise ValueError(f"row must be in [0, {MAX_ROWS}), got {row}")
    keys = tuple(
        validate.integers(name, value, count, "R", device)
        for name, value in (("seed", seed), ("position", position), ("row", row))
    )
    sampling, *scalars = validate.sampling(count, "R", device, temperature, top_k, top_p, min_p)
    allowed = bitmask(mask, rows)
    changes = edits(penalties, bias, None, rows, count, "R")
    validate.same_device(
        "logits", rows, seed=keys[0], position=keys[1], row=keys[2], sampling=sampling, bitmask=allowed
    )
    return rows, *keys, sampling, *scalars, allowed, *changes
