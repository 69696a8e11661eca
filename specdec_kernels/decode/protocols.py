"""What the loop asks of a target and of a drafter.

A target and a drafter are what streams have in common: a model, and how it is used. What belongs to one stream of
tokens (caches, histories) lives in the session that :meth:`Target.begin` and :meth:`Drafter.begin` return, so one
model serves any number of streams. Sessions are told numbers of tokens as Python ints, which the loop knows from its
one read of the verification's results, so that none of them waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeGuard, TypeVar, overload, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.checks import flags, ids_of
from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF
from specdec_kernels.ops.draft_vocabulary import DraftVocabulary
from specdec_kernels.ops.results import Verified
from specdec_kernels.ops.tree_rules import SiblingsName
from specdec_kernels.tensors import padded, to_device

Record = TypeVar("Record", "Draft", "TreeDraft", "Step")


class SourcePrompt(tuple[int, ...]):
    """The prompt of an encoder-decoder: the tokens that its text begins with, and the source for its encoder.

    It is a sequence of those tokens, so that whatever takes prompts takes it; a slice of it has the same source.

    Args:
        source: token ids; or a floating tensor of any dtype, as the encoder takes it without the dimension of the
            batch (Whisper: the features [mel, frames]).
        tokens: what the text begins with, at least the token that the decoder starts with.
        shares_ids: whether ids of the source are of the vocabulary that the text is written in, so that a drafter may
            look drafts up there. A target that knows better tells its drafters.

    Raises:
        TypeError, ValueError: ``source`` is neither, or empty; ``shares_ids`` is no bool.
    """

    source: list[int] | Tensor
    shares_ids: bool

    def __new__(cls, source: Sequence[int] | Tensor, tokens: Iterable[int], shares_ids: bool = True) -> SourcePrompt:
        flags(shares_ids=shares_ids)
        made = super().__new__(cls, tokens)
        made.shares_ids = shares_ids
        made.source = source if _is_floating(source) else ids_of("source", source)
        if not len(made.source):
            raise ValueError("source must not be empty")
        return made

    @overload
    def __getitem__(self, place: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> SourcePrompt: ...
    def __getitem__(self, place: SupportsIndex | slice) -> int | SourcePrompt:
        found = super().__getitem__(place)
        return SourcePrompt(self.source, found, self.shares_ids) if isinstance(found, tuple) else found

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.source, tuple(self), self.shares_ids


def _is_floating(source: Any) -> TypeGuard[Tensor]:
    return isinstance(source, Tensor) and source.is_floating_point()


def refuse_sources(prompts: Sequence[Sequence[int]], name: str) -> None:
    """Check that prompts are all that is to be read.

    Raises:
        ValueError: one has a source.
    """
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, SourcePrompt):
            raise ValueError(
                f"prompts[{index}] must have no source for {name}, which has no encoder, got a SourcePrompt"
            )


def read_lengths(
    prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], limit: int | None, name: str
) -> list[int]:
    """How many tokens of each history are read: all but the last.

    Raises:
        ValueError: more than the ``limit`` of positions that a model has; None is no limit.
    """
    lengths = [len(prompt) + count - 1 for prompt, count in zip(prompts, max_new_tokens, strict=True)]
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if limit is not None and length > limit:
            raise ValueError(
                f"max_new_tokens must leave prompt and new tokens within the {limit} positions of {name}, the last "
                f"token not counted, got {length} for prompt {index} of {len(prompt)} tokens"
            )
    return lengths


class Scores(NamedTuple):
    """What the target says after each of the rows it was given."""

    logits: Tensor
    """[B, R, V]."""
    features: Tensor | None
    """[B, R, H], the outputs of the layers that were requested, side by side; None if none were."""


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
