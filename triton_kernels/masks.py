"""Tree masks. Packed: each node's words from its parent's. Others: every element by itself, (query, key) attends iff
the walk up from the query meets the key."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import MaskFormat
from specdec_kernels.workspace import power_of_two

DENSE = tl.constexpr(int(MaskFormat.DENSE))
FLAT_BITS = tl.constexpr(int(MaskFormat.FLAT_BITS))


@triton.jit
def attends(parents_ptr, live, query, node, inside):
    """Whether node ``query`` has ``node`` among its ancestors or is it. Parents come before children, so a walk that
    has come to ``node`` or past it is over."""
    at = tl.where(inside & (query < live), query, node)
    walking = at > node
    while tl.max(walking.to(tl.int32)) != 0:
        at = tl.where(walking, tl.load(parents_ptr + at, mask=walking, other=0), at)
        walking = at > node
    return inside & tl.where(query < live, at == node, query == node)


@triton.jit
def live_count(parents_ptr, nodes, BLOCK: tl.constexpr):
    """Nodes before the first one without a parent among the earlier."""
    index = tl.arange(0, BLOCK)
    parent = tl.load(parents_ptr + index, mask=index < nodes, other=-1)
    fits = tl.where(index == 0, parent == -1, (parent >= 0) & (parent < index))
    return tl.min(tl.where(fits & (index < nodes), BLOCK, index))


@triton.jit(do_not_specialize=["nodes"])
def packed_kernel(out_ptr, parents_ptr, nodes, BITS: tl.constexpr, WORDS: tl.constexpr, NODES: tl.constexpr):
    """The words of one request, each node's from its parent's: O(N * N / BITS)."""
    b = tl.program_id(0).to(tl.int64)
    parents = parents_ptr + b * nodes
    live = live_count(parents, nodes, NODES)
    words = (nodes + BITS - 1) // BITS
    out = out_ptr + b * nodes * words
    word = tl.arange(0, WORDS)
    one = tl.full([WORDS], 1, tl.int64)
    for node in range(0, nodes):
        bits = tl.where(word == node // BITS, one << (node % BITS), 0)
        if (node > 0) & (node < live):
            parent = tl.load(parents + node)
            bits = bits | tl.load(out + parent * words + word, mask=word < words, other=0).to(tl.int64)
        tl.store(out + node * words + word, bits.to(out_ptr.dtype.element_ty), mask=word < words)
        tl.debug_barrier()  # children read what was just written


@triton.jit(do_not_specialize=["nodes", "width", "capacity"])
def tree_mask_kernel(
    out_ptr, parents_ptr, context_ptr, nodes, width, capacity, FORMAT: tl.constexpr, ADDITIVE: tl.constexpr,
    BLOCK: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    parents = parents_ptr + b * nodes
    live = tl.minimum(live_count(parents, nodes, NODES), nodes)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    length = tl.full([], 0, tl.int64)
    if context_ptr is not None:
        length = tl.load(context_ptr + b)
    start, row = b * capacity, tl.full([], 0, tl.int64) + width
    if FORMAT != DENSE:
        # Where the request begins, behind all that come before it; and where the last one ends: the rest is 0.
        start, end = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        for request in range(0, tl.num_programs(1)):
            size = nodes * (tl.load(context_ptr + request) + nodes)
            if FORMAT == FLAT_BITS:
                size = (size + 7) // 8
            end += size
            start += tl.where(request < b, size, 0)
        unused = out_ptr + b * capacity + index
        behind = (index < capacity) & (b * capacity + index >= end)
        tl.store(unused, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=behind)
        row = length + nodes
    count = nodes * row
    key = index[:, None] * 8 + tl.arange(0, 8)[None, :] if FORMAT == FLAT_BITS else index
    node = key % row - length
    inside = (key < count) & (node < nodes)
    mask = (inside & (node < 0)) | attends(parents, live, key // row, tl.maximum(node, 0), inside & (node >= 0))
    value = tl.where(mask, 0.0, float("-inf")) if ADDITIVE else mask
    if FORMAT == FLAT_BITS:
        value = tl.sum(mask.to(tl.int64) << tl.arange(0, 8)[None, :], axis=1)
        count = (count + 7) // 8
    tl.store(out_ptr + start + index, value.to(out_ptr.dtype.element_ty), mask=index < count)


def tree_mask(out: Tensor, parents: Tensor, context_lens: Tensor | None, format: int) -> None:
    batch, nodes = parents.shape
    block = power_of_two(nodes)
    if format == MaskFormat.PACKED:
        bits = 8 * out.element_size()
        words = power_of_two(triton.cdiv(nodes, bits))
        packed_kernel[(batch,)](out, parents, nodes, BITS=bits, WORDS=words, NODES=block, num_warps=1)
        return
    capacity = out.numel() // batch
    elements = 1024 if format in (MaskFormat.DENSE, MaskFormat.FLAT) else 1024 // 8
    # Of the first dimension there may be 2^31 programs, of the others 65,535: a mask can have more blocks than that.
    tree_mask_kernel[(triton.cdiv(capacity, elements), batch)](
        out, parents, context_lens, nodes, capacity // nodes, capacity, FORMAT=format, ADDITIVE=out.is_floating_point(),
        BLOCK=elements, NODES=block, num_warps=4,
    )  # fmt: skip
