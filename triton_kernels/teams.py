"""Programs that work on one row together: each measures a slice, and the last to finish goes on alone. Nobody waits for
anybody, so nothing depends on which programs run at a time."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec_kernels.triton_kernels.rows import TILE, tabulate


@triton.jit
def arrive(counter, others):
    """Whether this program is the last of ``others + 1`` to come here; it sees what all of them wrote before."""
    tl.debug_barrier()  # all threads have written
    before = tl.atomic_add(counter, 1)
    tl.debug_barrier()
    return before == others


@triton.jit
def seen(flag):
    """A number that other programs may raise meanwhile, the same for all threads: one looks, and tells the others."""
    return tl.atomic_add(flag, 0)


@triton.jit
def measure(rows, i, scale, part, slices, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Slice ``part`` of row i, in whole blocks."""
    tiles = tl.cdiv(rows.vocab, TILE)
    size = tl.cdiv(tl.cdiv(tiles, TILES), slices) * TILES
    first = part * size
    lowest = tl.full([], float("-inf"), tl.float32)
    tabulate(rows, i, first, tl.minimum(first + size, tiles), scale, lowest, table, ENTRIES, TILES)
