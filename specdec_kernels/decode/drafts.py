"""What a drafter is told of a step, and what it proposes: a chain or a tree of drafts for each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.checks import ids_of
from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF
from specdec_kernels.ops.draft_vocabulary import DraftVocabulary
from specdec_kernels.ops.tree_rules import SiblingsName
from specdec_kernels.tensors import padded, to_device

Record = TypeVar("Record", "Draft", "TreeDraft", "Step")


@dataclass(frozen=True)
class Draft:
    """Proposed tokens and what they were drawn from, as :func:`specdec_kernels.verify_chain` takes them."""

    tokens: Tensor
    """int64 [B, K], -1 after the last draft of a request."""
    logits: Tensor | None = None
    """[B, K, V]; None where every draft is a point mass."""
    stats: Tensor | None = None
    """float32 [B, K, 3]; scale inf marks a point mass."""
    temperature: Tensor | float | None = None
    """What the drafts were drawn at, float32 [B] or one for all; needed where there are logits without stats."""
    counts: Sequence[int] | None = None
    """Drafts of each request; None has them counted in ``tokens``, for which the loop waits."""
    vocabulary: DraftVocabulary | None = None
    """Of a drafter with fewer ids than the target, whose logits are [B, K, Vd]; ``tokens`` are the target's."""

    @staticmethod
    def nothing(batch: int) -> Draft:
        """No drafts at all."""
        return Draft(torch.empty((batch, 0), dtype=torch.int64, device="cpu"), counts=[0] * batch)

    @staticmethod
    def point_masses(drafts: Sequence[Sequence[int]]) -> Draft:
        """Lists of token ids that were not drawn from anything.

        Raises:
            TypeError, ValueError: something in them is no token id.
        """
        checked = [ids_of("draft", draft) for draft in drafts]
        return Draft(padded(checked, -1), counts=[len(draft) for draft in checked])

    def to(self, device: torch.device) -> Draft:
        """The same on a device."""
        return _moved(self, device)

    def first(self, counts: Sequence[int]) -> Draft:
        """The first ``counts[b]`` drafts of each request, -1 behind them."""
        longest = max(counts)
        tokens, logits, stats = (None if x is None else x[:, :longest] for x in (self.tokens, self.logits, self.stats))
        assert tokens is not None
        if any(count < longest for count in counts):
            own = to_device(counts, torch.int64, tokens.device)[:, None]
            tokens = tokens.masked_fill(torch.arange(longest, device=tokens.device) >= own, -1)
        return replace(self, tokens=tokens, logits=logits, stats=stats, counts=counts)

    def select(self, slots: Sequence[int]) -> Draft:
        """A copy, of the requests in these slots only."""
        return _selected(self, slots, self.tokens.device)


def require_chain(draft: Draft | TreeDraft, name: str = "drafter", chains: str = "chains") -> Draft:
    """What a drafter of chains proposed; ``name`` is the argument it was passed as, ``chains`` what it must draft.

    Raises:
        TypeError: it is a tree.
    """
    if isinstance(draft, TreeDraft):
        raise TypeError(f"{name} must draft {chains}, got a drafter of trees")
    return draft


def counted(draft: Draft) -> Sequence[int]:
    """Drafts of each request, counted if they are not known."""
    if draft.counts is not None:
        return draft.counts
    counts: list[int] = (draft.tokens >= 0).long().cumprod(1).sum(1).tolist()
    return counts


@dataclass(frozen=True)
class TreeDraft:
    """A tree of proposed tokens, as :func:`specdec_kernels.verify_tree` takes it; node 0 is the last token so far."""

    tokens: Tensor
    """int64 [B, N]; of the root and of what is no node, any id."""
    parents: Tensor
    """int64 [B, N], -1 for the root and for what is no node."""
    logits: Tensor | None = None
    """[B, N, V], what the children of each node were drawn from; None where every draft is a point mass."""
    stats: Tensor | None = None
    """float32 [B, N, 3]; scale inf marks a node whose children are point masses."""
    temperature: Tensor | float | None = None
    """What the children were drawn at, float32 [B] or one for all; needed where there are logits without stats."""
    siblings: SiblingsName = "without_replacement"
    """How the children of a node were drawn."""
    vocabulary: DraftVocabulary | None = None
    """Of a drafter with fewer ids than the target, whose logits are [B, N, Vd]."""

    @staticmethod
    def of(draft: Draft) -> TreeDraft:
        """A chain of point masses as a tree."""
        live = (draft.tokens >= 0).long().cumprod(1).bool()
        parents = torch.where(live, torch.arange(live.shape[1], device=live.device), -1)
        tokens = functional.pad(draft.tokens.clamp(min=0), (1, 0))
        return TreeDraft(tokens, functional.pad(parents, (1, 0), value=-1))

    def to(self, device: torch.device) -> TreeDraft:
        """The same on a device."""
        return _moved(self, device)

    def chains(self) -> list[list[int]]:
        """Of each request the tokens of its first nodes, as far as each hangs from the one before."""
        index = torch.arange(self.parents.shape[1] - 1, device=self.parents.device)
        lengths = (self.parents[:, 1:] == index).long().cumprod(1).sum(1).tolist()
        return [tokens[1 : 1 + length] for tokens, length in zip(self.tokens.tolist(), lengths, strict=True)]

    @property
    def live(self) -> Tensor:
        """bool [B, N]: which nodes there are."""
        return (self.parents >= 0) | (torch.arange(self.parents.shape[1], device=self.parents.device) == 0)


def spread(draft: Draft | TreeDraft, rows: Mapping[int, int], batch: int) -> Draft | TreeDraft:
    """A draft as one of a whole batch: the request in a slot has the drafts ``rows[slot]``, and those that have no row
    have none. One at least has some."""
    fill = next(iter(rows.values()))  # the others have any drafts, until they are taken from them
    own = [rows.get(slot, fill) for slot in range(batch)]
    if isinstance(draft, Draft):
        whole = draft.select(own)
        return whole.first([count if slot in rows else 0 for slot, count in enumerate(counted(whole))])
    drafted = to_device([slot in rows for slot in range(batch)], torch.bool, draft.tokens.device)
    tree = _selected(draft, own, draft.tokens.device)
    return replace(tree, parents=torch.where(drafted[:, None], tree.parents, -1))


@dataclass(frozen=True)
class Step:
    """What a drafter may depend on. The uniforms of the verification are not among it, which keeps the distribution
    exact."""

    num_draft: Sequence[int]
    """Drafts wanted at most of each request; of a tree, the nodes beside the root."""
    seed: Tensor
    """int64 [B]."""
    position: Tensor
    """int64 [B]: tokens of the request so far."""
    temperature: Tensor | float
    """float32 [B], or one for all."""
    top_k: Tensor | int = TOP_K_OFF
    top_p: Tensor | float = TOP_P_OFF
    min_p: Tensor | float = MIN_P_OFF
    """The target's filters, as the temperature."""
    greedy: bool = False
    """Whether the temperature of every request is 0."""
    length: Sequence[int] | None = None
    """Drafts of a chain, where siblings beside its first ones are the rest of those wanted; None leaves that to the
    drafter."""
    coupled: bool = False
    """Whether the drafts are verified by the rule ``"coupled"``, and should be drawn with its noise."""
    same_text: bool = False
    """Whether the text is the same whatever is drafted: every request is greedy, or the rule is ``"coupled"``. A
    drafter that has another one draft greedily passes this on as it is."""
    batch: int | None = None
    """Requests of the target's pass, where some of them are without a drafter; None: these are all."""

    def lengths(self, most: Sequence[int]) -> list[int]:
        """Drafts of each request's chain: so many at most, and no more than ``length`` says."""
        return list(most) if self.length is None else list(map(min, most, self.length))

    def to(self, device: torch.device) -> Step:
        """The same on a device."""
        return _moved(self, device)

    def select(self, slots: Sequence[int]) -> Step:
        """Of the requests in these slots only."""
        return _selected(self, slots, self.seed.device)


def _moved(record: Record, device: torch.device) -> Record:
    """A dataclass with its tensors on a device."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)
        for name, value in found.items()
        if isinstance(value, (Tensor, DraftVocabulary)) and value.device != device
    }
    return replace(record, **moved) if moved else record


def _selected(record: Record, slots: Sequence[int], device: torch.device) -> Record:
    """A dataclass on a device, whose tensors and lists have an entry for each request, of those in these slots."""
    index = to_device(slots, torch.int64, device)
    chosen: dict[str, Any] = {}
    for name in (field.name for field in fields(record)):
        value = getattr(record, name)
        if isinstance(value, Tensor):
            chosen[name] = value[index.to(value.device)]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            chosen[name] = [value[slot] for slot in slots]
    return replace(record, **chosen)
