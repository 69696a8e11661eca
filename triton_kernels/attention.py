"""``tree_attention``: programs split the context, the tree is a split of its own, a second kernel puts them together.
Semantics: :mod:`specdec_kernels.ops.attention`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Keys a program looks at at a time, and the least and the most that a split of the context has.
KEYS, LEAST_SPLIT, MOST_SPLITS = 32, 256, 32


@triton.jit
def attend_block(query, key, value, scores_mask, best, total, mixed, scale, UPCAST: tl.constexpr):
    """One block of keys [KEYS, D] more: the running maximum, sum and mix of values of [ROWS] queries."""
    if UPCAST:  # the interpreter's dot is wrong in bfloat16
        query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(scores_mask, scores, float("-inf"))
    now = tl.maximum(best, tl.max(scores, axis=1))
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp(scores - base[:, None])
    fade = tl.exp(best - base)
    total = total * fade + tl.sum(weights, axis=1)
    mixed = mixed * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return now, total, mixed


@triton.jit(do_not_specialize=["nodes", "rows", "split", "kv_heads", "splits"])
def tree_attention_kernel(
    query_ptr, key_ptr, value_ptr, packed_ptr, context_ptr, best_ptr, total_ptr, mixed_ptr, scale, nodes, rows,
    kv_heads, group, split, splits, words, q_batch, q_head, q_node, k_batch, k_head, k_token, v_batch, v_head, v_token,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows are the nodes of all query heads that share a key head; the last split is the tree."""
    b, head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    part = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    node, own_head = row % nodes, head * group + row // nodes
    entry = tl.arange(0, WIDE)
    inside = entry < WIDTH
    query = tl.load(
        query_ptr + b * q_batch + own_head[:, None] * q_head + node[:, None].to(tl.int64) * q_node + entry[None, :],
        mask=live[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    keys, values = key_ptr + b * k_batch + head * k_head, value_ptr + b * v_batch + head * v_head
    length = tl.load(context_ptr + b)
    is_tree = part == splits - 1
    first = tl.where(is_tree, length, part.to(tl.int64) * split)
    last = tl.where(is_tree, length + nodes, tl.minimum(length, first + split))
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    start = first
    while start < last:
        token = start + tl.arange(0, KEYS)
        there = token < last
        key = tl.load(
            keys + token[:, None] * k_token + entry[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        value = tl.load(
            values + token[:, None] * v_token + entry[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        seen = live[:, None] & there[None, :]
        if is_tree:
            other = token - length
            word = tl.load(packed_ptr + (b * nodes + node[:, None]) * words + other[None, :] // 32, mask=seen, other=0)
            seen = seen & ((word >> (other[None, :] % 32).to(tl.int32)) & 1 != 0)
        best, total, mixed = attend_block(query, key, value, seen, best, total, mixed, scale, UPCAST)
        start += KEYS
    place = (tl.program_id(0).to(tl.int64) * splits + part) * rows + row
    tl.store(best_ptr + place, best, mask=live)
    tl.store(total_ptr + place, total, mask=live)
    tl.store(mixed_ptr + place[:, None] * WIDTH + entry[None, :], mixed, mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["nodes", "rows", "splits", "kv_heads"])
def combine_kernel(
    best_ptr, total_ptr, mixed_ptr, out_ptr, nodes, rows, kv_heads, group, splits, o_batch, o_head, o_node,
    WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    row = tl.program_id(1)
    entry = tl.arange(0, WIDE)
    inside = entry < WIDTH
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([WIDE], tl.float32)
    for part in range(0, splits):
        place = (tl.program_id(0).to(tl.int64) * splits + part) * rows + row
        own = tl.load(best_ptr + place)
        now = tl.maximum(best, own)
        base = tl.where(now == float("-inf"), 0.0, now)
        fade, share = tl.exp(best - base), tl.exp(own - base)
        total = total * fade + tl.load(total_ptr + place) * share
        mixed = mixed * fade + tl.load(mixed_ptr + place * WIDTH + entry, mask=inside, other=0.0) * share
        best = now
    out = out_ptr + b * o_batch + (head * group + row // nodes) * o_head + (row % nodes).to(tl.int64) * o_node
    tl.store(out + entry, (mixed / total).to(out_ptr.dtype.element_ty), mask=inside)


def context_splits(tokens: int) -> tuple[int, int]:
    """(splits of a context of so many tokens, tokens of each): a pure function, results depend on nothing else."""
    count = min(MOST_SPLITS, triton.cdiv(tokens, LEAST_SPLIT))
    return count, triton.cdiv(triton.cdiv(tokens, max(1, count)), KEYS) * KEYS


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
    rows = group * nodes
    splits, split = context_splits(tokens - nodes)
    splits += 1  # the tree
    partial = query.new_empty((batch * kv_heads, splits, rows, width), dtype=torch.float32)
    best, total = (query.new_empty(partial.shape[:3], dtype=torch.float32) for _ in range(2))
    wide = max(16, triton.next_power_of_2(width))
    block = min(32, max(16, triton.next_power_of_2(rows)))
    tree_attention_kernel[(batch * kv_heads, triton.cdiv(rows, block), splits)](
        query, key, value, packed, context_lens, best, total, partial, scale, nodes, rows, kv_heads, group, split,
        splits, packed.shape[2], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], WIDTH=width, WIDE=wide,
        ROWS=block, KEYS=KEYS, UPCAST=query.device.type == "cpu", num_warps=4,
    )  # fmt: skip
    combine_kernel[(batch * kv_heads, rows)](
        best, total, partial, out, nodes, rows, kv_heads, group, splits, *out.stride()[:3], WIDTH=width, WIDE=wide,
        num_warps=1,
    )  # fmt: skip
    return out
