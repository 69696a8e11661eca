"""How programs of one launch work together: each does its part and arrives, and the last to arrive goes on. But for
:func:`wait`, no program waits for another, so nothing depends on which programs run at a time."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.triton_kernels.request import NEXT, STATE
from specdec_kernels.triton_kernels.rows import parent_of

# In the counter of a row, above the programs that arrived: it was judged; the path goes through it.
ARRIVALS = tl.constexpr(1 << 20)
JUDGED, REACHED = tl.constexpr(1 << 20), tl.constexpr(1 << 21)
# Further than any row: the path has ended.
ENDED = tl.constexpr(1 << 20)


@triton.jit
def arrive(counter, others):
    """Whether this program is the last of ``others + 1`` to come here; it sees what all of them wrote before, and
    leaves their number at 0. Only the last acquires: that costs a microsecond, and flushes what was under way."""
    last = others == 0
    tl.debug_barrier()  # all threads have written
    if others > 0:
        last = tl.atomic_add(counter, 1, sem="release") % ARRIVALS == others
        if last:
            tl.atomic_add(counter, -(others + 1), sem="acquire")
    tl.debug_barrier()
    return last


@triton.jit
def load_relaxed(counter):
    """A number that other programs may raise meanwhile, the same for all threads: one looks, and tells the others."""
    return tl.atomic_add(counter, 0, sem="relaxed")


@triton.jit
def wait(counter, least):
    """Until ``counter`` is at ``least``. Only for what programs with an earlier :func:`ticket` do: they have begun, so
    that one which waits never keeps them from it."""
    while tl.atomic_add(counter, 0, sem="acquire") < least:
        pass
    tl.debug_barrier()


@triton.jit
def ticket(counter, programs):
    """In which order this program of ``programs`` began; the last leaves the counter at 0."""
    own = tl.atomic_add(counter, 1, sem="relaxed")
    if own == programs - 1:
        tl.atomic_add(counter, -programs, sem="relaxed")
    return own


@triton.jit
def passed_by(frontier, tree, row):
    """Whether the path is known not to come through ``row``. Rows follow the rows they depend on, so those on the path
    ascend, and ``frontier`` holds the last one that is known."""
    known = load_relaxed(frontier)
    at = row.to(tl.int32)
    if tree.parents is not None:
        while (at > known) & (known < ENDED):
            at = parent_of(tree, at).to(tl.int32)
    return (known == ENDED) | (at < known)


@triton.jit
def follow(counters, frontier, states, row):
    """After ``row`` was judged: the last row of the path, or -1 where another program will find it. Whoever comes
    second of the judge of a row and the path to it goes on."""
    end = tl.full([], -1, tl.int64)
    tl.debug_barrier()  # all threads have written
    going = (tl.atomic_add(counters + row, JUDGED) >= REACHED) | (row == 0)
    while going:
        following = tl.load(states + row * STATE + NEXT).to(tl.int64)
        if following < 0:
            end = row
            going = tl.full([], 0, tl.int1)
            tl.atomic_max(frontier, ENDED, sem="relaxed")
        else:
            row = following
            tl.atomic_max(frontier, row.to(tl.int32), sem="relaxed")
            before = tl.atomic_add(counters + row, REACHED)
            going = before % REACHED >= JUDGED
    tl.debug_barrier()
    return end


@triton.jit
def zero(counters, rows):
    """Leave the counters of so many rows at 0."""
    for row in range(0, rows):
        tl.store(counters + row, 0)
