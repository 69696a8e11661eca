"""Counters and times of one decoding run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Acceptance:
    """What became of drafts."""

    request_steps: int = 0
    """Steps, each counted for every request that took part."""
    proposed: int = 0
    accepted: int = 0
    """Drafts accepted by the verification, also those an end of sequence cut off."""
    proposed_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    """By index of the draft in its step; in a tree, by its depth."""

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

    def record(self) -> dict[str, Any]:
        """The same under the names of vLLM's metrics, for ``json.dump``.

        ``num_drafts`` are steps that drafted anything. ``mean_acceptance_length`` is their accepted drafts and one more
        token, ``acceptance_length_histogram`` the number of them by accepted drafts, where there were any.
        """
        at_least = [*self.proposed_at[:1], *self.accepted_at, 0]
        drafts = at_least[0]
        exactly = [more - less for more, less in pairwise(at_least)]
        return {
            "num_drafts": drafts,
            "num_draft_tokens": self.proposed,
            "num_accepted_tokens": self.accepted,
            "num_draft_tokens_per_pos": list(self.proposed_at),
            "num_accepted_tokens_per_pos": list(self.accepted_at),
            "draft_acceptance_rate": self.accepted / max(1, self.proposed),
            "mean_acceptance_length": 1 + self.accepted / max(1, drafts),
            "acceptance_length_histogram": {str(length): steps for length, steps in enumerate(exactly) if steps},
        }


@dataclass
class Statistics(Acceptance):
    """What happened, summed over requests; times in seconds."""

    steps: int = 0
    """Forward passes of the target, the prompt's not counted."""
    emitted: int = 0
    """Tokens of the text."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("prompt", "draft", "target", "verify"), 0.0)
    )
    invalid: int = 0
    """Steps of a request in which the target or the draft gave a row that was not usable."""
    requests: dict[int, Acceptance] = field(default_factory=dict)
    """Of each request, by the index of its prompt."""

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
        """Tokens of the text over the time after the prompt."""
        return self.emitted / max(1e-9, self.decode_seconds)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time of a block to ``seconds[what]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    def count_request(self, request: int, proposed: int, accepted: int, depth: int | None = None) -> None:
        """Add one step of a request, to its own counters and to the sums."""
        self.count(proposed, accepted, depth)
        self.requests.setdefault(request, Acceptance()).count(proposed, accepted, depth)

    def record(self) -> dict[str, Any]:
        """The sums, and the same of each request."""
        own = [{"request": index, **self.requests[index].record()} for index in sorted(self.requests)]
        return {**super().record(), "num_emitted_tokens": self.emitted, "num_steps": self.steps, "requests": own}
