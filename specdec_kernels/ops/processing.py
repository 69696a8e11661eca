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

from specdec_kernels import checks
from specdec_kernels.contract import MAX_ROWS, PENALTIES
from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import Result, call, try_fast_path
from specdec_kernels.ops.draft_vocabulary import table_of
from specdec_kernels.ops.token_counts import TokenCounts, count_tokens, insert_ids
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


def adjustments(
    check: ArgumentChecker, penalties: Penalties | None, bias: LogitBias | None, draft_tokens: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """(ids int32 [B, M], counts int32 [B, M, 2] in prompt and output, bias float32 [B, M], penalties float32 [B, 3]).

    ``ids`` ascend, those behind the last hold the size of the vocabulary."""
    if penalties is None and bias is None:
        return NO_ADJUSTMENTS
    penalties = Penalties() if penalties is None else penalties
    if not isinstance(penalties, Penalties):
        raise TypeError(f"penalties must be Penalties, got {checks.describe(penalties)}")
    if bias is not None and (not isinstance(bias, tuple) or len(bias) != 2):
        raise TypeError(f"logit_bias must be LogitBias, got {checks.describe(bias)}")
    vocab = check.sizes["V"]
    texts = {
        column: _text(check, f"penalties.{name}", text, length)
        for column, (name, length) in enumerate((("prompt", "Lp"), ("output", "Lo")))
        if (text := getattr(penalties, name)) is not None
    }
    ids, counts = _counted(check, penalties.counts, bool(texts))
    touched = [*texts.values(), ids.new_full((len(ids), 1), vocab)]
    if draft_tokens is not None:
        touched.append(_ids_or_none(draft_tokens, vocab))
    if bias is not None:
        touched.append(biased := _text(check, "logit_bias[0]", bias[0], "M"))
    ids, counts = insert_ids(ids, counts, torch.cat(touched, 1), vocab)
    for column, text in texts.items():
        count_tokens(ids, counts, column, text, vocab)
    added = torch.zeros(ids.shape, dtype=torch.float32, device=check.device)
    if bias is not None:
        values = check.tensor("logit_bias[1]", bias[1], (torch.float32,), f"{check.dim}, M")
        added.scatter_add_(1, torch.searchsorted(ids, biased), values)
    return ids, counts, added, check.columns({name: getattr(penalties, name) for name in PENALTIES})


def _counted(check: ArgumentChecker, kept: object, texts: bool) -> tuple[Tensor, Tensor]:
    """What was counted before: ids, int32 [B, M], and how often each occurs in prompt and output, int32 [B, M, 2]."""
    if kept is None:
        ids = torch.empty((check.sizes[check.dim], 0), dtype=torch.int32, device=check.device)
        return ids, ids.new_empty((*ids.shape, 2))
    if not isinstance(kept, TokenCounts):
        raise TypeError(f"penalties.counts must be TokenCounts, got {checks.describe(kept)}")
    if texts:
        raise ValueError("penalties must have either counts, or prompt and output, got both")
    if kept.vocab_size != (vocab := check.sizes["V"]):
        raise ValueError(f"penalties.counts must be of V = {vocab} ids, got {kept.vocab_size}")
    return check.tensor("penalties.counts", kept.ids, (torch.int32,), f"{check.dim}, ids"), kept.counts


def distribution(
    check: ArgumentChecker, rows: str, sampling: tuple[Any, ...], bitmask: object, penalties: Penalties | None,
    bias: LogitBias | None, draft_tokens: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """What makes distributions of logits ``[rows, V]``, as the operators take it: sampling, mask and adjustments."""
    vocab = check.sizes["V"]
    check.sizes["ceil(V/32)"] = -(-vocab // 32)
    mask = check.optional("bitmask", bitmask, (torch.int32,), f"{rows}, ceil(V/32)")
    return (*check.sampling(*sampling), mask, *adjustments(check, penalties, bias, draft_tokens))


def drafts(
    target_logits: object, logits: object, stats: object, temperature: object, draft_to_target: object, read: bool
) -> tuple[Any, ...]:
    """What is known of drafts beside the tokens, as operators take it: logits, stats, the table of the target's ids,
    and temperatures of each request, or one. Rules that ``read`` the logits need either stats or temperatures."""
    if logits is None:
        if read and temperature is not None:
            raise ValueError("draft_temperature needs the draft_logits that it describes, got draft_logits=None")
        if stats is not None or draft_to_target is not None:
            name = "draft_stats" if draft_to_target is None else "draft_to_target"
            raise ValueError(f"{name} needs the draft_logits that it describes, got draft_logits=None")
        return None, None, None, None, 1.0
    table = None
    if draft_to_target is not None and isinstance(target_logits, Tensor) and target_logits.dim():
        table = table_of(draft_to_target, "draft_logits", logits, target_logits.shape[-1])
    if not read or (temperature is None and stats is not None):
        return logits, stats, table, None, 1.0
    if temperature is None:
        raise ValueError(
            "draft_temperature must be given with draft_logits that come without draft_stats, got None: the drafts' "
            "own temperature cannot be guessed; pass the stats of sample as draft_stats, or draft_temperature= (0 if "
            "greedy)"
        )
    if stats is not None:
        got = checks.describe(temperature)
        raise ValueError(f"draft_temperature must be None with draft_stats, which carry the drafts' own, got {got}")
    if not isinstance(temperature, Tensor):
        return logits, None, table, None, checks.number("draft_temperature", temperature, "B")
    each: Any = ArgumentChecker("draft_logits", logits).parameter("draft_temperature", temperature)
    return logits, None, table, each.contiguous(), 1.0


def checked_drafts(check: ArgumentChecker, rows: str, drafts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, checked: ``rows`` of logits, as wide as the target's or, with a table of its ids, as the drafter's
    own."""
    logits, stats, table, each, one = drafts
    width = "V" if table is None else "Vd"
    return (
        None if logits is None else check.logits("draft_logits", logits, f"{rows}, {width}"),
        check.optional("draft_stats", stats, (torch.float32,), f"{rows}, 3"),
        check.optional("draft_to_target", table, (torch.int32,), "V"),
        check.optional("draft_temperature", each, (torch.float32,), check.dim),
        one,
    )


def draw(
    result: type[Result], logits: object, draft_to_target: object, keys: tuple[Any, ...], sampling: tuple[Any, ...],
    mask: object, penalties: Penalties | None, bias: LogitBias | None, backend: str | None, *own: object,
) -> Result:  # fmt: skip
    """What an operator that draws from rows ``logits [R, V]``, with a table ``[R, Vd]``, gives; ``own`` are its
    arguments behind those that all of them have."""
    table = None if draft_to_target is None else table_of(draft_to_target, "logits", logits)
    keys, sampling = validate.per_request("R", logits, keys, *sampling)
    if penalties is None and bias is None:
        given = logits, table, *keys, *sampling, mask, *NO_ADJUSTMENTS, *own
        if (drawn := try_fast_path(result, backend, given)) is not None:
            return drawn
    check = ArgumentChecker("logits", logits, "R")
    rows = check.logits("logits", logits, "R, V" if table is None else "R, Vd")
    table = check.optional("draft_to_target", table, (torch.int32,), "V")
    seed, position, row = map(check.integers, ("seed", "position", "row"), keys)
    validate.within("row", row, 0, MAX_ROWS - 1, f"in [0, {MAX_ROWS})")
    read: tuple[Any, ...] = distribution(check, "R", sampling, mask, penalties, bias)
    return call(result, backend, (rows, table, seed, position, row, *read, *own))
