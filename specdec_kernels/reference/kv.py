"""``compact_kv`` in PyTorch. Layouts and semantics: :mod:`specdec_kernels.ops.kv`."""

from __future__ import annotations

from torch import Tensor


def compact_kv(caches: list[Tensor], nodes: Tensor, start: Tensor, page_table: Tensor | None) -> None:
    live = (nodes >= 0).long().cumprod(1).bool()
    request, place = live.nonzero(as_tuple=True)
    source, destination = start[request] + nodes[request, place], start[request] + place
    for cache in caches:
        if page_table is None:
            cache[request, :, destination] = cache[request, :, source]  # the right side is a copy
        else:
            size = cache.shape[1]
            pages = page_table[request, destination // size], page_table[request, source // size]
            cache[pages[0], destination % size] = cache[pages[1], source % size]
