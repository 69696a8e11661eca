"""Drafters whose head has fewer ids than the target's: which ids those are, and where a draft row has each of them."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.ops import validate


class DraftVocabulary:
    """The ids that a drafter has logits for, of all those of its target: made once, checked once.

    Args:
        draft_to_target: int64 or int32 [Vd], the target id of each draft id: distinct, in any order. (``d2t`` of an
            EAGLE-3 checkpoint holds how far each is from it: ``torch.arange(Vd) + d2t``.)
        vocab_size: ids of the target, V.

    Equivalent to, for ``draft_logits [..., Vd]`` of :func:`verify_chain` and the other functions that take one::

        full = draft_logits.new_full((*draft_logits.shape[:-1], vocab_size), -torch.inf)
        full[..., draft_to_target] = draft_logits

    Example:
        >>> from specdec_kernels import DraftVocabulary, sample
        >>> vocabulary = DraftVocabulary(torch.tensor([3, 0]), vocab_size=5)
        >>> vocabulary.target_to_draft.tolist()
        [1, -1, -1, 0, -1]
        >>> sample(torch.tensor([[9.0, 0.0]]), seed=1, position=7, draft_to_target=vocabulary).tokens.tolist()
        [3]
    """

    draft_to_target: Tensor
    """int64 [Vd]."""
    target_to_draft: Tensor
    """int32 [V]: the draft id of each target id, -1 where there is none."""

    def __init__(self, draft_to_target: Tensor, vocab_size: int) -> None:
        check = validate.ArgumentChecker("draft_to_target", draft_to_target)
        ids = check.ids("draft_to_target", draft_to_target, "Vd").to(torch.int64, copy=True)
        checks.whole("vocab_size", vocab_size, 1, 1 << 31)
        if len(ids) == 0:
            raise ValueError(f"draft_to_target must have at least one id, got {checks.describe(draft_to_target)}")
        ascending, places = ids.sort(stable=True)
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[places[1:]] = ascending[1:] == ascending[:-1]
        outside = (ids < 0) | (ids >= vocab_size)
        bad = (outside | repeated).nonzero()
        if len(bad):  # on a GPU it waits for the ids
            at = int(bad[0])
            expected = f"in [0, {vocab_size})" if outside[at] else "distinct"
            raise ValueError(f"draft_to_target must be {expected}, got {int(ids[at])} at [{at}]")
        self.draft_to_target = ids
        self._by_device = {ids.device: self}
        self.target_to_draft = torch.full((vocab_size,), -1, dtype=torch.int32, device=ids.device)
        self.target_to_draft[ids] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.target_to_draft)

    @property
    def device(self) -> torch.device:
        """Where it is; the logits have to be there too."""
        return self.target_to_draft.device

    def __len__(self) -> int:
        """Vd."""
        return len(self.draft_to_target)

    def __repr__(self) -> str:
        return f"DraftVocabulary of {len(self)} of {self.vocab_size} ids"

    def to(self, device: torch.device | str) -> DraftVocabulary:
        """The same on another device, where it is copied once."""
        device = torch.device(device)
        if device not in self._by_device:
            self._by_device[device] = moved = copy(self)
            moved.draft_to_target, moved.target_to_draft = (
                ids.to(device) for ids in (self.draft_to_target, self.target_to_draft)
            )
        return self._by_device[device]


def table_of(draft_to_target: object, name: str, logits: object, vocab: int | None = None) -> Tensor:
    """``draft_to_target`` of rows ``name [.., Vd]`` as operators take it: the table of the target's ids. Where drafts
    are verified there are ``vocab`` of these, so that a drafter's ids alone will do."""
    if vocab is not None and isinstance(draft_to_target, Tensor):
        draft_to_target = DraftVocabulary(draft_to_target, vocab)
    if not isinstance(draft_to_target, DraftVocabulary):
        expected = "a DraftVocabulary, which says how many ids the target has"
        expected = expected if vocab is None else "int64 [Vd] or a DraftVocabulary"
        raise TypeError(f"draft_to_target must be {expected}, got {checks.describe(draft_to_target)}")
    if isinstance(logits, Tensor) and logits.dim() and logits.shape[-1] != len(draft_to_target):
        raise ValueError(
            f"{name} must have a column for each of the Vd = {len(draft_to_target)} ids of draft_to_target, got "
            f"{checks.describe(logits)}"
        )
    if vocab not in (None, draft_to_target.vocab_size):
        raise ValueError(f"draft_to_target must be of the V = {vocab} ids of target_logits, got a {draft_to_target}")
    return draft_to_target.target_to_draft
