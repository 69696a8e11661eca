"""A transformers cache for requests that keep different numbers of rows.

The cache is rectangular. A row that one request takes back while another keeps its own becomes a hole: masked out,
and squeezed out once holes are a quarter of the columns. A batch of one has no holes, and no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from specdec_kernels.ops.kv import compact_kv

#: Share of columns that may be holes before they are squeezed out.
MAX_HOLES = 0.25


class RaggedCache:
    """Keys and values of B requests, fed with rows by :meth:`run`."""

    def __init__(self, config: Any, batch: int, device: torch.device) -> None:
        self.cache = DynamicCache(config=config)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.used = torch.zeros((batch, 0), dtype=torch.bool, device=device)  # columns that hold a token
        self._fresh = 0  # columns of the last run
        self._tree = 0  # columns of a tree that is not decided on yet

    def run(self, forward: Callable[..., Any], counts: Tensor, rows: int, **inputs: Any) -> Any:
        """Call ``forward`` on ``rows`` new rows, of which the first ``counts[b]`` of each request are real."""
        index = torch.arange(rows, device=counts.device)
        self.used = torch.cat([self.used, index < counts[:, None]], 1)
        outputs = forward(
            attention_mask=None if len(counts) == 1 else self.used.long(),
            position_ids=self.lengths[:, None] + index,
            past_key_values=self.cache,
            use_cache=True,
            **inputs,
        )
        self.lengths = self.lengths + counts
        self._fresh = rows
        return outputs

    def keep(self, rows: Tensor) -> None:
        """Of the last run, keep the first ``rows[b]`` rows of each request."""
        start = self.used.shape[1] - self._fresh
        self.lengths = self.lengths - self.used[:, start:].sum(1) + rows
        self.used[:, start:] &= torch.arange(self._fresh, device=rows.device) < rows[:, None]
        self.crop(self._fresh - int(rows.max()))

    def run_tree(self, forward: Callable[..., Any], ancestors: Tensor, depth: Tensor, **inputs: Any) -> Any:
        """Call ``forward`` on R rows of a tree: row r is ``depth[b, r]`` behind the text, and attends to the text and
        to those of the tree's rows so far, these R the last of them, that ``ancestors [B, R, T]`` marks."""
        rows, start = depth.shape[1], self.used.shape[1] - self._tree
        text = self.used[:, None, :start].expand(-1, rows, -1)
        outputs = forward(
            attention_mask=torch.cat([text, ancestors], 2)[:, None],
            position_ids=self.lengths[:, None] + depth,
            past_key_values=self.cache,
            use_cache=True,
            **inputs,
        )
        self.used = functional.pad(self.used, (0, rows))  # nobody's, until it is known which are kept
        self._tree += rows
        return outputs

    def keep_path(self, nodes: Tensor) -> None:
        """Of the tree's rows, keep those of a path ``nodes [B, N]``, -1 behind its end; -1 alone keeps nothing."""
        rows, self._tree = self._tree, 0
        start = self.used.shape[1] - rows
        counts = (nodes >= 0).sum(1)
        longest = int(counts.max())
        if longest:
            alike: dict[Any, list[Tensor]] = {}  # layers may differ in their heads
            for layer in self.cache.layers:
                for cache in (layer.keys, layer.values):
                    alike.setdefault((cache.shape, cache.stride()), []).append(cache)
            for caches in alike.values():
                compact_kv(caches, nodes, start)
        self.used[:, start:] = torch.arange(rows, device=nodes.device) < counts[:, None]
        self.lengths = self.lengths + counts
        self.crop(rows - longest)

    def crop(self, columns: int) -> None:
        """Take back the last columns of every request."""
        if columns:
            self.lengths = self.lengths - self.used[:, -columns:].sum(1)
            self.used = self.used[:, :-columns]
            self.cache.crop(-columns)
        if int(self.lengths.max()) < (1 - MAX_HOLES) * self.used.shape[1]:
            self._squeeze()

    def select(self, requests: Tensor) -> None:
        """Go on with these requests only."""
        self.lengths, self.used = self.lengths[requests], self.used[requests]
        if self.used.shape[1]:
            self.cache.batch_select_indices(requests)

    def _squeeze(self) -> None:
        # A stable sort keeps tokens in order; positions are in the rotated keys already.
        order = self.used.long().argsort(dim=1, descending=True, stable=True)[:, : int(self.lengths.max())]
        for layer in self.cache.layers:
            index = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        self.used = self.used.gather(1, order)
