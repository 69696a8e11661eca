"""``tree_attention`` by PyTorch's own attention. Shapes and semantics: :mod:`specdec_kernels.ops.attention`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    nodes = query.shape[2]
    node = torch.arange(key.shape[2], device=query.device) - context_lens[:, None, None]
    inside = node.clamp(0, max(0, nodes - 1)).expand(-1, nodes, -1)
    bits = packed.long().gather(2, inside >> 5) >> (inside & 31) & 1
    mask = (node < 0) | ((bits != 0) & (node < nodes))
    behind = (node[:, 0] >= nodes)[:, None, :, None]  # not read: it may be nan, which a probability of 0 does not hide
    with torch.autocast(query.device.type, enabled=False):  # of the query's dtype
        return functional.scaled_dot_product_attention(
            query,
            key.masked_fill(behind, 0),
            value.masked_fill(behind, 0),
            attn_mask=mask[:, None],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
