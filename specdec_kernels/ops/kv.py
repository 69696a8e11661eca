"""Keys and values of a tree: moving those of the accepted nodes to where the text goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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

    Args:
        caches: keys and values of all layers, all of one shape, dtype and strides. Dense: [B, H, S, D]; with
            ``page_table``: [pages, page size, H, D]. The last dimension is contiguous.
        nodes: int32 or int64 [B, N], as :class:`VerifiedTree` gives them: a path in ascending order, -1 behind it.
        start: int64 [B] or int: where the root's row is, in tokens.
        page_table: int32 or int64 [B, M]: token s of request b lies in page ``page_table[b, s // page size]``.
        backend: ``None`` follows the device; a name forces that backend.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The values of ``nodes``, ``start``
            and ``page_table`` are checked on the CPU; on other devices a row outside the cache is not moved.
        RuntimeError: the backend that was asked for cannot run, with the reason.

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
    if not isinstance(caches, (list, tuple)) or not caches:
        raise TypeError(f"caches must be a list of at least one tensor, got {validate.describe(caches)}")
    paged = page_table is not None
    dims = "pages, page size, H, D" if paged else "B, H, S, D"
    first = _cache("caches[0]", caches[0], dims)
    for index, cache in enumerate(caches):
        checked = _cache(f"caches[{index}]", cache, dims)
        alike = (checked.shape, checked.dtype, checked.stride()) == (first.shape, first.dtype, first.stride())
        if not alike or checked.device != first.device:
            raise ValueError(
                f"caches[{index}] must have shape, dtype, strides and device of caches[0], {validate.describe(first)} "
                f"{first.stride()}, got {validate.describe(checked)} {checked.stride()}"
            )
    batch = None if paged else first.shape[0]
    path = validate.tensor("nodes", nodes, validate.ID_DTYPES, "B, N", (batch, None)).long().contiguous()
    begin = validate.integers("start", start, path.shape[0], "B", first.device)
    if page_table is not None:
        page_table = validate.tensor("page_table", page_table, validate.ID_DTYPES, "B, M", (path.shape[0], None))
        page_table = page_table.long().contiguous()
    validate.same_device("caches", first, nodes=path, start=begin, page_table=page_table)
    if first.is_cpu and not torch.compiler.is_compiling():
        room = first.shape[2] if page_table is None else page_table.shape[1] * first.shape[1]
        _check(path, begin, room)
        if page_table is not None and ((page_table < 0) | (page_table >= first.shape[0])).any():
            raise ValueError(f"page_table must be in [0, {first.shape[0]}), got {page_table.tolist()}")
    if path.numel() and first.numel():
        function("compact_kv", backend, first.device)(list(caches), path, begin, page_table)


def _cache(name: str, value: object, dims: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 4:
        raise TypeError(f"{name} must be a tensor [{dims}], got {validate.describe(value)}")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous along D (stride 1), got strides {list(value.stride())}")
    return value


def _check(path: Tensor, begin: Tensor, room: int) -> None:
    """Ascending nodes, each at or behind its new place, then -1; all of them inside the cache."""
    live = (path >= 0).long().cumprod(1).bool()
    behind = torch.where(live, path, -1)
    rises = live[:, 1:] & (behind[:, 1:] <= behind[:, :-1])
    if rises.any() or (path[:, :1] > 0).any() or ((path != -1) & ~live).any():
        raise ValueError(f"nodes must ascend from 0, the root, with -1 behind the path, got {path.tolist()}")
    ends = begin + behind.amax(1).clamp(min=0)
    if (begin < 0).any() or (ends >= room).any():
        raise ValueError(f"start must leave room for the nodes in {room} rows, got {begin.tolist()}")
