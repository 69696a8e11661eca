"""Keys and values of a tree: moving those of the accepted nodes to where the text goes on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import BackendName, function


def compact_kv(
    caches: Sequence[Tensor],
    nodes: Tensor,
    start: Tensor | int,
    *,
    page_table: Tensor | None = None,
    backend: BackendName | None = None,
) -> None:
    """Move the accepted nodes' keys and values to the front of the tree's rows, in place, all caches in one launch.

    The rows of a tree lie at ``start .. start + N - 1``, in the order of its nodes; afterwards row ``start + i`` holds
    what row ``start + nodes[i]`` held. Nothing else is touched; what is behind the path is left over and to be cropped.
    Values of ``nodes``, ``start`` and ``page_table`` are checked on the CPU; elsewhere a row outside the cache is not
    moved.

    Args:
        caches: keys and values of all layers, all of one shape, dtype and strides. Dense: [B, H, S, D]; with
            ``page_table``: [pages, page size, H, D]. The last dimension is contiguous.
        nodes: int32 or int64 [B, N], as :class:`VerifiedTree` gives them: a path in ascending order, -1 behind it.
        start: int64 [B] or int: where the root's row is, in tokens.
        page_table: int32 or int64 [B, M]: token s of request b lies in page ``page_table[b, s // page size]``.
        backend: ``None`` follows the device; a name forces that backend.

    Equivalent to, dense::

        for cache in caches:
            for b, path in enumerate(nodes):
                path = path[path >= 0]
                cache[b, :, start : start + len(path)] = cache[b, :, start + path]

    Example:
        >>> import torch
        >>> cache = torch.arange(5.0).reshape(1, 1, 5, 1)
        >>> compact_kv([cache], torch.tensor([[0, 2, -1]]), 1)
        >>> cache.flatten().tolist()
        [0.0, 1.0, 3.0, 3.0, 4.0]
    """
    if not isinstance(caches, (list, tuple)) or not caches or not isinstance(caches[0], Tensor):
        raise TypeError(f"caches must be a list of at least one tensor, got {checks.describe(caches)}")
    first = caches[0]
    check = validate.ArgumentChecker("caches[0]", first)
    for index, cache in enumerate(caches):
        name = f"caches[{index}]"
        check.tensor(name, cache, (first.dtype,), "B, H, S, D" if page_table is None else "pages, page size, H, D")
        strides = [stride for stride, size in zip(cache.stride(), cache.shape, strict=True) if size > 1]
        if cache.stride() != first.stride() or 0 in strides or (cache.stride(-1) != 1 and cache.shape[-1] > 1):
            expected = f"contiguous along D and not expanded, with the strides of caches[0], {first.stride()}"
            raise ValueError(f"{name} must be {expected}, got {cache.stride()}")
    path = check.ids("nodes", nodes, "B, N").long()
    begin, capacity = check.integers("start", start), first.shape[2]
    if page_table is not None:
        page_table = check.ids("page_table", page_table, "B, M").long()
        validate.within("page_table", page_table, 0, len(first) - 1, f"in [0, {len(first)})")
        capacity = page_table.shape[1] * first.shape[1]
    if validate.readable(path) and path.numel():
        earlier, later = path[:, :-1], path[:, 1:]
        goes_on = (later == -1) | ((earlier >= 0) & (later > earlier))
        if not goes_on.all() or (path[:, :1] > 0).any() or (path < -1).any():
            raise ValueError(f"nodes must ascend from 0, the root, with -1 behind the path, got {path.tolist()}")
        last = path.amax(1).clamp(min=0)
        if (begin < 0).any() or (begin >= capacity - last).any():
            raise ValueError(f"start must leave room for the nodes in {capacity} rows, got {begin.tolist()}")
    if path.numel() and first.numel():
        function("compact_kv", backend, first.device)(list(caches), path, begin, page_table)
