"""A transformers cache for requests that keep different numbers of rows.

The cache is rectangular. A row that one request takes back while another keeps its own becomes a hole: masked out,
and squeezed out once holes are a quarter of the columns. A batch of one has no holes, and no mask.

Behind the columns in use there is room, so that new rows are written where they stay; transformers' own layers copy all
that is there to put a row behind it. How many columns are in use is one number for all layers, and taking rows back
changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from specdec_kernels.ops.kv import compact_kv

#: Share of columns that may be holes before they are squeezed out.
MAX_HOLES = 0.25


#: Columns there is room for at first; twice as many each time that they do not do.
ROOM = 256


class Columns:
    """How many columns of all layers are in use."""

    def __init__(self) -> None:
        self.used = 0


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, S, D] of one layer, with room behind them."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._room: list[Tensor] = []  # keys, values
        super().__init__()

    def held(self) -> list[Tensor]:
        """Keys and values of the columns in use; nothing before the first rows have come."""
        return [room[:, :, : self._columns.used] for room in self._room]

    @property
    def keys(self) -> Tensor | None:
        """As transformers knows them."""
        return self.held()[0] if self._room else None

    @keys.setter
    def keys(self, none: None) -> None:  # what the constructor above sets
        assert none is None

    @property
    def values(self) -> Tensor | None:
        """As transformers knows them."""
        return self.held()[1] if self._room else None

    @values.setter
    def values(self, none: None) -> None:
        assert none is None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write rows behind the columns in use, which stay what they are until all layers have theirs."""
        used, rows = self._columns.used, key_states.shape[2]
        if not self._room or self._room[0].shape[2] < used + rows:
            self._grow(used + rows, key_states, value_states)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, used : used + rows] = new
        keys, values = (room[:, :, : used + rows] for room in self._room)
        return keys, values

    def _grow(self, least: int, *like: Tensor) -> None:
        held, used = self._room, self._columns.used
        columns = max(ROOM, 2 * least)
        self._room = [x.new_empty((*x.shape[:2], columns, x.shape[3])) for x in like]
        for room, before in zip(self._room, held, strict=False):
            room[:, :, :used] = before[:, :, :used]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """The columns in use."""
        return self._columns.used

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these requests only."""
        self._room = [room[indices] for room in self._room]

    def rearrange(self, order: Tensor) -> None:
        """Put the columns ``order [B, S]`` of each request first, in that order."""
        for room in self._room:
            index = order[:, None, :, None].expand(-1, room.shape[1], -1, room.shape[3])
            room[:, :, : order.shape[1]] = room.gather(2, index)


class RaggedCache:
    """Keys and values of B requests, fed with rows by :meth:`run`.

    Raises:
        ValueError: a layer of the model does not attend to the whole text.
    """

    def __init__(self, config: Any, batch: int, device: torch.device) -> None:
        kinds = [type(layer) for layer in DynamicCache(config=config).layers]
        if others := {kind.__name__ for kind in kinds if kind is not DynamicLayer}:
            raise ValueError(f"model must attend to the whole text in every layer, got layers of {sorted(others)}")
        self._columns = Columns()
        self.layers = [RoomyLayer(self._columns) for _ in kinds]
        self.cache = Cache(layers=self.layers)
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
        self._columns.used += rows
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
        self._columns.used += rows
        self._tree += rows
        return outputs

    def keep_path(self, nodes: Tensor) -> None:
        """Of the tree's rows, keep those of a path ``nodes [B, N]``, -1 behind its end; -1 alone keeps nothing."""
        rows, self._tree = self._tree, 0
        start = self.used.shape[1] - rows
        paths = [[node for node in path if node >= 0] for path in nodes.tolist()]
        longest = max(map(len, paths))
        if any(path != list(range(len(path))) for path in paths):  # else all are where they belong
            alike: dict[Any, list[Tensor]] = {}  # layers may differ in their heads
            for layer in self.layers:
                for cache in layer.held():
                    alike.setdefault((cache.shape, cache.stride()), []).append(cache)
            for caches in alike.values():
                compact_kv(caches, nodes, start)
        counts = torch.tensor([len(path) for path in paths], device=nodes.device)
        self.used[:, start:] = torch.arange(rows, device=nodes.device) < counts[:, None]
        self.lengths = self.lengths + counts
        self.crop(rows - longest)

    def crop(self, columns: int) -> None:
        """Take back the last columns of every request."""
        if columns:
            self.lengths = self.lengths - self.used[:, -columns:].sum(1)
            self.used = self.used[:, :-columns]
            self._columns.used -= columns
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
        for layer in self.layers:
            layer.rearrange(order)
        self._columns.used = order.shape[1]
        self.used = self.used.gather(1, order)
