"""SGLang's form of trees: linked lists of nodes, and results as indices into the rows of a whole batch.

The names are SGLang's own, with their spelling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec_kernels.ops import validate
from specdec_kernels.ops.results import VerifiedTree
from specdec_kernels.ops.trees import tree_links


class SGLangTree(NamedTuple):
    """A batch of trees; int64 [B, N], -1 where there is none."""

    retrive_index: Tensor
    """The row of each node among the B * N rows of the batch."""
    retrive_next_token: Tensor
    """First child of each node."""
    retrive_next_sibling: Tensor


class SGLangResults(NamedTuple):
    """What SGLang's verification of trees gives."""

    predict: Tensor
    """int32 [B * N]: at the row of each node that was kept, the token behind it; 0 elsewhere."""
    accept_index: Tensor
    """int32 [B, D]: the rows of the nodes that were kept, the root first, then -1."""
    accept_token_num: Tensor
    """int32 [B]: accepted drafts."""


def from_parents(parents: Tensor) -> SGLangTree:
    """Trees of this library as linked lists.

    Args:
        parents: int64 or int32 [B, N], as for :func:`specdec_kernels.verify_tree`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> tree = from_parents(torch.tensor([[-1, 0, 0, 1]]))
        >>> tree.retrive_next_token.tolist(), tree.retrive_next_sibling.tolist()
        ([[1, 3, -1, -1]], [[-1, 2, -1, -1]])
    """
    links = tree_links(parents)
    rows = torch.arange(parents.numel(), device=parents.device).reshape(parents.shape)
    return SGLangTree(rows, links.first_child.long(), links.next_sibling.long())


def to_parents(retrive_next_token: Tensor, retrive_next_sibling: Tensor) -> Tensor:
    """Linked lists as trees of this library.

    Args:
        retrive_next_token, retrive_next_sibling: int64 or int32 [B, N].

    Returns:
        int64 [B, N], -1 for the root and for what hangs nowhere. :func:`specdec_kernels.verify_tree` wants a node's
        parent before the node, as SGLang has it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> to_parents(torch.tensor([[1, 3, -1, -1]]), torch.tensor([[-1, 2, -1, -1]])).tolist()
        [[-1, 0, 0, 1]]
    """
    children = validate.tensor("retrive_next_token", retrive_next_token, validate.ID_DTYPES, "B, N", (None, None))
    shape = tuple(children.shape)
    siblings = validate.tensor("retrive_next_sibling", retrive_next_sibling, validate.ID_DTYPES, "B, N", shape)
    validate.same_device("retrive_next_token", children, retrive_next_sibling=siblings)
    before, node = _came_from(siblings), torch.arange(shape[1], device=children.device)
    eldest = torch.where(before >= 0, before, node)
    for _ in range(shape[1].bit_length()):  # each time twice as far back
        eldest = eldest.gather(1, eldest)
    return _came_from(children).gather(1, eldest)


def _came_from(links: Tensor) -> Tensor:
    """Of each node the one that links to it, int64 [B, N]; -1 where none does."""
    batch, nodes = links.shape
    found = links.new_full((batch, nodes + 1), -1, dtype=torch.int64)
    index = torch.arange(nodes, device=links.device).expand(batch, nodes)
    return found.scatter(1, links.long().where(links >= 0, nodes), index)[:, :nodes]


def results(verified: VerifiedTree, retrive_index: Tensor, depth: int) -> SGLangResults:
    """What :func:`specdec_kernels.verify_tree` gave, in SGLang's form.

    Args:
        verified: of a batch of trees of N nodes.
        retrive_index: int64 or int32 [B, N], as of :func:`from_parents`.
        depth: columns D of ``accept_index``: nodes of the longest path, the root among them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shape = tuple(verified.nodes.shape)
    rows = validate.tensor("retrive_index", retrive_index, validate.ID_DTYPES, "B, N", shape).long()
    kept = verified.nodes >= 0
    index = rows.gather(1, verified.nodes.long().clamp(min=0)).masked_fill(~kept, -1)
    predict = torch.zeros(rows.numel() + 1, dtype=torch.int32, device=rows.device)
    predict[index.where(kept, rows.numel())] = verified.tokens.int()
    return SGLangResults(predict[:-1], index[:, :depth].int(), verified.num_accepted)
