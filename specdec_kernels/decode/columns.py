"""Columns of a cache, of all layers that attend to the same tokens; and the keys and values of each layer in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

from specdec_kernels.decode.layer_kinds import Kind
from specdec_kernels.tensors import to_device

#: Share of columns that may be holes before they are squeezed out.
MAX_HOLES = 0.25

#: Columns a cache has capacity for at first; twice as many as needed each time that they do not suffice.
CAPACITY = 256


class Columns:
    """The columns of all layers of a kind."""

    def __init__(self, kind: Kind, batch: int, device: torch.device) -> None:
        self.kind, self._device = kind, device
        self.layers = list[PreallocatedLayer]()
        self.used = 0
        """How many columns are in use, holes among them."""
        self.lengths = [0] * batch
        """Tokens of each request in them."""
        self.dropped = [0] * batch
        """Tokens before those, which nothing attends to any more."""
        self.pinned = False
        """Whether columns stay where they are, since they may be gone back to."""
        self.live: Tensor | None = None
        """bool [B, columns]: which hold a token; None where all do."""

    def mask(self) -> Tensor:
        """bool [B, columns]: which hold a token."""
        if self.live is not None:
            return self.live
        return torch.ones((len(self.lengths), self.used), dtype=torch.bool, device=self._device)

    def positions(self, count: int) -> Tensor:
        """int64 [B, S]: of the first columns; of one that holds no token, any."""
        # A column's position is the number of tokens before it.
        dropped = to_device(self.dropped, torch.int64, self._device)[:, None]
        return dropped + self.mask()[:, :count].long().cumsum(1) - 1

    def attended(self, start: int, queries: Tensor, new: Tensor, keys: Tensor) -> Tensor:
        """bool [B, 1, R, start + T]: which columns rows at positions ``queries [B, R]`` attend to: of the first ones
        all that hold a token, and of the T behind them, at positions ``keys [B, T]``, those of ``new [1 or B, R, T]``,
        unless they are out of the window."""
        batch, rows = queries.shape
        old = self.mask()[:, None, :start].expand(-1, rows, -1)
        new = new.expand(batch, -1, -1)
        if self.kind.window is not None:
            old = old & self.kind.sees(queries[..., None], self.positions(start)[:, None])
            new = new & self.kind.sees(queries[..., None], keys[:, None])
        return torch.cat([old, new], 2)[:, None]

    def add(self, counts: Sequence[int], rows: int) -> None:
        """Expect ``rows`` new columns, of which the first ``counts[b]`` of each request hold a token."""
        if self.live is not None or any(count < rows for count in counts):
            self.live = torch.cat([self.mask(), self._first(counts, rows)], 1)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, start: int, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """Keep the first ``start`` columns, holding ``lengths[b]`` tokens of each request, and after them the first
        ``counts[b]`` new rows."""
        longest = max(counts)
        if self.live is not None or any(count < longest for count in counts):
            self.live = torch.cat([self.mask()[:, :start], self._first(counts, longest)], 1)
        self.settle(start + longest, [length + count for length, count in zip(lengths, counts, strict=True)])

    def settle(self, used: int, lengths: list[int]) -> None:
        """Have the first columns in use, so many tokens of each request among them, all of them decided on."""
        self.used, self.lengths = used, lengths
        holes = any(length < used for length in lengths)
        if not holes:
            self.live = None
        if self.pinned:
            return
        window = self.kind.window
        if window is not None and used >= 2 * window:
            self._squeeze([min(length, window - 1) for length in lengths])
        elif holes and (len(lengths) == 1 or max(lengths) < (1 - MAX_HOLES) * used):
            self._squeeze(lengths)

    def select(self, slots: Sequence[int], index: Tensor) -> None:
        """Go on with the requests in these slots only."""
        if self.live is not None:
            self.live = self.live[index]
        self.dropped = [self.dropped[slot] for slot in slots]
        self.settle(self.used, [self.lengths[slot] for slot in slots])

    def join(self, other: Columns) -> None:
        """Go on with the requests of others of the same kind too, behind one's own."""
        requests, used = (len(self.lengths), len(other.lengths)), max(self.used, other.used)
        live = [functional.pad(each.mask(), (0, used - each.used)) for each in (self, other)]
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.join(more, requests, used)
        self.live, self.dropped = torch.cat(live), self.dropped + other.dropped
        self.settle(used, self.lengths + other.lengths)

    def _first(self, counts: Sequence[int], columns: int) -> Tensor:
        """bool [B, columns]: the first ``counts[b]``."""
        return torch.arange(columns, device=self._device) < to_device(counts, torch.int64, self._device)[:, None]

    def _squeeze(self, lengths: list[int]) -> None:
        """Keep the last ``lengths[b]`` tokens of each request, side by side."""
        skipped = [before - after for before, after in zip(self.lengths, lengths, strict=True)]
        longest = max(lengths)
        # A stable sort keeps tokens in order; positions are in the rotated keys already.
        order = self.mask().long().argsort(dim=1, descending=True, stable=True)
        first = to_device(skipped, torch.int64, self._device)[:, None]
        index = first + torch.arange(longest, device=self._device)
        order = order.gather(1, index.clamp(max=self.used - 1))
        for layer in self.layers:
            layer.rearrange(order)
        self.dropped = [before + more for before, more in zip(self.dropped, skipped, strict=True)]
        self.live = None if min(lengths) == longest else self._first(lengths, longest)
        self.used, self.lengths = longest, lengths


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, S, D] of one layer, with capacity behind them."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._storage: list[Tensor] = []  # keys, values
        self.filled = 0
        """Columns that the model has written, of all passes so far."""
        columns.layers.append(self)
        super().__init__()

    def in_use(self) -> list[Tensor]:
        """Keys and values of the columns in use; nothing before the first rows have come."""
        return [storage[:, :, : self._columns.used] for storage in self._storage]

    @property
    def keys(self) -> Tensor | None:
        """As transformers knows them."""
        return self.in_use()[0] if self._storage else None

    @keys.setter
    def keys(self, none: None) -> None:  # what the constructor above sets
        assert none is None

    @property
    def values(self) -> Tensor | None:
        """As transformers knows them."""
        return self.in_use()[1] if self._storage else None

    @values.setter
    def values(self, none: None) -> None:
        assert none is None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write rows behind the columns in use, whose number stays the same until all layers have theirs."""
        used, rows = self._columns.used, key_states.shape[2]
        if not self._storage or self._storage[0].shape[2] < used + rows:
            self._grow(used + rows, key_states, value_states)
        for storage, new in zip(self._storage, (key_states, value_states), strict=True):
            storage[:, :, used : used + rows] = new
        self.filled = used + rows
        keys, values = (storage[:, :, : used + rows] for storage in self._storage)
        return keys, values

    def _grow(self, least: int, *like: Tensor) -> None:
        before, used = self._storage, self._columns.used
        columns = max(CAPACITY, 2 * least)
        self._storage = [x.new_empty((*x.shape[:2], columns, x.shape[3])) for x in like]
        for storage, old in zip(self._storage, before, strict=False):
            storage[:, :, :used] = old[:, :, :used]
        self.is_initialized = True

    def was_written(self, rows: int) -> bool:
        """Whether it was, in the pass over so many rows that has just ended."""
        return self.filled == self._columns.used

    def get_seq_length(self) -> int:
        """The columns in use, and those before them that were dropped of all requests."""
        return self._columns.used + min(self._columns.dropped)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these requests only."""
        self._storage = [storage[indices] for storage in self._storage]

    def join(self, other: PreallocatedLayer, requests: tuple[int, int], columns: int) -> None:
        """Put another layer's requests behind one's own, so many here and there, all of them with so many columns: what
        a request has none of is 0, since what is not a number would be seen through masks."""
        like = self._storage or other._storage
        if not like:
            return
        capacity = max(
            CAPACITY, columns, *(storage[0].shape[2] for storage in (self._storage, other._storage) if storage)
        )
        joined = [x.new_zeros((sum(requests), x.shape[1], capacity, x.shape[3])) for x in like]
        for storage, slots in ((self.in_use(), slice(None, requests[0])), (other.in_use(), slice(requests[0], None))):
            for old, new in zip(storage, joined, strict=False):
                new[slots, :, : old.shape[2]] = old
        self._storage, self.is_initialized, self.filled = joined, True, columns

    def rearrange(self, order: Tensor) -> None:
        """Put the columns ``order [B, S]`` of each request first, in that order."""
        columns = order.shape[1]
        for place, storage in enumerate(self._storage):
            index = order[:, None, :, None].expand(-1, storage.shape[1], -1, storage.shape[3])
            kept = storage.gather(2, index)
            if storage.shape[2] > max(CAPACITY, 8 * columns):  # what a long prompt needed
                storage = storage.new_empty((*storage.shape[:2], max(CAPACITY, 4 * columns), storage.shape[3]))
                self._storage[place] = storage
            storage[:, :, :columns] = kept
