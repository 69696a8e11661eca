"""Requests that arrive at given times, served in batches or as they come, with the time of every token."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec_kernels.decode import Drafter, Sampling, Scheduler, Statistics, Target, Token, stream
from specdec_kernels.decode.submission import Submission
from specdec_kernels.ops import RuleName

#: Drafts a step at most, where nothing else is said.
NUM_DRAFT = 4


@dataclass(frozen=True)
class Request:
    """One request of a benchmark."""

    prompt: list[int]
    max_new_tokens: int
    arrives: float = 0.0
    """Seconds after the start."""
    seed: int = 0


@dataclass
class Served:
    """What became of one, seconds after the start."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each token came."""
    drafted: list[bool] = field(default_factory=list)
    finished: bool = False

    @property
    def first(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.times[0] - self.request.arrives

    def note(self, token: Token, at: float) -> None:
        """A token of it that came now."""
        self.tokens.append(token.token)
        self.drafted.append(token.drafted)
        self.times.append(at)
        self.finished = bool(token.finished)

    def latencies(self) -> list[float]:
        """Of every token behind those of the first step: its share of the time since the step before, as tokens that
        come together have waited together."""
        found: list[float] = []
        since, waiting = None, 0
        for index, (at, drafted) in enumerate(zip(self.times, self.drafted, strict=True)):
            waiting += 1
            if drafted and index + 1 < len(self.times):
                continue  # the step's last token is none that was drafted, unless the text ends before it
            if since is not None:
                found += [(at - since) / waiting] * waiting
            since, waiting = at, 0
        return found


@dataclass(frozen=True)
class Service:
    """How requests are served.

    Args:
        target, drafter, num_draft, rule: as of :func:`~specdec_kernels.decode.stream`.
        sampling: of all requests.
        most: requests that are decoded together at most.
        dynamic: have them join while others run; else a batch runs until all of its requests have ended.
    """

    target: Target
    drafter: Drafter | None = None
    num_draft: int = NUM_DRAFT
    rule: RuleName = "token"
    sampling: Sampling = field(default_factory=Sampling)
    most: int = 1
    dynamic: bool = False

    def serve(
        self, requests: Sequence[Request], seconds: float = float("inf"), statistics: Statistics | None = None
    ) -> list[Served]:
        """All of them, in the order they arrive in; what takes more than so many seconds is cut off."""
        served = [Served(request) for request in requests]
        statistics = Statistics() if statistics is None else statistics
        self._scheduled(served, seconds, statistics) if self.dynamic else self._batches(served, seconds, statistics)
        return served

    def _batches(self, served: list[Served], seconds: float, statistics: Statistics) -> None:
        clock, waiting = Clock(seconds), list(served)
        while waiting and not clock.over:
            clock.wait_for(waiting[0].request.arrives)
            due = [own for own in waiting[: self.most] if own.request.arrives <= clock.now]
            waiting = waiting[len(due) :]
            for token in self._stream([own.request for own in due], statistics):
                due[token.request].note(token, clock.now)
                if clock.over:
                    return

    def _stream(self, requests: list[Request], statistics: Statistics) -> Iterator[Any]:
        return stream(
            self.target,
            [request.prompt for request in requests],
            drafter=self.drafter,
            num_draft=self.num_draft,
            max_new_tokens=[request.max_new_tokens for request in requests],
            seed=[request.seed for request in requests],
            rule=self.rule,
            statistics=statistics,
            **vars(self.sampling),
        )

    def _scheduled(self, served: list[Served], seconds: float, statistics: Statistics) -> None:
        scheduler = Scheduler(
            self.target, self.drafter, num_draft=self.num_draft, max_requests=self.most, rule=self.rule,
            statistics=statistics,
        )  # fmt: skip
        clock, waiting, busy = Clock(seconds), list(served), False
        running: list[tuple[Served, Submission]] = []
        while (waiting or busy) and not clock.over:
            if not busy:
                clock.wait_for(waiting[0].request.arrives)
            while waiting and waiting[0].request.arrives <= clock.now:
                running.append((waiting[0], self._submitted(scheduler, waiting.pop(0).request)))
            busy = scheduler.step()
            now = clock.now
            for own, submission in running:
                while (token := submission.take()) is not None:
                    own.note(token, now)
            running = [(own, submission) for own, submission in running if not own.finished]

    def _submitted(self, scheduler: Scheduler, request: Request) -> Submission:
        return scheduler.submit(
            request.prompt, sampling=self.sampling, max_new_tokens=request.max_new_tokens, seed=request.seed
        )


class Clock:
    """Seconds since it was made."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.perf_counter(), seconds

    @property
    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._start

    @property
    def over(self) -> bool:
        """Whether there were as many as it was made for."""
        return self.now > self._seconds

    def wait_for(self, moment: float) -> None:
        """Sleep until then."""
        time.sleep(max(0.0, moment - self.now))


def quantile(values: Sequence[float], share: float) -> float:
    """The least of some values that at least such a share of them does not exceed; nan where there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else float("nan")
