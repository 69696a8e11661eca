"""``tree_attention``: flash decoding. Programs share the context only where requests and heads leave multiprocessors
without work; then a second kernel puts their parts together. Semantics: :mod:`specdec_kernels.ops.attention`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.triton_kernels import launch
from specdec_kernels.triton_kernels.rows import INTERPRETED, LOG2E
from specdec_kernels.workspace import power_of_two

#: Tokens of the context that a program has at least, and programs for each multiprocessor, at a time or in turn.
LEAST_SPLIT, PROGRAMS_EACH = 256, 2
#: Rows that a program puts together.
COMBINED = 16


@triton.jit
def attend(query, key, value, seen, scale, best, total, mixed, MASKED: tl.constexpr):
    """Some keys [WIDE, KEYS] and values [KEYS, WIDE] more: the largest score, sum and mix of values of [ROWS] queries,
    in powers of two. ``scale`` is positive: the largest product is the largest score."""
    if INTERPRETED:  # whose dot is wrong in bfloat16
        query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    products = tl.dot(query, key, input_precision="ieee")
    if MASKED:
        products = tl.where(seen, products, float("-inf"))
    now = tl.maximum(best, tl.max(products, axis=1) * scale)
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(products * scale - base[:, None])
    fade = tl.exp2(best - base)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
    return now, total * fade + tl.sum(weights, axis=1), mixed


@triton.jit(do_not_specialize=["nodes", "rows", "split", "kv_heads", "splits", "words", "longest"])
def tree_attention_kernel(
    query_ptr, key_ptr, value_ptr, packed_ptr, context_ptr, out_ptr, mixed_ptr, sums_ptr, scale, nodes, rows, kv_heads,
    group, split, splits, words, longest, q_batch, q_head, q_node, k_batch, k_head, k_token, v_batch, v_head, v_token,
    o_batch, o_head, o_node, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows are the nodes of all query heads that share a key head. Programs of the same keys are neighbours, so that
    they read them from the cache. Whole blocks of the context first; then its rest and the tree, which lies behind."""
    blocks = tl.cdiv(rows, ROWS)
    keys_of, part = tl.program_id(0) // blocks, tl.program_id(1)
    b, head = (keys_of // kv_heads).to(tl.int64), (keys_of % kv_heads).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    live = row < rows
    node, of_group = row % nodes, row // nodes
    entry = tl.arange(0, WIDE)
    inside = entry < WIDTH
    own = live[:, None] & inside[None, :]
    query = query_ptr + b * q_batch + head * group * q_head + entry[None, :]
    query += of_group[:, None].to(tl.int64) * q_head + node[:, None].to(tl.int64) * q_node
    query = tl.load(query, mask=own, other=0.0)
    keys = key_ptr + b * k_batch + head * k_head + entry[:, None]
    values = value_ptr + b * v_batch + head * v_head + entry[None, :]
    length = tl.minimum(tl.load(context_ptr + b), longest)  # whatever it says, only the cache is read
    first = part.to(tl.int64) * split
    last = tl.minimum(length, first + split)
    ends_here = (first <= length) & ((length < first + split) | (part == splits - 1))
    stop = tl.where(ends_here, length + nodes, last)
    whole = first + tl.maximum(last - first, 0) // KEYS * KEYS
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for start in tl.range(first, whole, KEYS, num_stages=STAGES):
        token = start + tl.arange(0, KEYS)
        key = tl.load(keys + token[None, :] * k_token, mask=inside[:, None], other=0.0)
        value = tl.load(values + token[:, None] * v_token, mask=inside[None, :], other=0.0)
        best, total, mixed = attend(query, key, value, live, scale, best, total, mixed, False)
    FEW: tl.constexpr = ROWS // 2 if ROWS > 32 else 16  # no more than registers hold
    for start in tl.range(whole, stop, FEW, num_stages=1):
        token = start + tl.arange(0, FEW)
        there = token < stop
        key = tl.load(keys + token[None, :] * k_token, mask=inside[:, None] & there[None, :], other=0.0)
        value = tl.load(values + token[:, None] * v_token, mask=there[:, None] & inside[None, :], other=0.0)
        other = tl.maximum(token - length, 0)
        bits = packed_ptr + b * nodes * words + node[:, None] * words + other[None, :] // 32
        seen, in_tree = live[:, None] & there[None, :], (token >= length)[None, :]
        word = tl.load(bits, mask=seen & in_tree, other=-1)  # all of the context is seen
        seen = seen & ((word >> (other[None, :] % 32)) & 1 != 0)
        best, total, mixed = attend(query, key, value, seen, scale, best, total, mixed, True)
    if splits == 1:
        out = out_ptr + b * o_batch + head * group * o_head + entry[None, :]
        out += of_group[:, None].to(tl.int64) * o_head + node[:, None].to(tl.int64) * o_node
        tl.store(out, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=own)
    else:
        slot = (keys_of.to(tl.int64) * splits + part) * rows + row
        tl.store(sums_ptr + 2 * slot, best, mask=live)
        tl.store(sums_ptr + 2 * slot + 1, total, mask=live)
        tl.store(mixed_ptr + slot[:, None] * WIDTH + entry[None, :], mixed, mask=own)


@triton.jit(do_not_specialize=["nodes", "rows", "splits", "kv_heads"])
def combine_kernel(
    out_ptr, mixed_ptr, sums_ptr, nodes, rows, kv_heads, group, splits, o_batch, o_head, o_node, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b, head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    entry = tl.arange(0, WIDE)
    own = live[:, None] & (entry < WIDTH)[None, :]
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for part in range(0, splits):
        slot = (tl.program_id(0).to(tl.int64) * splits + part) * rows + row
        its_best = tl.load(sums_ptr + 2 * slot, mask=live, other=float("-inf"))
        now = tl.maximum(best, its_best)
        base = tl.where(now == float("-inf"), 0.0, now)
        fade, share = tl.exp2(best - base), tl.exp2(its_best - base)
        total = total * fade + tl.load(sums_ptr + 2 * slot + 1, mask=live, other=0.0) * share
        more = tl.load(mixed_ptr + slot[:, None] * WIDTH + entry[None, :], mask=own, other=0.0)
        mixed = mixed * fade[:, None] + more * share[:, None]
        best = now
    out = out_ptr + b * o_batch + (head * group + row // nodes)[:, None] * o_head
    out += (row % nodes).to(tl.int64)[:, None] * o_node + entry[None, :]
    tl.store(out, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=own)


@dataclass(frozen=True)
class AttentionConfig:
    """What is compiled in: rows of a program, keys at a time and how many of those are under way; and its warps."""

    ROWS: int
    KEYS: int
    STAGES: int
    num_warps: int


def attention_config(rows: int, wide: int, element: int, of: launch.Multiprocessor) -> AttentionConfig:
    """For heads of ``wide`` elements of so many bytes.

    A warpgroup multiplies 64 rows at a time. Two of them read keys half as often as one does, which L2 is too slow for.
    With one, a multiprocessor has two programs, of which one multiplies while the other takes exponentials.
    """
    narrow = wide * element <= 256
    large = of.warpgroups and narrow and element == 2 and rows > 64
    keys = 128 if large else 64 if narrow else 32
    capacity = of.shared // (wide * element) - 2 * keys  # for rows, beside the keys and values of one stage
    fitting = power_of_two(max(16, capacity) + 1) // 2
    together = min(32 if element == 4 else 128 if large else 64, max(16, power_of_two(rows)), fitting)
    stages = 1 + (capacity - together) // (2 * keys)
    warps = 4 if together < 64 or (of.warpgroups and narrow and not large) else 8
    return AttentionConfig(together, keys, max(1, min(stages, 2 if large else 3)), warps)


def context_splits(tokens: int, keys: int, programs: int, processors: int) -> tuple[int, int]:
    """(splits of a context of so many tokens, tokens of each): as many as keep every multiprocessor busy where there
    are so many ``programs`` without any."""
    wanted = max(1, PROGRAMS_EACH * processors // programs)
    count = max(1, min(wanted, tokens // LEAST_SPLIT))
    return count, triton.cdiv(triton.cdiv(tokens, count), keys) * keys


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    batch, heads, nodes, width = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    group = heads // kv_heads
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query)
    if not out.numel():
        return out
    rows, wide = group * nodes, max(16, power_of_two(width))
    config = attention_config(rows, wide, query.element_size(), launch.multiprocessor_of(query.device))
    programs = batch * kv_heads * triton.cdiv(rows, config.ROWS)
    splits, split = context_splits(tokens - nodes, config.KEYS, programs, launch.processors_of(query.device))
    if scale <= 0:
        query, scale = query * float(-(scale < 0)), abs(scale) or 1.0
    mixed, sums = out, out
    if splits > 1:
        mixed = query.new_empty((batch * kv_heads, splits, rows, width), dtype=torch.float32)
        sums = query.new_empty((batch * kv_heads, splits, rows, 2), dtype=torch.float32)
    tree_attention_kernel[(programs, splits)](
        query, key, value, packed, context_lens, out, mixed, sums, scale * LOG2E.value, nodes, rows, kv_heads,
        group, split, splits, packed.shape[2], tokens - nodes, *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], *out.stride()[:3], WIDTH=width, WIDE=wide, **asdict(config),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(batch * kv_heads, triton.cdiv(rows, COMBINED))](
            out, mixed, sums, nodes, rows, kv_heads, group, splits, *out.stride()[:3], WIDTH=width, WIDE=wide,
            ROWS=COMBINED, num_warps=4,
        )  # fmt: skip
    return out
