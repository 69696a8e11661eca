"""Any Python function as a drafter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from specdec_kernels.checks import listed
from specdec_kernels.decode.drafts import Draft, Step

Propose = Callable[[list[int], int], Sequence[int]]


class CallableDrafter:
    """Drafts what ``propose(history, count)`` returns: up to ``count`` token ids to follow the token ids ``history``.

    The drafts are point masses: whatever the function does, the text keeps the target's distribution, provided that it
    looks at nothing but its arguments.

    Raises:
        TypeError: ``propose`` cannot be called, or gives something that is no list of token ids.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, propose: Propose) -> None:
        if not callable(propose):
            raise TypeError(f"propose must be a function of (history, count), got {propose!r}")
        self.propose = propose

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> CallableSession:
        return CallableSession(self.propose, prompts)


class CallableSession:
    """One stream of a :class:`CallableDrafter`."""

    def __init__(self, propose: Propose, prompts: Sequence[Sequence[int]]) -> None:
        self._propose, self._histories = propose, [list(prompt) for prompt in prompts]

    def propose(self, step: Step) -> Draft:
        return Draft.point_masses(
            [
                listed("what propose returns", self._propose(list(history), count), "token ids")[:count]
                for history, count in zip(self._histories, step.num_draft, strict=True)
            ]
        )

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        for history, new in zip(self._histories, tokens, strict=True):
            history.extend(new)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """See :class:`~specdec_kernels.decode.protocols.RevertibleSession`."""
        before, self._histories = self._histories, [list(history) for history in self._histories]
        try:
            yield
        finally:
            self._histories = before

    def select(self, slots: Sequence[int]) -> None:
        self._histories = [self._histories[slot] for slot in slots]

    def join(self, other: CallableSession) -> None:
        self._histories = self._histories + other._histories
