"""Penalties and logit bias, as callers give them and as the operators take them.

The operators take *logit adjustments*: for each request the ids that any of its rows may touch, ascending, with how
often each occurs in the prompt and in the output so far, and its bias. Row r adds the r drafts before it. So nothing of
the size of the vocabulary is ever written, and no backend counts a text again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specdec_kernels.contract import MAX_ROWS
from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import function
from specdec_kernels.ops.draft_vocabulary import of_rows
from specdec_kernels.ops.fast_path import find_fast_path
from specdec_kernels.ops.token_counts import TokenCounts, count_tokens, insert_ids, unique_ids


@dataclass(frozen=True)
class Penalties:
    """Penalties on tokens that occurred: repetition, then frequency and presence, on float32 logits before temperature.

    ``logit = logit / repetition_penalty if logit > 0 else logit * repetition_penalty`` for tokens of prompt and output;
    ``logit -= frequency_penalty * count + presence_penalty`` for tokens of the output, where the drafts before a
    row count as output.

    The texts come either as ``prompt`` and ``output``, which are counted in every call, or as ``counts``, which a loop
    keeps from step to step; what is None is empty.

    Source: Keskar et al., arXiv:1909.05858 (repetition); OpenAI's API (presence, frequency).
    """

    prompt: Tensor | None = None
    """int64 or int32 [B, Lp], -1 where there is none."""
    output: Tensor | None = None
    """int64 or int32 [B, Lo], the tokens generated so far, -1 where there is none."""
    repetition_penalty: Tensor | float = 1.0
    """float32 [B] or float, positive; 1 is off."""
    presence_penalty: Tensor | float = 0.0
    """float32 [B] or float; 0 is off."""
    frequency_penalty: Tensor | float = 0.0
    """float32 [B] or float; 0 is off."""
    counts: TokenCounts | None = None
    """Of B requests and the vocabulary of the logits."""


class LogitBias(NamedTuple):
    """What is added to the logits of a few tokens, before the penalties."""

    tokens: Tensor
    """int64 or int32 [B, M], -1 where there is none."""
    values: Tensor
    """float32 [B, M]; biases of the same token add up."""


Adjustments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_ADJUSTMENTS: Adjustments = (None, None, None, None)


def _texts(name: str, value: object, size: int, dim: str, vocab: int) -> Tensor:
    """Token ids int32 [size, *] with everything that is none moved to ``vocab``."""
    ids = validate.tensor(name, value, validate.ID_DTYPES, f"{dim}, *", (size, None))
    if ids.is_cpu and not torch.compiler.is_compiling() and ((ids < -1) | (ids >= vocab)).any():
        raise ValueError(f"{name} must be -1 or in [0, {vocab}), got {ids.tolist()}")
    return _ids_or_none(ids, vocab)


def _ids_or_none(ids: Tensor, vocab: int) -> Tensor:
    return ids.masked_fill((ids < 0) | (ids > vocab), vocab).int()


def _counted(penalties: Penalties, logits: Tensor, size: int, dim: str) -> tuple[Tensor, Tensor]:
    """The ids of prompt and output, int32 [size, M], ascending, and how often each occurs there, int32 [size, M, 2]."""
    vocab, held = logits.shape[-1], penalties.counts
    texts = [
        logits.new_empty((size, 0), dtype=torch.int32)
        if (text := getattr(penalties, name)) is None
        else _texts(f"penalties.{name}", text, size, dim, vocab)
        for name in ("prompt", "output")
    ]
    validate.same_device("logits", logits, prompt=texts[0], output=texts[1])
    if held is None:
        ids = unique_ids(torch.cat(texts, 1), vocab)
        counts = torch.zeros((*ids.shape, 2), dtype=torch.int32, device=ids.device)
        for column, text in enumerate(texts):
            count_tokens(ids, counts, column, text, vocab)
        return ids, counts
    if not isinstance(held, TokenCounts):
        raise TypeError(f"penalties.counts must be TokenCounts, got {validate.describe(held)}")
    if penalties.prompt is not None or penalties.output is not None:
        raise ValueError("penalties must have either counts, or prompt and output, got both")
    if (len(held), held.vocab_size) != (size, vocab):
        raise ValueError(
            f"penalties.counts must be of {dim} = {size} requests and V = {vocab} ids, got {len(held)} and "
            f"{held.vocab_size}"
        )
    validate.same_device("logits", logits, counts=held.ids)
    return held.ids, held.counts


def adjustments(
    penalties: Penalties | None,
    bias: LogitBias | None,
    draft_tokens: Tensor | None,
    logits: Tensor,
    size: int,
    dim: str,
) -> Adjustments:
    """(ids int32 [B, M], counts int32 [B, M, 2] in prompt and output, bias float32 [B, M], penalties float32 [B, 3]).

    ``ids`` ascend, those behind the last hold the size of the vocabulary."""
    if penalties is None and bias is None:
        return NO_ADJUSTMENTS
    vocab, device = logits.shape[-1], logits.device
    ids = biased = drafted = torch.empty((size, 0), dtype=torch.int32, device=device)
    counts = torch.empty((size, 0, 2), dtype=torch.int32, device=device)
    values = torch.empty((size, 0), dtype=torch.float32, device=device)
    strengths: tuple[float | Tensor, ...] = (1.0, 0.0, 0.0)
    if penalties is not None:
        if not isinstance(penalties, Penalties):
            raise TypeError(f"penalties must be Penalties, got {validate.describe(penalties)}")
        ids, counts = _counted(penalties, logits, size, dim)
        strengths = tuple(
            validate.parameter(name, getattr(penalties, name), size, dim)
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
        )
        if draft_tokens is not None:
            drafted = _ids_or_none(draft_tokens, vocab)
    if bias is not None:
        if not isinstance(bias, tuple) or len(bias) != 2:
            raise TypeError(f"logit_bias must be LogitBias, got {validate.describe(bias)}")
        biased = _texts("logit_bias[0]", bias[0], size, dim, vocab)
        values = validate.tensor("logit_bias[1]", bias[1], (torch.float32,), f"{dim}, M", tuple(biased.shape))
    validate.same_device("logits", logits, logit_bias=biased)
    end = torch.full((size, 1), vocab, dtype=torch.int32, device=device)
    ids, counts = insert_ids(ids, counts, torch.cat([biased, drafted, end], 1), vocab)
    added = torch.zeros(ids.shape, dtype=torch.float32, device=device)
    added.scatter_add_(1, torch.searchsorted(ids, biased), values)
    return ids, counts, added, validate.columns(strengths, size, device)


def bitmask(value: object, logits: Tensor, rows_name: str = "K+1") -> Tensor | None:
    """A mask of allowed tokens, one bit each, for every row of ``logits [R, V]`` or ``[B, rows, V]``."""
    if value is None:
        return None
    *rows, vocab = logits.shape
    dims = f"B, {rows_name}, ceil(V/32)" if len(rows) == 2 else "R, ceil(V/32)"
    return validate.tensor("bitmask", value, (torch.int32,), dims, (*rows, -(-vocab // 32))).contiguous()


def draw(
    op: str, logits: object, draft_to_target: object, seed: object, position: object, row: object,
    temperature: object, top_k: object, top_p: object, min_p: object, mask: object, penalties: Penalties | None,
    bias: LogitBias | None, backend: str | None, *own: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What an operator that draws from rows ``logits [R, V]``, with a table ``[R, Vd]``, gives; ``own`` are its
    arguments behind those that all of them have."""
    target_to_draft = of_rows(draft_to_target, logits)
    if penalties is None and bias is None and (call := find_fast_path(backend, logits)) is not None:
        if type(row) is int and 0 <= row < MAX_ROWS and type(seed) is Tensor:
            row = torch.full_like(seed, row)
        made: tuple[Tensor, ...] | None = getattr(call, op)(
            logits, target_to_draft, seed, position, row, None, temperature, *validate.filters(top_k, top_p, min_p),
            mask, *NO_ADJUSTMENTS, *own,
        )  # fmt: skip
        if made is not None:
            return made
    rows = validate.logits("logits", logits, "R, V" if target_to_draft is None else "R, Vd", (None, None))
    # Whose width is the target's; nothing else of it is looked at.
    wide = rows if target_to_draft is None else rows[:, :1].expand(-1, len(target_to_draft))
    count, device = rows.shape[0], rows.device
    checked = isinstance(row, int)
    if checked and not 0 <= row < MAX_ROWS:  # type: ignore[operator]
        raise ValueError(f"row must be in [0, {MAX_ROWS}), got {row}")
    keys = tuple(
        validate.integers(name, value, count, "R", device)
        for name, value in (("seed", seed), ("position", position), ("row", row))
    )
    places = keys[2]
    readable = places.is_cpu and not torch.compiler.is_compiling()
    if not checked and readable and ((places < 0) | (places >= MAX_ROWS)).any():
        raise ValueError(f"row must be in [0, {MAX_ROWS}), got {places.tolist()}")
    sampling, *scalars = validate.sampling(count, "R", device, temperature, top_k, top_p, min_p)
    allowed = bitmask(mask, wide)
    changes = adjustments(penalties, bias, None, wide, count, "R")
    validate.same_device(
        "logits", rows, draft_to_target=target_to_draft, seed=keys[0], position=keys[1], row=keys[2],
        sampling=sampling, bitmask=allowed,
    )  # fmt: skip
    drawn: tuple[Tensor, ...] = function(op, backend, device)(
        rows, target_to_draft, *keys, sampling, *scalars, allowed, *changes, *own
    )
    return drawn
