"""Drafting while the target checks: from the likeliest outcomes of the step, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from specdec_kernels.checks import whole
from specdec_kernels.decode.drafts import Draft, Step, counted, require_chain
from specdec_kernels.decode.protocols import Drafter, DrafterSession, joinable, revertible, traits_of
from specdec_kernels.tensors import longer, to_device

Result = TypeVar("Result")
#: What each request may be continued with; None where nothing is guessed.
Guess = list[list[int] | None]


class AsyncDrafter:
    """Another drafter, which drafts the next step's drafts while the target checks those of this one (PEARL,
    arXiv:2408.11850, drafts ahead likewise).

    The outcome of a step is not known before it is over, so the likeliest ones are guessed: that all drafts are
    accepted, with the likeliest bonus token after them; and where all requests are greedy that one is rejected, with
    the drafter's second choice as the recovered token, ranked by the probability that the drafter itself gives to these
    tokens. (At a temperature recovered tokens are drawn from what the target finds likelier than the drafter does, of
    which the drafter knows nothing.) What was drafted for the outcome that came is used, everything else is thrown
    away, and drafted anew.

    The text is that of ``drafter`` alone with the same seed, up to rounding: its drafts are a function of the history
    and of noise that is keyed on the position, and what was drafted for another history is never used. So nothing
    depends on the clock, and the distribution is exact. In a batch drafts are used if the outcome of every request was
    foreseen: to draft for one anew takes as long as for all.

    An error in the thread is raised by the next ``propose``. The thread ends with the session.

    Args:
        drafter: what drafts chains from tokens alone, and whose sessions have ``trial``: a :class:`ModelDrafter`,
            :class:`NGramDrafter`, :class:`CallableDrafter`, or a :class:`FallbackDrafter` of these. The number of
            drafts may be chosen around it: ``AdaptiveDrafter(AsyncDrafter(drafter))``.
        outcomes: how many are drafted for in a step at most; more of them fit beside a target that takes many times
            as long as the drafts.

    Raises:
        TypeError: ``outcomes`` is no int; ``begin`` raises it where sessions of ``drafter`` cannot take back what they
            were told (:class:`StaticDrafter`, trees), ``propose`` where they draft trees.
        ValueError: ``drafter`` reads the target's hidden states, which are not there before the target has checked;
            or has siblings; or ``outcomes`` is below 1.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, drafter: Drafter, outcomes: int = 1) -> None:
        if drafter.feature_layers:
            raise ValueError(
                "drafter must read tokens alone to draft ahead of the target, got one that reads its hidden states "
                f"(feature_layers={list(drafter.feature_layers)})"
            )
        traits = traits_of(drafter)
        if traits.siblings:
            raise ValueError(f"drafter must draft chains to draft ahead of the target, got siblings={traits.siblings}")
        whole("outcomes", outcomes, 1)
        self.drafter, self.outcomes = drafter, outcomes
        self.vocab_size = traits.vocab_size

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> AsyncSession:
        return AsyncSession(self.drafter, self.outcomes, prompts)


@dataclass
class _Ahead:
    """What is drafted for guessed outcomes of a step, and which outcome came."""

    drafts: Future[list[tuple[Guess, Draft]]]
    asked: Sequence[int]
    """Drafts wanted of each request."""
    over: threading.Event
    """Set once the outcome is known: no further one is drafted for."""
    came: list[tuple[int, list[int]]] | None = None
    """Of each request that goes on, its slot in the drafts and what it was continued with; None before it is known."""

    def fitting(self, wanted: Sequence[int]) -> Draft | None:
        """What was drafted for what came, if it is at least as much as is wanted now."""
        came = self.came or []
        slots = [slot for slot, _ in came]
        if not slots or any(self.asked[slot] < count for slot, count in zip(slots, wanted, strict=True)):
            return None
        drafted = self.drafts.result()
        fits = [[draft for guess, draft in drafted if guess[slot] == new] for slot, new in came]
        if not all(fits):
            return None
        chosen = _side_by_side([own[0] for own in fits], slots)
        if chosen is None:
            return None
        return chosen.first([min(pair) for pair in zip(counted(chosen), wanted, strict=True)])


class AsyncSession:
    """One stream of an :class:`AsyncDrafter`. All that the other drafter's session is told and asked, it is told by one
    thread, one thing after the other."""

    def __init__(self, drafter: Drafter, outcomes: int, prompts: Sequence[Sequence[int]]) -> None:
        self._outcomes = outcomes
        self._thread = _Thread()
        self._session: DrafterSession = self._thread.call(_begun, drafter, prompts)
        self._ahead: _Ahead | None = None

    def propose(self, step: Step) -> Draft:
        wanted = step.lengths(step.num_draft)
        ahead, self._ahead = self._ahead, None
        self._thread.wait()  # for errors
        draft = None if ahead is None else ahead.fitting(wanted)
        if draft is None:
            draft = self._thread.call(_proposed, self._session, step)
        if max(wanted) > 0:
            over = threading.Event()
            arguments = self._session, step, wanted, draft, self._outcomes, over
            self._ahead = _Ahead(self._thread.start(_drafted_ahead, *arguments), wanted, over)
        return draft

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        if self._ahead is not None and self._ahead.came is None:
            self._ahead.over.set()
            self._ahead.came = [(slot, list(new)) for slot, new in enumerate(tokens)]
        else:  # nothing was asked for in this step
            self._ahead = None
        self._thread.start(self._session.commit, tokens, None)

    def select(self, slots: Sequence[int]) -> None:
        if self._ahead is not None and self._ahead.came is not None:
            self._ahead.came = [self._ahead.came[slot] for slot in slots]
        else:  # before the outcome is known
            self._ahead = None
        self._thread.start(self._session.select, slots)

    def join(self, other: AsyncSession) -> None:
        """What was drafted ahead is not used, since nothing was for the others."""
        self._ahead = None
        other._thread.wait()
        self._thread.call(joinable(self._session).join, other._session)


class _Thread:
    """A thread that makes one call after the other; on a GPU in a stream of its own, which is waited for at the end of
    each. It ends once nothing refers to this."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "specdec-drafter")
        self._calls: list[Future[Any]] = []
        self._stream: torch.cuda.Stream | None = None

    def start(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a call made."""
        stream = None
        if torch.cuda.is_initialized():
            self._stream = stream = self._stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
        call = self._pool.submit(_called, stream, function, arguments)
        self._calls.append(call)
        return call

    def wait(self) -> None:
        """Until all calls were made; what went wrong is raised here."""
        calls, self._calls = self._calls, []
        for call in calls:
            call.result()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Have a call made, and wait for it."""
        result = self.start(function, *arguments)
        self.wait()
        return result.result()


@torch.inference_mode()
def _called(stream: torch.cuda.Stream | None, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    with ExitStack() as stack:
        if stream is not None:
            stack.callback(stream.synchronize)
            stack.enter_context(torch.cuda.stream(stream))
        return function(*arguments)


def _begun(drafter: Drafter, prompts: Sequence[Sequence[int]]) -> DrafterSession:
    session = drafter.begin(prompts, None)
    with revertible(session).trial():  # a session of several sessions knows only now that all can
        return session


def _proposed(session: DrafterSession, step: Step) -> Draft:
    """A copy of what is proposed: sessions may propose the same tensors again."""
    draft = require_chain(session.propose(step), chains="chains to draft ahead of the target")
    return draft.select(range(len(step.num_draft)))


def _side_by_side(drafts: Sequence[Draft], slots: Sequence[int]) -> Draft | None:
    """Of each request one slot of a draft; None where some were drawn and others not."""
    if all(draft is drafts[0] for draft in drafts):
        return drafts[0].select(slots)
    each = [draft.select([slot]) for draft, slot in zip(drafts, slots, strict=True)]
    longest = max(draft.tokens.shape[1] for draft in each)
    columns: dict[str, Any] = {}
    for name, value in (("tokens", -1), ("logits", 0.0), ("stats", 0.0)):
        rows = [getattr(draft, name) for draft in each]
        if all(row is None for row in rows):
            continue
        if any(row is None for row in rows):
            return None
        columns[name] = torch.cat([longer(row, longest, value) for row in rows])
    temperatures = [draft.temperature for draft in each]
    if any(isinstance(own, Tensor) for own in temperatures):
        columns["temperature"] = torch.cat([own for own in temperatures if isinstance(own, Tensor)])
    return replace(each[0], **columns, counts=[count for draft in each for count in counted(draft)])


def _drafted_ahead(
    session: DrafterSession, step: Step, wanted: Sequence[int], draft: Draft, outcomes: int, over: threading.Event
) -> list[tuple[Guess, Draft]]:
    """Drafts for guessed outcomes of the step with this draft, until it is over."""
    found = []
    for guess in _guesses(session, step, draft, outcomes):
        if over.is_set():
            break
        # A request that wants no drafts ends with this step: its outcome does not matter.
        if any(new is None and count > 0 for new, count in zip(guess, wanted, strict=True)):
            continue
        with revertible(session).trial():
            found.append((guess, _proposed_behind(session, guess, replace(step, num_draft=wanted))))
    return found


def _proposed_behind(session: DrafterSession, new: Guess, step: Step) -> Draft:
    """What is proposed once requests are continued with these."""
    tokens = [each or [] for each in new]
    session.commit(tokens, None)
    lengths = to_device([len(each) for each in tokens], torch.int64, step.position.device)
    return _proposed(session, replace(step, position=step.position + lengths, length=None))


def _guesses(session: DrafterSession, step: Step, draft: Draft, outcomes: int) -> Iterator[Guess]:
    """The likeliest outcomes of a step with this draft, the likeliest of each request first."""
    drafted = [row[:count] for row, count in zip(draft.tokens.tolist(), counted(draft), strict=True)]
    ranked = [own[:outcomes] for own in (_ranked(draft, drafted) if step.greedy else [[None]] * len(drafted))]
    complete: Guess = [None] * len(drafted)
    if any(recovered is None for own in ranked for recovered in own):
        with revertible(session).trial():
            one: dict[str, Any] = {"num_draft": [1] * len(drafted)}
            if not step.coupled:  # else the drafter holds the same race as the target
                one |= {"temperature": 0.0, "greedy": True}
            bonus = _proposed_behind(session, list(drafted), replace(step, **one))
        firsts = zip(bonus.tokens.tolist(), counted(bonus), strict=True)
        complete = [[*own, row[0]] if count else None for own, (row, count) in zip(drafted, firsts, strict=True)]
    for rank in range(max(map(len, ranked))):
        chosen = [own[min(rank, len(own) - 1)] for own in ranked]
        yield [accepted if new is None else new for new, accepted in zip(chosen, complete, strict=True)]


def _ranked(draft: Draft, drafted: Sequence[Sequence[int]]) -> list[list[list[int] | None]]:
    """Of each greedy request its outcomes, the likeliest first: None where all drafts are accepted, else those up to a
    recovered token. Their probabilities are the drafter's own, at temperature 1, as if the bonus token was sure; where
    drafts have no logits there is only the first."""
    ranked: list[list[list[int] | None]] = [[None] for _ in drafted]
    if draft.logits is None or not draft.tokens.numel():
        return ranked
    rows = draft.logits.float().log_softmax(-1)
    known = draft.vocabulary
    own = draft.tokens.clamp(min=0)
    own = (own if known is None else known.target_to_draft[own].long().clamp(min=0))[..., None]
    accepted = rows.gather(2, own)[..., 0]
    recovered, second = rows.scatter(2, own, -torch.inf).max(-1)
    second = second if known is None else known.draft_to_target[second]
    before = accepted.cumsum(1) - accepted
    values, tokens, whole = (before + recovered).tolist(), second.tolist(), accepted.cumsum(1).tolist()
    for slot, chain in enumerate(drafted):
        if not chain:
            continue
        outcomes: list[tuple[float, list[int] | None]] = [(whole[slot][len(chain) - 1], None)]
        outcomes += [(values[slot][row], [*chain[:row], tokens[slot][row]]) for row in range(len(chain))]
        ranked[slot] = [new for _, new in sorted(outcomes, key=lambda outcome: -outcome[0])]
    return ranked
