"""Rows of logits: how they are loaded, measured into a table of their tiles, and what tokens of them weigh."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from specdec_kernels.contract import STEEP as _STEEP
from specdec_kernels.contract import TILE as _TILE

TILE = tl.constexpr(_TILE)
STEEP = tl.constexpr(_STEEP)
# Blocks of a row that are requested before the first is there, and one: 20 KB of bfloat16 a program, since a
# multiprocessor needs 30 KB under way to keep its memory busy (gpu/measured.md: 12 KB were not enough).
STAGES = tl.constexpr(6)
# Of reduced rows the columns are what is requested ahead: two blocks of them are no more bytes than five of bfloat16.
REDUCED_STAGES = tl.constexpr(3)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Larger than any id: what a minimum over ids starts from.
NO_ID = tl.constexpr(1 << 40)


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
def load_logits(rows, i, ids):
    """float32 logits of ``ids`` in row i; -inf past its end."""
    inside = ids < rows.vocab
    columns = ids
    if rows.reduced is not None:
        columns = tl.load(rows.reduced.columns + ids, mask=inside, other=-1)
        inside = columns.to(tl.uint32) < rows.reduced.width.to(tl.uint32)
    x = tl.load(rows.logits + i * rows.stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if rows.processing is not None:
        if rows.processing.count > 0:
            x = adjusted(x, rows.tree, rows.processing, i, ids)
        if rows.processing.masked:
            words = rows.processing.mask + i * ((rows.vocab + 31) // 32)
            bits = tl.load(words + ids // 32, mask=inside, other=0) >> (ids % 32).to(tl.int32)
            x = tl.where(bits & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def ids_of(tiles):
    """Ids of some tiles: [.., TILE]."""
    return tiles[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def block_ids(start, TILES: tl.constexpr):
    """Ids of a block that starts at tile ``start``: [TILES, TILE]."""
    return ids_of(start + tl.arange(0, TILES))


@triton.jit
def ids_in(tile):
    """Ids of one tile: [TILE]."""
    return tile * TILE + tl.arange(0, TILE)


@triton.jit
def usable_base(maximum):
    """Subtracting -inf from -inf would give nan where the sum is 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def gap(scale, x, base):
    """scale * (x - base), in halves: the difference of two floats may be none."""
    return 2.0 * scale * (0.5 * x - 0.5 * base)


@triton.jit
def tile_sums(logits, scale):
    """Of tiles of logits [.., TILE] the largest, and the sum of exp(scale * (logit - that)). A nan or +inf shows in the
    sum and not in the maximum."""
    maxima = tl.max(tl.where(logits < float("inf"), logits, float("-inf")), axis=1)
    return maxima, tl.sum(tl.exp(gap(scale, logits, usable_base(maxima)[:, None])), axis=1)


@triton.jit
def slice_of(vocab, part, slices, TILES: tl.constexpr):
    """The first tile of one of the ``slices`` of a row, in whole blocks, and where it ends."""
    tiles = tl.cdiv(vocab, TILE)
    size = tl.cdiv(tl.cdiv(tiles, TILES), slices) * TILES
    return part * size, tl.minimum((part + 1) * size, tiles)


@triton.jit
def measure(rows, i, scale, part, slices, table, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """One of the ``slices`` of row i: of each tile the largest logit and the sum of exp(scale * (logit
    - that)), written to ``table [2, ENTRIES]``.

    All else that is asked about a row is read from its table, so it does not matter which program measured which tile.
    """
    first, last = slice_of(rows.vocab, part, slices, TILES)
    for start in tl.range(first, last, TILES, num_stages=STAGES if rows.reduced is None else REDUCED_STAGES):
        maxima, sums = tile_sums(load_logits(rows, i, block_ids(start, TILES)), scale)
        own = start + tl.arange(0, TILES)
        tl.store(table + own, maxima, mask=own < last)
        tl.store(table + ENTRIES + own, sums, mask=own < last)


@triton.jit
def grouped_tiles(ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """All tiles, dealt out to ``TILES`` groups: [TILES, ENTRIES // TILES]."""
    columns = tl.arange(0, ENTRIES // TILES)[None, :]
    return columns * TILES + tl.arange(0, TILES)[:, None]


@triton.jit
def first_of_groups(keys, tiles, ENTRIES: tl.constexpr):
    """Of each group its smallest key, and the tile that has it: [TILES]. Where that is inf, ENTRIES: a tile without
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
def largest_token(rows, i, top, tile):
    """The first id in ``tile`` that has the row's largest logit; 0 where no logit is finite."""
    ids = ids_in(tile)
    token = tl.min(tl.where(load_logits(rows, i, ids) == top, ids, NO_ID))
    return tl.where(top > float("-inf"), token, 0)


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
    return tl.where(logits < distribution.cutoff, 0.0, tl.exp(fma(logits, distribution.scale, -high) - low))


@triton.jit
def log_prob(logit, distribution, token):
    """Of one token of a valid row by its logit, float64."""
    sampled = distribution.scale.to(tl.float64) * logit.to(tl.float64) - distribution.logsumexp
    sampled = tl.where(logit < distribution.cutoff, float("-inf"), sampled)
    certain = tl.where(token == distribution.argmax, 0.0, float("-inf"))
    return tl.where(distribution.argmax < 0, sampled, certain)
