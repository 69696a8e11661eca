"""The longest suffix of a history that occurred in it before, as the history grows."""

from __future__ import annotations

from collections.abc import Sequence


class SuffixIndex:
    """The longest suffix of a history that occurred in it before, as it grows.

    A suffix automaton (Blumer et al., 1985): linear in the history, a few steps for every token. The state reached by
    the whole history links to the longest suffix that also ends somewhere earlier.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # Of every state: the length of its longest string, the state of the longest suffix that is in another one,
        # where its strings ended first, and the states that tokens lead to.
        self._length, self._link, self._end = [0], [-1], [-1]
        self._next: list[dict[int, int]] = [{}]
        self._last = 0

    def _add(self, length: int, link: int, end: int, following: dict[int, int]) -> int:
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        self._next.append(following)
        return len(self._length) - 1

    def append(self, token: int) -> None:
        """Add one token."""
        current = self._add(self._length[self._last] + 1, 0, len(self._tokens), {})
        self._tokens.append(token)
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = current
            state = self._link[state]
        if state != -1:
            self._link[current] = self._suffix_state(state, token)
        self._last = current

    def _suffix_state(self, state: int, token: int) -> int:
        """The state with all of ``state``'s strings followed by ``token`` and no longer ones: split off where there is
        none."""
        follower, length = self._next[state][token], self._length[state] + 1
        if self._length[follower] == length:
            return follower
        clone = self._add(length, self._link[follower], self._end[follower], dict(self._next[follower]))
        while state != -1 and self._next[state].get(token) == follower:
            self._next[state][token] = clone
            state = self._link[state]
        self._link[follower] = clone
        return clone

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens."""
        for token in tokens:
            self.append(token)

    def match(self) -> tuple[int, int]:
        """(length of the longest suffix that occurred before, index just after its first occurrence)."""
        if not self._tokens:
            return 0, 0
        state = self._link[self._last]
        return self._length[state], self._end[state] + 1

    def continuation(self, count: int) -> list[int]:
        """What followed that occurrence: ``count`` tokens, a repetition going on past the end of the history."""
        start = self.match()[1]
        period = len(self._tokens) - start
        return [self._tokens[start + i % period] for i in range(count)] if period > 0 else []

    def followers(self, ahead: Sequence[int]) -> tuple[list[int], list[int]]:
        """(tokens, lengths): what followed a suffix of the history and of tokens ``ahead`` of it; each token once, with
        the length of the longest such suffix, longer ones first."""
        state, length = self._last, len(self._tokens)
        for token in ahead:
            while state > 0 and token not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if token in self._next[state]:
                state, length = self._next[state][token], length + 1
        lengths: dict[int, int] = {}
        while state > 0:
            for token in self._next[state]:
                lengths.setdefault(token, length)
            state = self._link[state]
            length = self._length[state]
        return list(lengths), list(lengths.values())

    def __copy__(self) -> SuffixIndex:
        """Another one of the same text."""
        other = SuffixIndex()
        other._tokens, other._last = list(self._tokens), self._last
        other._length, other._link, other._end = list(self._length), list(self._link), list(self._end)
        other._next = [dict(following) for following in self._next]
        return other

    def __len__(self) -> int:
        return len(self._tokens)
