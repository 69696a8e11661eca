"""What the loop asks of a target and of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF
from specdec_kernels.ops.tree_rules import SiblingsName


@dataclass(frozen=True)
class Scores:
    """What the target says after each of the rows it was given."""

    logits: Tensor
    """[B, R, V]."""
    features: Tensor | None
    """[B, R, H], what the LM head read; None where nobody wants it."""


@dataclass(frozen=True)
class Draft:
    """Proposed tokens and the law they were drawn from, as :func:`specdec_kernels.verify_chain` takes them."""

    tokens: Tensor
    """int64 [B, K], -1 after the last draft of a request."""
    logits: Tensor | None = None
    """[B, K, V]; None where every draft is a point mass."""
    stats: Tensor | None = None
    """float32 [B, K, 3]; scale inf marks a point mass."""

    @staticmethod
    def nothing(batch: int) -> Draft:
        """No drafts at all."""
        return Draft(torch.empty((batch, 0), dtype=torch.int64))

    @staticmethod
    def point_masses(drafts: Sequence[Sequence[int]]) -> Draft:
        """Lists of token ids that were not drawn from anything."""
        longest = max(len(draft) for draft in drafts)
        rows = [[*draft, *[-1] * (longest - len(draft))] for draft in drafts]
        return Draft(torch.tensor(rows, dtype=torch.int64).reshape(len(drafts), longest))


@dataclass(frozen=True)
class TreeDraft:
    """A tree of proposed tokens, as :func:`specdec_kernels.verify_tree` takes it. Node 0 is the text's last token."""

    tokens: Tensor
    """int64 [B, N]; of the root and of what is no node, any id."""
    parents: Tensor
    """int64 [B, N], -1 for the root and for what is no node."""
    logits: Tensor | None = None
    """[B, N, V], what the children of each node were drawn from; None where every draft is a point mass."""
    stats: Tensor | None = None
    """float32 [B, N, 3]; scale inf marks a node whose children are point masses."""
    siblings: SiblingsName = "without_replacement"
    """How the children of a node were drawn."""

    @staticmethod
    def of(draft: Draft) -> TreeDraft:
        """A chain of point masses as a tree."""
        live = (draft.tokens >= 0).long().cumprod(1).bool()
        parents = torch.where(live, torch.arange(live.shape[1], device=live.device), -1)
        tokens = functional.pad(draft.tokens.clamp(min=0), (1, 0))
        return TreeDraft(tokens, functional.pad(parents, (1, 0), value=-1))

    def chains(self) -> list[list[int]]:
        """Of each request the tokens of its first nodes, as far as each hangs from the one before."""
        index = torch.arange(self.parents.shape[1] - 1, device=self.parents.device)
        lengths = (self.parents[:, 1:] == index).long().cumprod(1).sum(1).tolist()
        return [tokens[1 : 1 + length] for tokens, length in zip(self.tokens.tolist(), lengths, strict=True)]

    @property
    def live(self) -> Tensor:
        """bool [B, N]: which nodes there are."""
        return (self.parents >= 0) | (torch.arange(self.parents.shape[1], device=self.parents.device) == 0)


@dataclass(frozen=True)
class Step:
    """What a drafter may depend on. The verification's coins are not among it, which keeps the law exact."""

    num_draft: Tensor
    """int64 [B]: drafts wanted at most; of a tree, the nodes beside the root."""
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
    length: Tensor | None = None
    """int64 [B]: drafts of a chain, where siblings beside its first ones are the rest of those wanted; None leaves that
    to the drafter."""
    coupled: bool = False
    """Whether the drafts are verified by the rule ``"coupled"``, and should be drawn with its noise."""


class Target(Protocol):
    """A model that scores rows against a cache of keys and values, and takes rows back."""

    def begin(self, prompts: Sequence[Sequence[int]], feature_layers: Sequence[int]) -> Tensor | None:
        """Read all of each prompt but its last token; the features [B, R, H] of what was read, if any are wanted: the
        outputs of these layers side by side, the last layer's after the final norm."""

    def room(self) -> int:
        """Rows a request can be given in the next step, at least one."""

    def score(self, tokens: Tensor, counts: Tensor) -> Scores:
        """Append ``counts[b]`` of the rows ``tokens[b]`` to each request and score them."""

    def keep(self, rows: Tensor) -> None:
        """Of the rows just scored, keep the first ``rows[b]``."""

    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        """Append a tree ``tokens[b]``, ``parents[b]`` to each request and score its nodes, each after its own path."""

    def keep_path(self, nodes: Tensor) -> None:
        """Of the tree just scored, keep the path ``nodes[b]``, -1 behind its end."""

    def select(self, requests: Tensor) -> None:
        """Go on with these requests only, in this order."""


class Drafter(Protocol):
    """Something that proposes tokens."""

    feature_layers: Sequence[int]
    """Layers of the target whose outputs it reads, -1 the last; none of them if it reads tokens alone."""

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        """Start; ``features[b, t]`` is the target's feature at prompt token t, the last token not among them."""

    def propose(self, step: Step) -> Draft | TreeDraft:
        """Tokens to verify."""

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        """What each request's text was continued with; ``features[b, i]`` is the target's before ``tokens[b][i]``."""

    def select(self, requests: Tensor) -> None:
        """Go on with these requests only, in this order."""
