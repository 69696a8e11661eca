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

#: Tokens of the context that a program has at least, and programs that a multiprocessor runs at a time.
LEAST_SPLIT, PROGRAMS_AT_A_TIME = 256, 2
#: Rows that a program puts together.
COMBINED = 16


@triton.jit
def attend(query, key, value, seen, scale, best, total, mixed, UPCAST: tl.constexpr):
    """Some keys [WIDE, KEYS] and values [KEYS, WIDE] more: the largest score, sum and mix of values of [ROWS] queries,
    in powers of two."""
    if UPCAST:  # the interpreter's dot is wrong in bfloat16
        query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    scores = tl.where(seen, tl.dot(query, key, input_precision="ieee") * scale, float("-inf"))
    now = tl.maximum(best, tl.max(scores, axis=1))
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(best - base)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
    return now, total * fade + tl.sum(weights, axis=1), mixed


@triton.jit(do_not_specialize=["nodes", "rows", "split", "kv_heads", "splits", "words"])
def tree_attention_kernel(
    query_ptr, key_ptr, value_ptr, packed_ptr, context_ptr, out_ptr, mixed_ptr, sums_ptr, scale, nodes, rows, kv_heads,
    group, split, splits, words, q_batch, q_head, q_node, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch,
    o_head, o_node, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows are the nodes of all query heads that share a key head; the last split of the context has the tree too."""
    b, head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    part = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    node, own_head = (row % nodes).to(tl.int64), head * group + row // nodes
    entry = tl.arange(0, WIDE)
    inside = entry < WIDTH
    own = live[:, None] & inside[None, :]
    query = query_ptr + b * q_batch + own_head[:, None] * q_head + node[:, None] * q_node + entry[None, :]
    query = tl.load(query, mask=own, other=0.0)
    keys = key_ptr + b * k_batch + head * k_head + entry[:, None]
    values = value_ptr + b * v_batch + head * v_head + entry[None, :]
    length = tl.load(context_ptr + b)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    last = tl.minimum(length, (part + 1).to(tl.int64) * split)
    for start in tl.range(part.to(tl.int64) * split, last, KEYS, num_stages=STAGES):
        token = start + tl.arange(0, KEYS)
        there = token < last
        key = tl.load(keys + token[None, :] * k_token, mask=inside[:, None] & there[None, :], other=0.0)
        value = tl.load(values + token[:, None] * v_token, mask=there[:, None] & inside[None, :], other=0.0)
        best, total, mixed = attend(query, key, value, there[None, :], scale, best, total, mixed, UPCAST)
    if part == splits - 1:
        for first in tl.range(0, nodes, KEYS, num_stages=1):
            other = first + tl.arange(0, KEYS)
            inner = other < nodes
            slot = length + other
            key = tl.load(keys + slot[None, :] * k_token, mask=inside[:, None] & inner[None, :], other=0.0)
            value = tl.load(values + slot[:, None] * v_token, mask=inner[:, None] & inside[None, :], other=0.0)
            bits = packed_ptr + (b * nodes + node[:, None]) * words + other[None, :] // 32
            seen = live[:, None] & inner[None, :]
            seen = seen & ((tl.load(bits, mask=seen, other=0) >> (other[None, :] % 32)) & 1 != 0)
            best, total, mixed = attend(query, key, value, seen, scale, best, total, mixed, UPCAST)
    if splits == 1:
        out = out_ptr + b * o_batch + own_head[:, None] * o_head + node[:, None] * o_node + entry[None, :]
        tl.store(out, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=own)
    else:
        slot = (tl.program_id(0).to(tl.int64) * splits + part) * rows + row
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


def attention_config(rows: int, wide: int, element: int, platform: str) -> AttentionConfig:
    """For heads of ``wide`` elements of so many bytes; keys and values under way take 96 KB of shared memory, on AMD's
    GPUs, which have 64 KB, a third of that."""
    narrow = wide * element <= 256
    most = 64 if element == 2 else 32
    together = min(most, max(16, triton.next_power_of_2(rows)))
    return AttentionConfig(together, 64 if narrow else 32, 3 if platform == "cuda" else 1, 8 if together == 64 else 4)


def context_splits(tokens: int, programs: int, processors: int) -> tuple[int, int]:
    """(splits of a context of so many tokens, tokens of each): as many as keep every multiprocessor busy where there
    are so many ``programs`` without any."""
    wanted = max(1, PROGRAMS_AT_A_TIME * processors // programs)
    count = max(1, min(wanted, tokens // LEAST_SPLIT))
    return count, triton.cdiv(triton.cdiv(tokens, count), 64) * 64


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    batch, heads, nodes, width = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    group = heads // kv_heads
    out = torch.empty_like(query)
    if not out.numel():
        return out
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    rows, wide = group * nodes, max(16, triton.next_power_of_2(width))
    config = attention_config(rows, wide, query.element_size(), launch.PLATFORM)
    grid = batch * kv_heads, triton.cdiv(rows, config.ROWS)
    splits, split = context_splits(tokens - nodes, grid[0] * grid[1], launch.processors_of(query.device))
    mixed, sums = out, out
    if splits > 1:
        mixed = query.new_empty((grid[0], splits, rows, width), dtype=torch.float32)
        sums = query.new_empty((grid[0], splits, rows, 2), dtype=torch.float32)
    tree_attention_kernel[(*grid, splits)](
        query, key, value, packed, context_lens, out, mixed, sums, scale * 1.4426950408889634, nodes, rows, kv_heads,
        group, split, splits, packed.shape[2], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *out.stride()[:3], WIDTH=width, WIDE=wide, UPCAST=query.device.type == "cpu", **asdict(config),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(grid[0], triton.cdiv(rows, COMBINED))](
            out, mixed, sums, nodes, rows, kv_heads, group, splits, *out.stride()[:3], WIDTH=width, WIDE=wide,
            ROWS=COMBINED, num_warps=4,
        )  # fmt: skip
    return out
