"""Trees of drafts: their one form, what follows from it, and attention masks in the formats that engines take.

A tree is ``parents [B, N]``: node 0 is the root, the last token of the text, with parent -1; the parent of every other
node is an earlier one. A request with fewer nodes ends with -1. A chain of K drafts is ``[-1, 0, 1, ..., K - 1]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.contract import MaskFormat
from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import BackendName, function
from specdec_kernels.ops.validate import ArgumentChecker
from specdec_kernels.reference.trees import live_nodes

FormatName = Literal[
    "dense", "additive", "packed", "flashinfer", "sglang_full", "sglang_qlen_only", "sglang_qlen_only_packed"
]

_Kind = tuple[torch.dtype, tuple[int, ...]]

#: Which of the kernels' layouts a format is, and of what elements and shape, by requests, nodes, keys and dtype of
#: "additive"; whether it has a context: None where it may.
_FORMATS: dict[str, tuple[MaskFormat, Callable[[int, int, int, torch.dtype], _Kind], bool | None]] = {
    "dense": (MaskFormat.DENSE, lambda b, n, keys, _: (torch.bool, (b, n, keys)), None),
    "additive": (MaskFormat.DENSE, lambda b, n, keys, dtype: (dtype, (b, n, keys)), None),
    "packed": (MaskFormat.PACKED, lambda b, n, *_: (torch.int32, (b, n, -(-n // 32))), False),
    "flashinfer": (MaskFormat.FLAT_BITS, lambda b, n, keys, _: (torch.uint8, (b * -(-n * keys // 8),)), True),
    "sglang_full": (MaskFormat.FLAT, lambda b, n, keys, _: (torch.bool, (b * n * keys,)), True),
    "sglang_qlen_only": (MaskFormat.DENSE, lambda b, n, *_: (torch.bool, (b * n * n,)), False),
    "sglang_qlen_only_packed": (MaskFormat.PACKED, lambda b, n, *_: (_narrowest(n), (b * n,)), False),
}


def _narrowest(nodes: int) -> torch.dtype:
    return torch.uint8 if nodes <= 8 else torch.int16 if nodes <= 16 else torch.int32


class TreeLinks(NamedTuple):
    """Children of every node, as linked lists; int32 [B, N], -1 where there is none."""

    first_child: Tensor
    next_sibling: Tensor


def checked(parents: object, check: ArgumentChecker | None = None) -> Tensor:
    """``parents`` as int64. On the CPU, where looking is free, a parent that is missing or no earlier node is an error;
    elsewhere it ends the tree."""
    tree = (check or ArgumentChecker("parents", parents)).ids("parents", parents, "B, N").long()
    if tree.shape[1] == 0:
        raise ValueError(f"parents must have at least the root, got {checks.describe(tree)}")
    if validate.readable(tree):
        for b, row in enumerate(tree.tolist()):
            if (node := first_bad(row)) is not None:
                raise ValueError(
                    "parents must be -1 for the root, an earlier node for every other, and -1 behind the last, got "
                    f"{row[node]} at [{b}, {node}]"
                )
    return tree


def first_bad(row: list[int]) -> int | None:
    """The first parent that is none; a list, since tensor operations take ten times as long for a tree of 16."""
    live = row.index(-1, 1) if -1 in row[1:] else len(row)
    for node, up in enumerate(row):
        if not (0 <= up < node if 0 < node < live else up == -1):
            return node
    return None


def tree_positions(parents: Tensor) -> Tensor:
    """Depth of every node: what to add to the root's position.

    Args:
        parents: int64 or int32 [B, N].

    Returns:
        int32 [B, N]; 0 for the root, -1 behind the last node.

    Example:
        >>> tree_positions(torch.tensor([[-1, 0, 0, 1, 3, -1]])).tolist()
        [[0, 1, 1, 2, 3, -1]]
    """
    return _ancestors(checked(parents))[1].int()


def tree_links(parents: Tensor) -> TreeLinks:
    """First child and next sibling of every node, in the order of the nodes.

    Args:
        parents: int64 or int32 [B, N].

    Returns:
        :class:`TreeLinks`.

    Example:
        >>> links = tree_links(torch.tensor([[-1, 0, 0, 1]]))
        >>> links.first_child.tolist(), links.next_sibling.tolist()
        ([[1, 3, -1, -1]], [[-1, 2, -1, -1]])
    """
    tree = checked(parents)
    index = torch.arange(tree.shape[1], device=tree.device)
    parent = torch.where(live_nodes(tree), tree, -2)

    def first(candidates: Tensor) -> Tensor:
        return torch.where(candidates.any(-1), candidates.int().argmax(-1), -1).int()

    children = parent[:, None, :] == index[:, None]
    siblings = (parent[:, None, :] == parent[:, :, None]) & (parent[:, :, None] >= 0) & (index > index[:, None])
    return TreeLinks(first(children), first(siblings))


def tree_paths(parents: Tensor, depth: int) -> Tensor:
    """The nodes from the root to every node.

    Args:
        parents: int64 or int32 [B, N].
        depth: of the deepest node that matters, at least 0; deeper ones have their path cut.

    Returns:
        int32 [B, N, depth + 1], -1 behind the node itself and for nodes that are none.

    Example:
        >>> tree_paths(torch.tensor([[-1, 0, 0, 1]]), 2).tolist()
        [[[0, -1, -1], [0, 1, -1], [0, 2, -1], [0, 1, 3]]]
    """
    checks.whole("depth", depth, 0)
    tree = checked(parents)
    mask, depths = _ancestors(tree)
    position = depths[:, None].expand_as(mask)
    # Every node goes into the column of its depth, in the rows of its descendants; the last column takes the rest.
    column = torch.where(mask & (position >= 0) & (position <= depth), position, depth + 1)
    paths = position.new_full((*tree.shape, depth + 2), -1)
    node = torch.arange(tree.shape[1], device=tree.device).expand_as(column)
    return paths.scatter_(2, column, node)[..., : depth + 1].int()


def tree_mask(
    parents: Tensor,
    format: FormatName = "dense",
    *,
    context_lens: Tensor | None = None,
    max_context: int | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Which keys every node of a tree attends to: the text before it, its ancestors, and itself. One launch a batch.

    Keys are the context of L tokens, then the N nodes. Rows behind the last node of a request attend to the context and
    to themselves, so that no softmax is empty.

    ===========================  ====================================================================================
    ``"dense"``                  bool [B, N, N]; with ``context_lens`` [B, N, max_context + N]
    ``"additive"``               the same in ``dtype``: 0 where it attends, -inf elsewhere
    ``"packed"``                 int32 [B, N, ceil(N/32)]: bit ``j % 32`` of word ``j // 32``; nodes only
    ``"flashinfer"``             uint8: ``packed_custom_mask``, bits of [N, L + N], little-endian, request by request
    ``"sglang_full"``            bool: ``FULL_MASK``, [N, L + N] flat, request by request
    ``"sglang_qlen_only"``       bool [B * N * N]: ``QLEN_ONLY``
    ``"sglang_qlen_only_packed"``  uint8, int16 or int32 [B * N], the narrowest that holds N <= 32 bits
    ===========================  ====================================================================================

    Args:
        parents: int64 or int32 [B, N].
        format: see above.
        context_lens: int64 or int32 [B], each at most ``max_context``; the two flat formats need it, "packed" and the
            ``QLEN_ONLY`` formats take none.
        max_context: largest of ``context_lens``; None looks, which synchronises with a GPU. The flat formats are sized
            for it, and what is not used of them is 0.
        dtype: of "additive": float32 (default), bfloat16 or float16.
        backend: ``None`` follows the device; a name forces that backend.

    Returns:
        The mask.

    Equivalent to, for "dense" without context::

        mask = torch.eye(N, dtype=torch.bool).repeat(B, 1, 1)
        for i in range(1, N):
            mask[:, i] |= mask[torch.arange(B), parents[:, i]]

    Example:
        >>> tree_mask(torch.tensor([[-1, 0, 0, 1]])).int().tolist()
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]]

    Source: tree attention, Miao et al., arXiv:2305.09781.
    """
    layout, kind, has_context = checks.choice("format", format, _FORMATS)
    if (dtype is not None) and format != "additive":
        raise ValueError(f"dtype goes with format='additive' alone, got dtype={dtype} with format={format!r}")
    if (dtype := dtype or torch.float32) not in validate.LOGIT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    check = ArgumentChecker("parents", parents)
    tree = checked(parents, check)
    batch, nodes = tree.shape
    if format == "sglang_qlen_only_packed" and nodes > 32:
        raise ValueError(f"parents must have at most 32 nodes with format={format!r}, got {nodes}")
    if has_context not in (None, context_lens is not None):
        needed = "given" if has_context else "None"
        raise ValueError(f"context_lens must be {needed} with format={format!r}, got {checks.describe(context_lens)}")
    if context_lens is None and max_context is not None:
        raise ValueError(f"max_context goes with context_lens, got {max_context} without")
    if context_lens is not None:
        context_lens = check.ids("context_lens", context_lens, "B").long()
        if max_context is None:
            max_context = int(context_lens.clamp(min=0).amax()) if batch else 0
        checks.whole("max_context", max_context, 0)
        validate.within("context_lens", context_lens, 0, max_context, f"in [0, {max_context}]")
        context_lens = context_lens.clamp(0, max_context)
    return _filled(tree, context_lens, layout, kind(batch, nodes, (max_context or 0) + nodes, dtype), backend)


def _filled(
    tree: Tensor, context: Tensor | None, layout: MaskFormat, kind: _Kind, backend: BackendName | None = None
) -> Tensor:
    """A mask of a tree that was checked."""
    out = torch.empty(kind[1], dtype=kind[0], device=tree.device)
    if out.numel():
        function("tree_mask", backend, tree.device)(out, tree, context, int(layout))
    return out


def _ancestors(tree: Tensor) -> tuple[Tensor, Tensor]:
    """Of every node which are its ancestors and itself, bool [B, N, N], and its depth, [B, N], -1 of those that are
    none."""
    mask = _filled(tree, None, MaskFormat.DENSE, (torch.bool, (*tree.shape, tree.shape[1])))
    return mask, torch.where(live_nodes(tree), mask.sum(-1) - 1, -1)


def tree_mask_mod(
    packed: Tensor, context_lens: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as a ``mask_mod`` of ``torch.nn.attention.flex_attention``.

    Args:
        packed: int32 [B, N, ceil(N/32)], as ``tree_mask(parents, "packed")`` gives it.
        context_lens: int64 or int32 [B]; None without a context.

    Returns:
        ``mask_mod(batch, head, query, key) -> bool``: queries are nodes, keys the context and then the nodes.
    """
    check = ArgumentChecker("packed", packed)
    words = check.tensor("packed", packed, (torch.int32,), "B, N, ceil(N/32)")
    check.optional("context_lens", context_lens, validate.ID_DTYPES, "B")

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        node = key if context_lens is None else key - context_lens[batch]
        inside = node.clamp(0, words.shape[1] - 1)
        bit = words[batch, query, inside >> 5] >> (inside & 31) & 1
        return (node < 0) | ((bit != 0) & (node < words.shape[1]))

    return mask_mod
