"""Counters and times of one decoding run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """What happened, summed over requests; times in seconds."""

    steps: int = 0
    """Forward passes of the target, the prompt's not counted."""
    request_steps: int = 0
    """Steps summed over the requests that took part."""
    proposed: int = 0
    accepted: int = 0
    """Drafts accepted by the verification, also those an end of sequence cut off."""
    emitted: int = 0
    """Tokens of the text."""
    proposed_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    """By index of the draft in its step."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("prompt", "draft", "target", "verify"), 0.0)
    )
    invalid: int = 0
    """Steps of a request in which the target or the draft gave a row that was not usable."""

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens a request gains in a step."""
        return self.emitted / max(1, self.request_steps)

    @property
    def decode_seconds(self) -> float:
        """Time after the prompt."""
        return sum(self.seconds.values()) - self.seconds["prompt"]

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over the time after the prompt."""
        return self.emitted / max(1e-9, self.decode_seconds)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time of a block to ``seconds[what]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    def count(self, proposed: int, accepted: int, depth: int | None = None) -> None:
        """Add one request's step; ``depth`` of a tree of drafts, whose places are counted by depth."""
        self.request_steps += 1
        self.proposed += proposed
        self.accepted += accepted
        depth = proposed if depth is None else depth
        missing = depth - len(self.proposed_at)
        self.proposed_at += [0] * missing
        self.accepted_at += [0] * missing
        for index in range(depth):
            self.proposed_at[index] += 1
            self.accepted_at[index] += index < accepted
