"""What drafting and scoring take, measured as it goes or told, for drafters that choose how much to draft."""

from __future__ import annotations

import time
from collections.abc import Sequence


class LinearCost:
    """Seconds as a line in one number, fitted to the measurements so far; older ones fade.

    Args:
        slope: what the line rises by, relative to the mean of what was measured, as far as all of it was at one place.
        origin: where most measurements lie.
    """

    FADING = 0.98
    #: Weight of the assumed slope, in measurements a unit of squared distance.
    TRUST = 4.0
    #: A measurement this many times what was expected says that something else ran: it counts as this much.
    SURPRISE = 1.5

    def __init__(self, slope: float, origin: float) -> None:
        self._slope, self._origin = slope, origin
        self._sums = [0.0] * 5  # weights, x, xx, y, xy
        self._at_origin = self._rise = 0.0

    def add(self, x: float, seconds: float) -> None:
        """One measurement."""
        if self._sums[0] > 3:
            seconds = min(seconds, self.SURPRISE * self.at(x))
        x -= self._origin
        self._sums = [
            self.FADING * old + new for old, new in zip(self._sums, (1.0, x, x * x, seconds, x * seconds), strict=True)
        ]
        n, sx, sxx, sy, sxy = self._sums
        # The assumed slope is a measurement of its own, made where it pulls on nothing but the slope.
        assumed = self._slope * sy / n
        mean_x, mean_y = sx / n, sy / n
        spread = sxx - n * mean_x**2 + self.TRUST
        self._rise = max(0.0, (sxy - n * mean_x * mean_y + self.TRUST * assumed) / spread)
        self._at_origin = mean_y - self._rise * mean_x

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._sums[0] > 0

    def at(self, x: float) -> float:
        """Expected seconds; 0 before anything was measured."""
        return max(1e-9, self._at_origin + self._rise * (x - self._origin)) if self.known else 0.0


class BentCost(LinearCost):
    """A line, bent where the measurements at a whole number say so: in float32 on a CPU a pass over three rows takes
    longer than one over five, and twice as long as one over a single row. What a place is apart from the line outlives
    what the machine does to all of it."""

    #: Weight of the line, in measurements at a place.
    BEND_TRUST = 2.0

    def __init__(self, slope: float, origin: float) -> None:
        super().__init__(slope, origin)
        self._bends: dict[int, tuple[float, float]] = {}  # weights, and of the line the sum of what was measured

    def add(self, x: float, seconds: float) -> None:
        super().add(x, seconds)
        weight, total = self._bends.get(round(x), (0.0, 0.0))
        self._bends[round(x)] = self.FADING * weight + 1, self.FADING * total + seconds / super().at(x)

    def at(self, x: float) -> float:
        weight, total = self._bends.get(round(x), (0.0, 0.0))
        return super().at(x) * (total + self.BEND_TRUST) / (weight + self.BEND_TRUST)


class KnownCost(LinearCost):
    """A line that is known and not measured."""

    def __init__(self, at_zero: float, rise: float) -> None:
        super().__init__(slope=0.0, origin=0.0)
        self._at_origin, self._rise = at_zero, rise

    def add(self, x: float, seconds: float) -> None:
        """Nothing is learnt."""

    @property
    def known(self) -> bool:
        return True


class Costs:
    """Measured seconds of a step without its drafts, by requests and by rows of the target's pass, of which each
    request has as many as the one with the most. The drafters of one target share it, since each of them sees only some
    of the steps."""

    #: Steps with drafts before one without is timed again: it is what all others are compared with.
    PLAIN_EVERY = 128

    def __init__(self) -> None:
        self._of_batches: dict[int, LinearCost] = {}
        self._steps: dict[int, int] = {}  # since one without drafts
        self._pass, self._since = (0, 0), 0.0

    def drafting(self) -> LinearCost:
        """Of drafting, by drafts; for a drafter of its own."""
        return LinearCost(slope=0.5, origin=1.0)

    def gained(self, tokens: Sequence[float]) -> float:
        """What is gained in all by tokens that each request gains."""
        return sum(tokens)

    def step(self, batch: int) -> LinearCost:
        """Of steps of so many requests, by rows of each."""
        return self._of_batches.setdefault(batch, BentCost(slope=0.02, origin=1.0))

    def plain_is_due(self, batch: int) -> bool:
        """Whether the next step of so many requests should do without drafts."""
        return self._steps.get(batch, self.PLAIN_EVERY) >= self.PLAIN_EVERY

    def proposed(self, batch: int, rows: int) -> None:
        """A drafter has spoken; now the target scores, unless another drafter speaks too."""
        self._pass, self._since = (batch, max(self._pass[1], rows)), time.perf_counter()

    def scored(self) -> None:
        """The step is over; the first drafter to say so counts."""
        batch, rows = self._pass
        if rows:
            self.step(batch).add(rows, time.perf_counter() - self._since)
            self._steps[batch] = 0 if rows == 1 else self._steps.get(batch, 0) + 1
        self._pass = (0, 0)


class RowCosts(Costs):
    """Costs that are assumed, of drafts that cost nothing, in a batch of which no request is replaced when it ends: so
    what is drafted is a function of the text and of no clock, and the same seed gives the same text.

    Args:
        row: what another row takes of the time that a pass over one row takes.
    """

    def __init__(self, row: float) -> None:
        super().__init__()
        self.row = row

    def drafting(self) -> LinearCost:
        return KnownCost(0.0, 0.0)

    def gained(self, tokens: Sequence[float]) -> float:
        """For each as much as the least gains: the batch ends with its slowest request, and what others gain before
        saves no pass."""
        return len(tokens) * min(tokens)

    def step(self, batch: int) -> LinearCost:
        return KnownCost(1.0 - self.row, self.row * batch)  # a pass of one request over one row is 1

    def plain_is_due(self, batch: int) -> bool:
        return False

    def proposed(self, batch: int, rows: int) -> None:
        """Nothing is measured."""

    def scored(self) -> None:
        """Likewise."""
