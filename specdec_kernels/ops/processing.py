"""Penalties and logit bias, as callers give them and as the operators take them.

The operators take *logit adjustments*: for each request the ids that any of its rows may touch, ascending, with how
often each occurs in the prompt and in the output so far, and its bias. Row r adds the r drafts before it. So nothing of
the size of the vocabulary is ever written, and no backend counts a text again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec_kernels.contract import MAX_ROWS
from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import function
from specdec_kernels.ops.draft_vocabulary import of_rows
from specdec_kernels.ops.fast_path import find_fast_path
from specdec_kernels.ops.token_counts import TokenCounts, add_tokens, none_counted
from specdec_kernels.ops.validate import ArgumentChecker


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


#: Of logits that nothing adjusts.
NO_ADJUSTMENTS = (None, None, None, None)


def _ids_or_none(ids: Tensor, vocab: int) -> Tensor:
    """Ids as int32, with everything that is none moved to the size of the vocabulary."""
    return ids.masked_fill((ids < 0) | (ids > vocab), vocab).int()


def _text(check: ArgumentChecker, name: str, value: object, length: str) -> Tensor:
    """Ids of callers in that form, ``[B, length]``."""
    vocab = check.sizes["V"]
    ids = check.ids(name, value, f"{check.dim}, {length}")
    validate.within(name, ids, -1, vocab - 1, f"-1 or in [0, {vocab})")
    return _ids_or_none(ids, vocab)


def _counted(check: ArgumentChecker, penalties: Penalties) -> tuple[Tensor, Tensor]:
    """The ids of prompt and output, int32 [B, M], ascending, and how often each occurs there, int32 [B, M, 2]."""
    size, vocab, kept = check.sizes[check.dim], check.sizes["V"], penalties.counts
    if kept is None:
        counted = none_counted(size, check.device)
        for column, (name, length) in enumerate((("prompt", "Lp"), ("output", "Lo"))):
            if (text := getattr(penalties, name)) is not None:
                counted = add_tokens(*counted, _text(check, f"penalties.{name}", text, length), vocab, column)
        return counted
    if not isinstance(kept, TokenCounts):
        raise TypeError(f"penalties.counts must be TokenCounts, got {validate.describe(kept)}")
    if penalties.prompt is not None or penalties.output is not None:
        raise ValueError("penalties must have either counts, or prompt and output, got both")
    if (len(kept), kept.vocab_size) != (size, vocab):
        raise ValueError(
            f"penalties.counts must be of {check.dim} = {size} requests and V = {vocab} ids, got {len(kept)} and "
            f"{kept.vocab_size}"
        )
    check.same_device("penalties.counts", kept.ids)
    return kept.ids, kept.counts


def adjustments(
    check: ArgumentChecker, penalties: Penalties | None, bias: LogitBias | None, draft_tokens: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """(ids int32 [B, M], counts int32 [B, M, 2] in prompt and output, bias float32 [B, M], penalties float32 [B, 3]).

    ``ids`` ascend, those behind the last hold the size of the vocabulary."""
    if penalties is None and bias is None:
        return NO_ADJUSTMENTS
    penalties = Penalties() if penalties is None else penalties
    if not isinstance(penalties, Penalties):
        raise TypeError(f"penalties must be Penalties, got {validate.describe(penalties)}")
    if bias is not None and (not isinstance(bias, tuple) or len(bias) != 2):
        raise TypeError(f"logit_bias must be LogitBias, got {validate.describe(bias)}")
    vocab = check.sizes["V"]
    ids, counts = _counted(check, penalties)
    touched = [ids.new_full((len(ids), 1), vocab)]
    if bias is not None:
        touched.append(_text(check, "logit_bias[0]", bias[0], "M"))
    if draft_tokens is not None:
        touched.append(_ids_or_none(draft_tokens, vocab))
    ids, counts = add_tokens(ids, counts, torch.cat(touched, 1), vocab)
    added = torch.zeros(ids.shape, dtype=torch.float32, device=check.device)
    if bias is not None:
        values = check.tensor("logit_bias[1]", bias[1], (torch.float32,), f"{check.dim}, M")
        added.scatter_add_(1, torch.searchsorted(ids, touched[1]), values)
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return ids, counts, added, check.columns([check.parameter(name, getattr(penalties, name)) for name in names])


def distribution(
    check: ArgumentChecker, rows: str, sampling: tuple[object, ...], bitmask: object, penalties: Penalties | None,
    bias: LogitBias | None, draft_tokens: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """What makes distributions of logits ``[rows, V]``, as the operators take it: sampling, mask and adjustments."""
    vocab = check.sizes["V"]
    check.sizes["ceil(V/32)"] = -(-vocab // 32)
    mask = check.optional("bitmask", bitmask, (torch.int32,), f"{rows}, ceil(V/32)")
    return (*check.sampling(*sampling), mask, *adjustments(check, penalties, bias, draft_tokens))


#: Temperatures of each draft's request, or one, where they are not read.
NO_TEMPERATURE: tuple[Tensor | None, float] = (None, 1.0)


def draft_temperature(value: object, draft_logits: object, draft_stats: object) -> tuple[Tensor | None, float]:
    """``draft_temperature`` as operators take it, of a rule that reads ``draft_logits``: there where nothing else says
    how they were drawn from, and nowhere else."""
    if value is None:
        if draft_logits is None or draft_stats is not None:
            return NO_TEMPERATURE
        raise ValueError(
            "draft_temperature must be given with draft_logits that come without draft_stats, got None: the drafts' "
            "own temperature cannot be guessed; pass the stats of sample as draft_stats, or draft_temperature= (0 if "
            "greedy)"
        )
    if draft_logits is None:
        raise ValueError("draft_temperature needs the draft_logits that it describes, got draft_logits=None")
    if draft_stats is not None:
        raise ValueError(
            "draft_temperature must be None with draft_stats, which carry the drafts' own, got "
            f"{validate.describe(value)}"
        )
    if not isinstance(value, Tensor):
        return None, float(validate.number("draft_temperature", value, "B"))
    checked: Any = ArgumentChecker("draft_logits", draft_logits).parameter("draft_temperature", value)
    return checked.contiguous(), 1.0


def drafts(
    check: ArgumentChecker, rows: str, logits: object, stats: object, target_to_draft: Tensor | None,
    temperature: tuple[Tensor | None, float], seed: object, position: object,
) -> tuple[Any, ...]:  # fmt: skip
    """What is known of drafts beside the tokens, and what noise is keyed on, as the operators take it: ``rows`` of
    logits, as wide as the target's or, with a table of its ids, as the drafter's own."""
    width = "V" if target_to_draft is None else "Vd"
    if stats is not None and logits is None:
        raise ValueError("draft_stats needs the draft_logits that it describes, got draft_logits=None")
    read = None if logits is None else check.logits("draft_logits", logits, f"{rows}, {width}")
    scalars = check.optional("draft_stats", stats, (torch.float32,), f"{rows}, 3")
    check.same_device("draft_to_target", target_to_draft)
    check.optional("draft_temperature", temperature[0], (torch.float32,), check.dim)
    keys = check.integers("seed", seed), check.integers("position", position)
    return read, scalars, target_to_draft, *temperature, *keys


def draw(
    op: str, logits: object, draft_to_target: object, seed: object, position: object, row: object,
    sampling: tuple[Any, ...], mask: object, penalties: Penalties | None, bias: LogitBias | None,
    backend: str | None, *own: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What an operator that draws from rows ``logits [R, V]``, with a table ``[R, Vd]``, gives; ``own`` are its
    arguments behind those that all of them have."""
    target_to_draft = of_rows(draft_to_target, logits)
    if penalties is None and bias is None and (call := find_fast_path(backend, logits)) is not None:
        made: tuple[Tensor, ...] | None = getattr(call, op)(
            logits, target_to_draft, *validate.keys(logits, seed, position, row), None, *sampling, mask,
            *NO_ADJUSTMENTS, *own,
        )  # fmt: skip
        if made is not None:
            return made
    check = ArgumentChecker("logits", logits, "R")
    rows = check.logits("logits", logits, "R, V" if target_to_draft is None else "R, Vd")
    if target_to_draft is not None:
        check.same_device("draft_to_target", target_to_draft)
        check.sizes["V"] = len(target_to_draft)
    keys = [check.integers(*each) for each in (("seed", seed), ("position", position), ("row", row))]
    if not isinstance(row, int):
        validate.within("row", keys[2], 0, MAX_ROWS - 1, f"in [0, {MAX_ROWS})")
    read = distribution(check, "R", sampling, mask, penalties, bias)
    drawn: tuple[Tensor, ...] = function(op, backend, rows.device)(rows, target_to_draft, *keys, *read, *own)
    return drawn
