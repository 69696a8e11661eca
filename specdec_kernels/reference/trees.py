"""Tree masks in PyTorch. Formats and semantics: :mod:`specdec_kernels.ops.trees`."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.contract import MaskFormat


def live_nodes(parents: Tensor) -> Tensor:
    """bool [B, N]: which nodes there are."""
    index = torch.arange(parents.shape[1], device=parents.device)
    fits = torch.where(index == 0, parents == -1, (parents >= 0) & (parents < index))
    return fits.long().cumprod(1).bool()


def attends(parents: Tensor) -> Tensor:
    """bool [B, N, N]: ancestors and itself; itself alone behind the last node."""
    batch, nodes = parents.shape
    requests = torch.arange(batch, device=parents.device)
    mask = torch.eye(nodes, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    live = live_nodes(parents)
    for i in range(1, nodes):
        mask[:, i] |= mask[requests, parents[:, i].clamp(0, i - 1)] & live[:, i, None]
    return mask


def tree_mask(out: Tensor, parents: Tensor, context_lens: Tensor | None, format: int) -> None:
    ancestors = attends(parents)
    batch, nodes = parents.shape
    if format == MaskFormat.PACKED:
        bits = 8 * out.element_size()
        padded = torch.nn.functional.pad(ancestors.long(), (0, -nodes % bits)).unflatten(-1, (-1, bits))
        words = (padded << torch.arange(bits, device=out.device)).sum(-1)
        if out.dtype != torch.uint8:  # the highest bit is the sign
            words = torch.where(words >= 1 << bits - 1, words - (1 << bits), words)
        out.copy_(words.reshape(out.shape))
        return
    lens = context_lens if context_lens is not None else parents.new_zeros(batch)
    if format == MaskFormat.DENSE:
        width = out.numel() // (batch * nodes)
        node = torch.arange(width, device=out.device) - lens[:, None, None]
        seen = ancestors.gather(2, node.clamp(0, nodes - 1).expand(batch, nodes, width))
        mask = (node < 0) | (seen & (node < nodes))
        mask = mask.reshape(out.shape)
        out.copy_(mask if out.dtype == torch.bool else torch.where(mask, 0.0, -torch.inf))
        return
    out.zero_()
    start = 0
    for rows, length in zip(ancestors, lens.tolist(), strict=True):
        flat = torch.cat([rows.new_ones(nodes, length), rows], 1).flatten()
        if format == MaskFormat.FLAT_BITS:
            padded = torch.nn.functional.pad(flat.int(), (0, -len(flat) % 8)).unflatten(0, (-1, 8))
            flat = (padded << torch.arange(8, device=out.device)).sum(-1).to(torch.uint8)
        out[start : start + len(flat)] = flat
        start += len(flat)
