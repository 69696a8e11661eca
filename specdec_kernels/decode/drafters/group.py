"""What drafters made of several drafters have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

from torch import Tensor

from specdec_kernels.decode.protocols import Drafter, DrafterSession, joinable, revertible


def common_layers(drafters: Sequence[Drafter]) -> Sequence[int]:
    """The layers of the target that drafters read, as far as any reads some.

    Raises:
        ValueError: they read different ones.
    """
    read = [drafter.feature_layers for drafter in drafters if drafter.feature_layers]
    if any(layers != read[0] for layers in read):
        raise ValueError(f"drafters must read the same layers of the target, got {' and '.join(map(str, read))}")
    return read[0] if read else ()


class SessionGroup:
    """Sessions of several drafters for the same requests, which are told the same."""

    def __init__(self, sessions: Sequence[DrafterSession]) -> None:
        self._sessions = sessions

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        for session in self._sessions:
            session.commit(tokens, features)

    def select(self, slots: Sequence[int]) -> None:
        for session in self._sessions:
            session.select(slots)

    def join(self, other: Self) -> None:
        for session, more in zip(self._sessions, other._sessions, strict=True):
            joinable(session).join(more)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """See :class:`~specdec_kernels.decode.protocols.RevertibleSession`."""
        with ExitStack() as stack:
            for session in self._sessions:
                stack.enter_context(revertible(session).trial())
            yield
