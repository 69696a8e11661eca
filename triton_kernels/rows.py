"""Rows of logits: how they are loaded, measured into a table of their tiles, and what tokens of them weigh."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from specdec_kernels.contract import STEEP as _STEEP
from specdec_kernels.contract import TILE as _TILE
from specdec_kernels.triton_kernels.noise import FLAT_RACE, exponentials
from specdec_kernels.workspace import LEAST_TILES, NUMBERS_A_TILE

TILE = tl.constexpr(_TILE)
STEEP = tl.constexpr(_STEEP)
LOG2E = tl.constexpr(1.4426950408889634)
# Lanes of a warp that have a tile: each loads 16 bytes of every line of 128 that it lies in. So a warp loads four whole
# lines at a time, and what is reduced over a tile takes three shuffles, and no other warp.
LANES = tl.constexpr(8)
# Numbers of every tile in the table of a row: what is `measured`; from the third on, where there is no race, the same
# of the row that its draft was drawn from, or the weights of a residual; and at last what filters list.
NUMBERS, DRAFTS, LIST = tl.constexpr(NUMBERS_A_TILE), tl.constexpr(2), tl.constexpr(4)
# Tiles that are visited at a time, where few are visited: a thread has eight ids of them.
VISITED = tl.constexpr(LEAST_TILES)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Larger than any id: what a minimum over ids starts from.
NO_ID = tl.constexpr((1 << 31) - 1)


class Tree(NamedTuple):
    """The rows of one request, each by the node of its tree; those of a chain are a tree with one branch."""

    parents: Any
    """Pointer to int64 [nodes]; None where each follows the one before."""
    tokens: Any
    """Pointer to the token of the first node, which is none, and how far apart they are."""
    stride: Any
    nodes: Any
    """How many there are; what is behind them has no parent."""
    vocab: Any


class Processing(NamedTuple):
    """What :mod:`specdec_kernels.ops.processing` does to logits: it is done as they are loaded, and never written."""

    mask: Any
    """Pointer to the words of the first row."""
    masked: Any
    """Whether there is one."""
    ids: Any
    """Pointers to the request's logit adjustments."""
    counts: Any
    bias: Any
    count: Any
    penalties: Any
    """(repetition, presence, frequency)."""


class Reduced(NamedTuple):
    """Of rows that have some ids of the vocabulary only: the logits of the others are -inf."""

    columns: Any
    """Pointer to the column of each id; what is none, such as -1, is of an id that has no logit."""
    width: Any
    """Logits of a row."""


class Rows(NamedTuple):
    """The rows of one request as its distribution sees them. A kernel builds them where it stands, since a function of
    Triton cannot return None."""

    logits: Any
    """Pointer to the first row."""
    stride: Any
    vocab: Any
    tree: Any
    """A row counts the tokens on the path to it as output, but for row 0's; None where there is no ``processing``."""
    processing: Any
    reduced: Any
    """Each or None."""


class Distribution(NamedTuple):
    """What tokens are drawn from: three scalars, or the point mass on ``argmax`` where that is one."""

    scale: Any
    cutoff: Any
    logsumexp: Any
    """float64."""
    argmax: Any
    """-1, or the token of the point mass."""
    tile: Any
    """The winner of the tile race, if there was one."""


class Key(NamedTuple):
    """What noise is keyed on, beside its tag."""

    seed: Any
    position: Any


@triton.jit
def token_of(tree, node):
    return tl.load(tree.tokens + node * tree.stride).to(tl.int64)


@triton.jit
def parent_of(tree, node):
    return node - 1 if tree.parents is None else tl.load(tree.parents + node)


@triton.jit
def processing_of(
    mask_ptr, masked, ids_ptr, counts_ptr, bias_ptr, penalties_ptr, count, first_row, request, vocab
):  # fmt: skip
    """Of one request, whose rows begin at ``first_row`` of the mask."""
    own, some = penalties_ptr + 3 * request, count > 0
    penalties = tl.load(own, mask=some), tl.load(own + 1, mask=some), tl.load(own + 2, mask=some)
    first = request * count
    return Processing(
        mask_ptr + first_row * ((vocab + 31) // 32), masked, ids_ptr + first, counts_ptr + 2 * first,
        bias_ptr + first, count, penalties,
    )  # fmt: skip


@triton.jit
def adjusted(x, tree, processing, i, ids):
    """Logits of row i after bias and penalties."""
    step = tl.full([], 1, tl.int32)
    while step < processing.count:
        step *= 2
    below = tl.zeros_like(ids).to(tl.int32)  # how many adjusted ids are
    while step > 0:
        ahead = below + step
        fits = ahead <= processing.count
        fits = fits & (tl.load(processing.ids + ahead - 1, mask=fits, other=0).to(tl.int64) < ids)
        below = tl.where(fits, ahead, below)
        step //= 2
    fits = below < processing.count
    found = fits & (tl.load(processing.ids + below, mask=fits, other=0).to(tl.int64) == ids)
    repetition, presence, frequency = processing.penalties
    prompt = tl.load(processing.counts + 2 * below, mask=found, other=0)
    output = tl.load(processing.counts + 2 * below + 1, mask=found, other=0)
    node = i
    while node > 0:
        output += (token_of(tree, node) == ids).to(tl.int32)
        node = parent_of(tree, node)
    new = x + tl.load(processing.bias + below, mask=found, other=0.0)
    repeated = tl.where(new > 0, new / repetition, new * repetition)
    new = tl.where((output > 0) | (prompt > 0), repeated, new)
    new = tl.where(output > 0, new - (frequency * output.to(tl.float32) + presence), new)
    return tl.where(found, new, x)


@triton.jit
def load_raw(rows, i, ids, wanted):
    """Logits of ``ids`` in row i as they lie in memory; -inf past its end, and where they are not ``wanted``."""
    inside = (ids < rows.vocab) & wanted
    columns = ids
    if rows.reduced is not None:
        columns = tl.load(rows.reduced.columns + ids, mask=inside, other=-1)
        inside = columns.to(tl.uint32) < rows.reduced.width.to(tl.uint32)
    return tl.load(rows.logits + i * rows.stride + columns, mask=inside, other=float("-inf"))


@triton.jit
def processed(rows, i, ids, raw):
    """The same in float32, after what is done to them."""
    x = raw.to(tl.float32)
    if rows.processing is not None:
        if rows.processing.count > 0:
            x = adjusted(x, rows.tree, rows.processing, i, ids)
        if rows.processing.masked:
            words = rows.processing.mask + i * ((rows.vocab + 31) // 32)
            bits = tl.load(words + ids // 32, mask=ids < rows.vocab, other=0) >> (ids % 32).to(tl.int32)
            x = tl.where(bits & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def load_logits(rows, i, ids):
    """float32 logits of ``ids`` in row i; -inf past its end."""
    return processed(rows, i, ids, load_raw(rows, i, ids, True))


@triton.jit
def ids_of(tiles):
    """Ids of some tiles: [.., TILE]."""
    return tiles.to(tl.int32)[:, None] * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def block_ids(rows, start, TILES: tl.constexpr):
    """Ids of a block that starts at tile ``start``, by the lines of 128 bytes that their logits lie in: [lines, TILES,
    ids of a line]. Where it has fewer tiles than four a warp, lines are twice as long, so that none has half a tile."""
    LINE: tl.constexpr = (2048 if TILES < 32 else 1024) // rows.logits.dtype.element_ty.primitive_bitwidth
    lines = tl.arange(0, TILE // LINE)[:, None, None] * LINE + tl.arange(0, LINE)[None, None, :]
    return (start + tl.arange(0, TILES)).to(tl.int32)[None, :, None] * TILE + lines


@triton.jit
def in_tiles(x):
    """What is known of ids of tiles: [tiles, TILE]. Nothing moves."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (x.shape[1], TILE))


@triton.jit
def ids_in(tile):
    """Ids of one tile: [TILE]."""
    return tile.to(tl.int32) * TILE + tl.arange(0, TILE)


@triton.jit
def usable_base(maximum):
    """Subtracting -inf from -inf would give nan where the sum is 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def gap(base, scale, x):
    """scale * (x - base) to base 2; in halves: the difference of two floats may be none."""
    return (0.5 * x - 0.5 * usable_base(base)) * (2.0 * LOG2E * scale)


@triton.jit
def weights_from(base, scale, x):
    """exp(scale * (x - base)), 0 where that is no normal float."""
    return tl.exp2(gap(base, scale, x))


@triton.jit
def measured(logits, ids, scale, race):
    """Of tiles of logits [.., TILE] the largest, and the sum of exp(scale * (logit - that)). A nan or +inf shows in the
    sum; then the maximum says nothing. With a ``race`` of all ids also who of the tile comes first by these weights:
    when, and who."""
    maxima = tl.max(logits, axis=1)
    gaps = gap(maxima[:, None], scale, logits)
    sums = tl.sum(tl.exp2(gaps), axis=1)
    if race is None:
        return maxima, sums
    else:  # noqa: RET505 - of a constant: one of the two is compiled
        # The largest has weight 1, so none without weight comes first.
        times = exponentials(race.seed, race.position, tl.full([], FLAT_RACE, tl.int64), ids) * tl.exp2(-gaps)
        first = tl.min(times, axis=1)
        winners = tl.min(tl.where(times == first[:, None], ids, NO_ID), axis=1)
        return maxima, sums, first, winners.to(tl.float32, bitcast=True)


@triton.jit
def slice_of(vocab, part, slices, TILES: tl.constexpr):
    """The first tile of one of the ``slices`` of a row, in whole blocks, and where it ends."""
    tiles = tl.cdiv(vocab, TILE)
    size = tl.cdiv(tl.cdiv(tiles, TILES), slices) * TILES
    return part * size, tl.minimum((part + 1) * size, tiles)


@triton.jit
def measure(rows, i, scale, race, part, slices, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """What is ``measured`` of the tiles of one of the ``slices`` of row i, written to ``table [2 or 4, ENTRIES]``.

    All else that is asked about a row is read from its table, so it does not matter which program measured which tile.
    """
    first, last = slice_of(rows.vocab, part, slices, TILES)
    ahead = load_raw(rows, i, block_ids(rows, first, TILES), first < last)
    for start in tl.range(first, last, TILES, num_stages=1):
        raw = ahead  # the next block comes while this one is summed
        ahead = load_raw(rows, i, block_ids(rows, start + TILES, TILES), start + TILES < last)
        ids = block_ids(rows, start, TILES)
        found = measured(in_tiles(processed(rows, i, ids, raw)), in_tiles(ids), scale, race)
        store_tiles(table, start + tl.arange(0, TILES), last, found, ENTRIES)


@triton.jit
def store_tiles(table, tiles, last, found, ENTRIES: tl.constexpr):
    """The numbers that were ``found`` of ``tiles`` before ``last`` into a table. Each lane of a tile knows all of them
    and stores one: with the lanes in the shape, and nothing said of neighbours, Triton leaves the numbers where they
    are, and no warp waits for the others."""
    lane = tl.arange(0, LANES)[None, :]
    slots = tl.max_contiguous(tiles[:, None] + lane * ENTRIES, (1, 1))
    own = found[0][:, None]
    for number in tl.static_range(1, len(found)):
        own = tl.where(lane < number, own, found[number][:, None])
    tl.store(table + slots, own, mask=(lane < len(found)) & (tiles < last)[:, None])


@triton.jit
def grouped_tiles(ENTRIES: tl.constexpr):
    """All tiles, in ``VISITED`` groups: [VISITED, ENTRIES // VISITED]. A warp has whole ones."""
    SIZE: tl.constexpr = ENTRIES // VISITED
    return tl.arange(0, VISITED)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def first_of_groups(keys, tiles, ENTRIES: tl.constexpr):
    """Of each group its smallest key, and the tile that has it: [VISITED]. Where that is inf, ENTRIES: a tile without
    ids."""
    smallest = tl.min(keys, axis=1)
    found = (keys == smallest[:, None]) & (keys < float("inf"))
    return smallest, tl.min(tl.where(found, tiles, ENTRIES), axis=1)


@triton.jit
def load_table(table, tiles, vocab, ENTRIES: tl.constexpr):
    """(maxima, sums) of tiles."""
    there = tiles < tl.cdiv(vocab, TILE)
    maxima = tl.load(table + tiles, mask=there, other=float("-inf"))
    return maxima, tl.load(table + ENTRIES + tiles, mask=there, other=0.0)


@triton.jit
def is_steep(scale, top):
    """Whether a row weighs nothing but its largest logits (docs/noise.md)."""
    return tl.abs(scale * top) >= STEEP


@triton.jit
def scalars_of(scale, cutoff, total, top):
    """(scale, cutoff, logsumexp) of a valid row, from its summary; ``cutoff``: the smallest logit that is kept."""
    steep = is_steep(scale, top)
    scale = tl.where(steep, 0.0, scale)
    logsumexp = scale.to(tl.float64) * top.to(tl.float64) + tl.log(total)
    return scale, tl.where(steep, top, cutoff), logsumexp


@triton.jit
def largest_finite(rows, i, first, last, TILES: tl.constexpr):
    """The first of the largest finite logits of some tiles of row i; 0 where none is finite."""
    token = tl.full([], 0, tl.int32)
    best = tl.full([], float("-inf"), tl.float32)
    for start in tl.range(first, last, TILES, num_stages=1):
        ids = block_ids(rows, start, TILES)
        logits = load_logits(rows, i, ids)
        logits = tl.where(logits < float("inf"), logits, float("-inf"))
        top = tl.max(logits)
        if top > best:
            token = tl.min(tl.where(logits == top, ids, NO_ID))
            best = top
    return token.to(tl.int64)


@triton.jit
def split(x):
    """A float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def fma(x, y, z):
    """Triton's interpreter rounds the product."""
    if INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:  # noqa: RET505 - of a constant: one of the two is compiled
        return tl.fma(x, y, z)


@triton.jit
def probs(logits, distribution):
    """[logit >= cutoff] * exp(scale * logit - logsumexp), the logsumexp as a sum of two floats."""
    high, low = split(distribution.logsumexp)
    weights = tl.exp2((fma(logits, distribution.scale, -high) - low) * LOG2E)
    return tl.where(logits < distribution.cutoff, 0.0, weights)


@triton.jit
def log_prob(logit, distribution, token):
    """Of one token of a valid row by its logit, float64."""
    sampled = distribution.scale.to(tl.float64) * logit.to(tl.float64) - distribution.logsumexp
    sampled = tl.where(logit < distribution.cutoff, float("-inf"), sampled)
    certain = tl.where(token == distribution.argmax, 0.0, float("-inf"))
    return tl.where(distribution.argmax < 0, sampled, certain)
