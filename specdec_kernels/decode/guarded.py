"""A drafter that may fail without ending what it drafts for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from specdec_kernels.decode.drafts import Draft, Step, TreeDraft, spread
from specdec_kernels.decode.prompt_reading import PromptReading
from specdec_kernels.decode.proposals import check_proposal
from specdec_kernels.decode.protocols import Drafter, DrafterSession, joinable


class GuardedSession:
    """A drafter's session whose errors cost its requests their drafts, and nothing else: without drafts the text is the
    same in distribution."""

    def __init__(self, drafter: Drafter, prompt: PromptReading, vocab_size: int) -> None:
        self._drafted = [True] * len(prompt.submissions)  # of each request, whether it is in the drafter's session
        self._vocab_size = vocab_size
        self._wrong: list[int] = []  # slots of those whose drafts were wrong in this step
        self._session: DrafterSession | None = None
        self._session = self._attempt("begin", lambda: self._begin(drafter, prompt))
        if self._session is not None:
            joinable(self._session)  # else nothing is joined by halves

    def _begin(self, drafter: Drafter, prompt: PromptReading) -> DrafterSession:
        count = len(prompt.submissions)
        features = None if prompt.features is None else prompt.features.expand(count, -1, -1)
        return drafter.begin([prompt.request.prompt] * count, features)

    def _attempt(self, what: str, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            self._session, self._drafted = None, [False] * len(self._drafted)
            _warn(what, error)
            return None

    @property
    def _slots(self) -> list[int]:
        """Of the requests with drafts, in the order that the drafter's session has them in."""
        return [slot for slot, drafted in enumerate(self._drafted) if drafted]

    def propose(self, step: Step) -> Draft | TreeDraft:
        session = self._session
        draft = None if session is None else self._attempt("propose", lambda: self._proposed(session, step))
        return Draft.nothing(len(step.num_draft)) if draft is None else draft

    def _proposed(self, session: DrafterSession, step: Step) -> Draft | TreeDraft | None:
        """What is proposed, but for the drafts that are wrong: their requests leave the session after this step."""
        slots, batch = self._slots, len(self._drafted)
        own = step if len(slots) == batch else replace(step.select(slots), batch=batch)
        draft = session.propose(own)
        wrong = check_proposal(draft, own, self._vocab_size)
        for reason in dict.fromkeys(wrong.values()):
            _warn("propose", ValueError(reason))
        self._wrong = [slots[row] for row in wrong]
        rows = {slot: row for row, slot in enumerate(slots) if row not in wrong}
        return draft if len(rows) == batch else spread(draft, rows, batch) if rows else None

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        if (session := self._session) is not None:
            if not all(self._drafted):
                tokens = [tokens[slot] for slot in self._slots]
                features = None if features is None else features[self._slots]
            self._attempt("commit", lambda: session.commit(tokens, features))
        if self._wrong:
            kept = [row for row, slot in enumerate(self._slots) if slot not in self._wrong]
            self._select([drafted and slot not in self._wrong for slot, drafted in enumerate(self._drafted)], kept)
            self._wrong = []

    def select(self, slots: Sequence[int]) -> None:
        rows = {slot: row for row, slot in enumerate(self._slots)}
        self._select([slot in rows for slot in slots], [rows[slot] for slot in slots if slot in rows])

    def _select(self, drafted: list[bool], rows: list[int]) -> None:
        """Go on with requests of which these have drafts, which are these of the session."""
        self._drafted = drafted
        if not rows:
            self._session = None
        if (session := self._session) is not None:
            self._attempt("select", lambda: session.select(rows))

    def join(self, other: GuardedSession) -> None:
        """Those of either that are without drafts stay without."""
        self._drafted = self._drafted + other._drafted
        if (session := self._session) is None:
            self._session = other._session
        elif other._session is not None:
            self._attempt("join", lambda: joinable(session).join(other._session))


def _warn(what: str, error: Exception) -> None:
    with suppress(Exception):  # warnings that are errors (-W error) would end what goes on without drafts
        warnings.warn(
            f"the drafter failed in {what}, and requests go on without drafts: {type(error).__name__}: {error}",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip
