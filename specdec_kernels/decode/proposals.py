"""What a drafter proposes, checked before anything is scored: anyone can write a drafter, and a target that has read
half of a step cannot go back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.decode.drafts import Draft, Step, TreeDraft
from specdec_kernels.ops.processing import checked_drafts, drafts
from specdec_kernels.ops.tree_rules import SIBLINGS
from specdec_kernels.ops.trees import first_bad
from specdec_kernels.ops.validate import ArgumentChecker


def check_proposal(draft: Draft | TreeDraft, step: Step, vocab_size: int) -> Mapping[int, str]:
    """What is wrong with the drafts of single requests, by their slots, as far as it can be seen without waiting for a
    device: ids that the target has not, nodes that hang from nothing, no temperature.

    Raises:
        TypeError, ValueError: the proposal is wrong as a whole, naming what was expected and what came.
    """
    if not isinstance(draft, (Draft, TreeDraft)):
        raise TypeError(f"drafter must propose a Draft or a TreeDraft, got {type(draft).__name__}")
    batch = len(step.num_draft)
    check = ArgumentChecker("draft_tokens", None, B=batch, V=vocab_size)  # of any device each
    rows = "B, N" if isinstance(draft, TreeDraft) else "B, K"
    tokens = check.ids("draft_tokens", draft.tokens, rows)
    temperature, wrong = _sound(draft.temperature)
    # Under "coupled", and where point masses are walked, nothing is read of what drafts were drawn from.
    read = not (step.coupled or (isinstance(draft, TreeDraft) and draft.logits is None))
    target = torch.empty((vocab_size,), device="meta")
    checked_drafts(check, rows, drafts(target, draft.logits, draft.stats, temperature, draft.vocabulary, read))
    if isinstance(draft, TreeDraft):
        return wrong | _wrong_trees(check, draft, step, tokens, vocab_size)
    _check_counts(draft.counts, batch, tokens.shape[1])
    return wrong | _outside(tokens, -math.inf, vocab_size)


def _sound(temperature: Tensor | float | None) -> tuple[Tensor | float | None, dict[int, str]]:
    """Temperatures that can be, and which requests have others."""
    if not isinstance(temperature, Tensor) or not temperature.is_cpu:
        return temperature, {}
    in_range, expected = checks.RANGES["draft_temperature"]
    values = temperature.flatten().tolist()
    sound = torch.tensor([in_range(own) for own in values], dtype=torch.bool).view_as(temperature)
    wrong = {
        slot: f"drafter must propose temperatures that are {expected}, got {own}"
        for slot, own in enumerate(values)
        if not in_range(own)
    }
    return torch.where(sound, temperature, 1.0), wrong


def _outside(tokens: Tensor, least: float, vocab_size: int) -> dict[int, str]:
    """Requests with ids that are none."""
    wrong: dict[int, str] = {}
    if tokens.is_cpu and tokens.numel():
        for ends in (tokens.amin(1).tolist(), tokens.amax(1).tolist()):
            for slot, token in enumerate(ends):
                if not least <= token < vocab_size:
                    wrong[slot] = f"drafter must propose token ids in [0, {vocab_size}), got {token}"
    return wrong


def _wrong_trees(
    check: ArgumentChecker, draft: TreeDraft, step: Step, tokens: Tensor, vocab_size: int
) -> dict[int, str]:
    parents = check.ids("parents", draft.parents, "B, N")
    checks.whole("nodes of a tree", parents.shape[1], 1)
    checks.choice("siblings", draft.siblings, SIBLINGS)
    wrong = _outside(tokens.masked_fill(~draft.live, 0)[:, 1:], 0, vocab_size)
    for slot, row in enumerate(parents.tolist() if parents.is_cpu else ()):
        if (nodes := sum(parent >= 0 for parent in row)) > step.num_draft[slot]:
            wrong[slot] = f"drafter must propose at most {step.num_draft[slot]} nodes beside the root, got {nodes}"
        if (node := first_bad(row)) is not None:
            wrong[slot] = f"drafter must propose nodes that hang from earlier ones, got {row[node]} of node {node}"
    return wrong


def _check_counts(counts: Sequence[int] | None, batch: int, longest: int) -> None:
    if counts is not None and (len(counts) != batch or not all(0 <= count <= longest for count in counts)):
        raise ValueError(f"counts must be of {batch} requests, from 0 to {longest}, got {list(counts)}")
