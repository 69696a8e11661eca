"""``compact_kv``: one program a cache, request and head. Semantics: :mod:`specdec_kernels.ops.kv`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.workspace import power_of_two


@triton.jit(do_not_specialize=["nodes", "tokens", "pages", "outer"])
def compact_kv_kernel(
    caches, path_ptr, start_ptr, page_table_ptr, nodes, tokens, pages, outer, page_size, width, outer_stride,
    token_stride, head_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    cache = caches[0]
    for index in tl.static_range(1, len(caches)):
        cache = tl.where(tl.program_id(0) == index, caches[index], cache)
    b, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr + b)
    entry = tl.arange(0, BLOCK)
    i = tl.full([], 0, tl.int64)
    node = tl.load(path_ptr + b * nodes)
    # A node never moves back past its slot, so in ascending order nothing is overwritten before it has moved.
    while node >= 0:
        source, slot = start + node, start + i
        if (node != i) & (start >= 0) & (source < tokens) & (slot < tokens):
            outer_source, outer_slot = b, b
            if page_table_ptr is not None:
                outer_source = tl.load(page_table_ptr + b * pages + source // page_size)
                outer_slot = tl.load(page_table_ptr + b * pages + slot // page_size)
                source, slot = source % page_size, slot % page_size
            there = (outer_source >= 0) & (outer_source < outer) & (outer_slot >= 0) & (outer_slot < outer)
            inside = there & (entry < width)
            own = cache + head * head_stride + entry
            moved = tl.load(own + outer_source * outer_stride + source * token_stride, mask=inside)
            tl.store(own + outer_slot * outer_stride + slot * token_stride, moved, mask=inside)
            tl.debug_barrier()  # the next node may come to lie where this one was
        i += 1
        node = tl.load(path_ptr + b * nodes + i, mask=i < nodes, other=-1)


#: Elements are moved as what they are wide, whatever they are.
_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Caches a launch: they are arguments of it, which are copied with it, so that a graph can hold it.
CACHES_A_LAUNCH = 64


def compact_kv(caches: list[Tensor], nodes: Tensor, start: Tensor, page_table: Tensor | None) -> None:
    first = caches[0]
    element = _AS[first.element_size()]
    if page_table is None:
        (_, heads, tokens, width), strides = first.shape, (first.stride(0), first.stride(2), first.stride(1))
        pages, page_size = 0, 1
    else:
        (_, page_size, heads, width), strides = first.shape, first.stride()[:3]
        pages = page_table.shape[1]
        tokens = pages * page_size
    for begin in range(0, len(caches), CACHES_A_LAUNCH):
        some = tuple(cache.view(element) for cache in caches[begin : begin + CACHES_A_LAUNCH])
        compact_kv_kernel[(len(some), nodes.shape[0], heads)](
            some, nodes, start, page_table, nodes.shape[1], tokens, pages, first.shape[0], page_size, width,
            *strides,
            BLOCK=power_of_two(width), num_warps=1,
        )  # fmt: skip
