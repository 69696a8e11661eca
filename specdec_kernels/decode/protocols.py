"""What the loop asks of a target and of a drafter.

A target and a drafter are what streams have in common: a model, and how it is used. What belongs to one stream of
tokens (caches, histories) lives in the session that :meth:`Target.begin` and :meth:`Drafter.begin` return, so one
model serves any number of streams. Sessions are told numbers of tokens as Python ints, which the loop knows from its
one read of the verification's results, so that none of them waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec_kernels.decode.drafts import Draft, Step, TreeDraft
from specdec_kernels.ops.results import Verified


class Scores(NamedTuple):
    """What the target says after each of the rows it was given."""

    logits: Tensor
    """[B, R, V]."""
    features: Tensor | None
    """[B, R, H], the outputs of the layers that were requested, side by side; None if none were."""


class TargetSession(Protocol):
    """One stream's rows in a target: appended, scored, and taken back."""

    features: Tensor | None
    """[B, R, H] of what was read of the prompts, if any layers were requested: their outputs side by side, the last
    layer's after the final norm."""

    def max_rows(self) -> int:
        """Rows a request can be given in the next step, at least one."""

    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        """Append ``counts[b]`` of the rows ``tokens[b]`` to each request and score them."""

    def commit(self, counts: Sequence[int]) -> None:
        """Of the rows just scored, keep the first ``counts[b]``."""

    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        """Append a tree ``tokens[b]``, ``parents[b]`` to each request and score its nodes, each after its own path."""

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the tree just scored, keep the nodes ``paths[b]``, a path from the root."""

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only, in this order."""


@runtime_checkable
class SteppingSession(TargetSession, Protocol):
    """A session that can score and verify chains at once, as a CUDA graph does."""

    def step(self, last: Tensor, draft: Draft, **verification: Any) -> tuple[Scores, Verified]:
        """Append the last token [B, 1] of each request and its drafts, score and verify them, the latter with the named
        arguments of :func:`specdec_kernels.verify_chain`; a commit follows as after ``score``."""


@runtime_checkable
class JoinableSession(Protocol):
    """A session of a target or a drafter to which requests can be added, as the scheduler does."""

    def join(self, other: Any) -> None:
        """Go on with the requests of another session of the same target or drafter too, behind one's own; the other one
        is not used any more.

        Raises:
            ValueError: these requests cannot be had together, before anything changes: a scheduler has them wait.
        """


@runtime_checkable
class ForeknowingSession(Protocol):
    """A session of a drafter that knows, before it drafts, of which requests it has drafts."""

    def available(self, num_draft: Sequence[int]) -> list[int]:
        """Of so many drafts of each request, how many there are."""


def joinable(session: Any) -> JoinableSession:
    """A session that others can join.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(session, JoinableSession):
        raise TypeError(f"sessions must have a method `join` for later requests, got {type(session).__name__}")
    return session


@runtime_checkable
class RevertibleSession(Protocol):
    """A drafter's session that can take back what it was told, as drafting ahead does."""

    def trial(self) -> AbstractContextManager[None]:
        """What the session is told and asked within this context is taken back at its end; no requests are selected or
        joined in it."""


def revertible(session: Any) -> RevertibleSession:
    """A session that can take back what it was told.

    Raises:
        TypeError: it cannot.
    """
    if not isinstance(session, RevertibleSession):
        raise TypeError(
            f"a drafter that drafts ahead must have sessions with a method `trial`, got {type(session).__name__}"
        )
    return session


class Target(Protocol):
    """A model that scores rows against what it has read. A ``shares_ids``, where it has one, says whether it reads
    sources in the ids that it writes; where it does not, drafters look nothing up in them."""

    @property
    def device(self) -> torch.device:
        """Where its logits are."""

    @property
    def vocab_size(self) -> int:
        """Columns of its logits."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The model's own end tokens."""

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
    ) -> TargetSession:
        """Read all of each prompt but its last token.

        Raises:
            ValueError: it cannot score such histories as it should, before anything is read.
        """


def shares_ids(target: Target) -> bool:
    """Whether a target reads sources in the ids that it writes: yes, unless it says otherwise."""
    return bool(getattr(target, "shares_ids", True))


class DrafterSession(Protocol):
    """One stream's drafts."""

    def propose(self, step: Step) -> Draft | TreeDraft:
        """Tokens to verify."""

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        """What each request was continued with; ``features[b, i]`` is the target's before ``tokens[b][i]``."""

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only, in this order."""


class Traits(NamedTuple):
    """What a drafter may say of itself, as attributes of these names, and what is known of one that says nothing."""

    vocab_size: int | None = None
    """How many ids it drafts from: as many as the target has."""
    siblings: int = 0
    """Drafts that may lie beside each one of a chain."""
    walked: bool = False
    """Whether it drafts trees of point masses at every temperature, which are walked."""


def traits_of(drafter: Any) -> Traits:
    """What a drafter says of itself."""
    said: dict[str, Any] = {name: getattr(drafter, name) for name in Traits._fields if hasattr(drafter, name)}
    return Traits(**said)


class Drafter(Protocol):
    """Something that proposes tokens. It may have the attributes of :class:`Traits` too."""

    @property
    def feature_layers(self) -> Sequence[int]:
        """Layers of the target whose outputs it reads, -1 the last; none of them if it reads tokens alone."""

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> DrafterSession:
        """Start a stream; ``features[b, t]`` is the target's feature at prompt token t, the last token not among
        them."""
