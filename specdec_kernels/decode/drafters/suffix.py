"""The longest suffix of a text that occurred in it before, as the text grows."""

from __future__ import annotations


class SuffixIndex:
    """A suffix automaton (Blumer et al., 1985): linear in the text, a few steps for every token.

    The state reached by the whole text links to the longest suffix that also ends somewhere earlier.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._length: list[int] = [0]
        self._end: list[int] = [-1]  # where the state's strings ended first
        self._last = 0

    def append(self, token: int) -> None:
        """Add one token to the text."""
        current = self._state(self._length[self._last] + 1, {}, 0, len(self.text))
        self.text.append(token)
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = current
            state = self._link[state]
        if state != -1:
            follower = self._next[state][token]
            if self._length[follower] == self._length[state] + 1:
                self._link[current] = follower
            else:
                clone = self._state(
                    self._length[state] + 1, dict(self._next[follower]), self._link[follower], self._end[follower]
                )
                while state != -1 and self._next[state].get(token) == follower:
                    self._next[state][token] = clone
                    state = self._link[state]
                self._link[follower] = self._link[current] = clone
        self._last = current

    def _state(self, length: int, following: dict[int, int], link: int, end: int) -> int:
        self._length.append(length)
        self._next.append(following)
        self._link.append(link)
        self._end.append(end)
        return len(self._length) - 1

    def match(self) -> tuple[int, int]:
        """(length of the longest suffix that occurred before, index just after its first occurrence)."""
        if not self.text:
            return 0, 0
        state = self._link[self._last]
        return self._length[state], self._end[state] + 1

    def continuation(self, count: int) -> list[int]:
        """What followed that occurrence: ``count`` tokens, a repetition going on past the end of the text."""
        start = self.match()[1]
        period = self.text[start : start + count]
        return [period[i % len(period)] for i in range(count)] if period else []
