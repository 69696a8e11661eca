"""A transformers cache for requests that keep different numbers of rows.

The cache is rectangular. A row that one request takes back while another keeps its own becomes a hole: masked out, and
squeezed out once holes are a quarter of the columns, or once a request is alone. Columns without holes need no mask.

Behind the columns in use there is capacity for more, so that new rows are written where they stay; transformers' own
layers copy everything to put a row behind it. How many columns are in use is one number for all layers, and taking rows
back changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from specdec_kernels.decode.tensors import padded, to_device
from specdec_kernels.ops.kv import compact_kv

#: Share of columns that may be holes before they are squeezed out.
MAX_HOLES = 0.25

#: Columns a cache has capacity for at first; twice as many as needed each time that they do not suffice.
CAPACITY = 256


class Columns:
    """How many columns of all layers are in use."""

    def __init__(self) -> None:
        self.used = 0


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, S, D] of one layer, with capacity behind them."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._storage: list[Tensor] = []  # keys, values
        self.filled = 0
        """Columns that the model has written, of all passes so far."""
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

    def get_seq_length(self) -> int:
        """The columns in use."""
        return self._columns.used

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
        for storage in self._storage:
            index = order[:, None, :, None].expand(-1, storage.shape[1], -1, storage.shape[3])
            storage[:, :, : order.shape[1]] = storage.gather(2, index)


class Mark(NamedTuple):
    """What a cache held at some time, to go back to."""

    columns: int
    lengths: list[int]
    live: Tensor | None


def check_layers(config: Any) -> int:
    """Layers of a model's cache, all of which attend to the whole history.

    Raises:
        ValueError: a layer does not.
    """
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    if others := {kind.__name__ for kind in kinds if kind is not DynamicLayer}:
        raise ValueError(f"model must attend to the whole history in every layer, got layers of {sorted(others)}")
    return len(kinds)


def keep_paths(caches: Sequence[Tensor], paths: Sequence[Sequence[int]], start: Tensor | int) -> None:
    """Of trees whose roots are at ``start`` in caches [B, H, S, D], move the nodes of a path of each request to the
    front."""
    if all(list(path) == list(range(len(path))) for path in paths):
        return  # all are where they belong
    nodes = padded(paths, -1, device=caches[0].device)
    alike: dict[Any, list[Tensor]] = {}  # layers may differ in their heads; and under autocast keys from values
    for cache in caches:
        alike.setdefault((cache.shape, cache.stride(), cache.dtype), []).append(cache)
    for each in alike.values():
        compact_kv(each, nodes, start)


class RaggedCache:
    """Keys and values of B requests, fed with rows by :meth:`run`.

    Args:
        config: of the model.
        batch: requests.
        device: of the model.
        additive: dtype of the masks of trees, 0 where a row attends and the lowest number elsewhere; ``None`` for masks
            of bool.

    Raises:
        ValueError: a layer of the model does not attend to the whole history.
    """

    def __init__(self, config: Any, batch: int, device: torch.device, additive: torch.dtype | None = None) -> None:
        self._device, self._additive = device, additive
        self._columns = Columns()
        self.layers = [PreallocatedLayer(self._columns) for _ in range(check_layers(config))]
        self.cache = Cache(layers=self.layers)
        self.lengths = [0] * batch
        """Tokens of each request that are in the cache."""
        self._live: Tensor | None = None  # bool [B, columns]: which hold a token; None where all do
        self._fresh: list[int] = []  # real rows of the last run
        self._fresh_columns = 0
        self._tree = 0  # columns of a tree that is not decided on yet

    @property
    def columns(self) -> int:
        """Columns in use, holes among them."""
        return self._columns.used

    def run(
        self, forward: Callable[..., Any], counts: Sequence[int], rows: int, positions: bool = True, **inputs: Any
    ) -> Any:
        """Call ``forward`` on ``rows`` new rows, of which the first ``counts[b]`` of each request are real; with their
        positions, unless it takes none."""
        index = torch.arange(rows, device=self._device)
        lengths, own = to_device([self.lengths, counts], torch.int64, self._device)[..., None].unbind()
        if self._live is not None or any(count < rows for count in counts):
            self._live = torch.cat([self._mask(), index < own], 1)
        if positions:  # no row is behind the last real one, which may be the last position there is
            inputs["position_ids"] = (lengths + torch.minimum(index, own - 1)).clamp(min=0)
        outputs = self._forward(forward, self._attended(counts), rows, inputs)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._fresh, self._fresh_columns = list(counts), rows
        return outputs

    def commit(self, counts: Sequence[int]) -> None:
        """Of the last run, keep the first ``counts[b]`` rows of each request."""
        start, longest = self.columns - self._fresh_columns, max(counts)
        if self._live is not None or any(count < longest for count in counts):
            index = torch.arange(longest, device=self._device)
            kept = index < to_device(counts, torch.int64, self._device)[:, None]
            self._live = torch.cat([self._mask()[:, :start], kept], 1)
        lengths = [n - old + new for n, old, new in zip(self.lengths, self._fresh, counts, strict=True)]
        self._reset(start + longest, lengths)

    def run_tree(self, forward: Callable[..., Any], ancestors: Tensor, depth: Tensor, **inputs: Any) -> Any:
        """Call ``forward`` on R rows of a tree: row r is ``depth[b, r]`` behind the history, and attends to it and to
        those of the tree's rows so far, these R the last of them, that ``ancestors [B, R, T]`` marks."""
        rows, start = depth.shape[1], self.columns - self._tree
        history = self._mask()[:, None, :start].expand(-1, rows, -1)
        mask = torch.cat([history, ancestors], 2)[:, None]
        if self._additive is not None:
            lowest = max(torch.finfo(self._additive).min, torch.finfo(torch.float32).min)  # softmax may be in float32
            mask = torch.zeros(mask.shape, dtype=self._additive, device=mask.device).masked_fill(~mask, lowest)
        lengths = to_device(self.lengths, torch.int64, self._device)[:, None]
        outputs = self._forward(forward, mask, rows, {"position_ids": lengths + depth, **inputs})
        if self._live is not None:
            self._live = functional.pad(self._live, (0, rows))
        self._tree += rows
        return outputs

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the tree's rows, keep those of a path of nodes of each request; an empty one keeps nothing."""
        rows, self._tree = self._tree, 0
        start = self.columns - rows
        keep_paths([cache for layer in self.layers for cache in layer.in_use()], paths, start)
        self._fresh, self._fresh_columns = [0] * len(paths), rows
        self.commit([len(path) for path in paths])

    def mark(self) -> Mark:
        """What is in the cache now."""
        return Mark(self.columns, self.lengths, self._live)

    def restore(self, mark: Mark) -> None:
        """Take back everything that came after a mark; nothing of before may have been taken back since."""
        self._live = mark.live
        self._reset(mark.columns, mark.lengths)

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only."""
        index = to_device(slots, torch.int64, self._device)
        if self.columns:
            self.cache.batch_select_indices(index)
        if self._live is not None:
            self._live = self._live[index]
        self._reset(self.columns, [self.lengths[slot] for slot in slots])

    def join(self, other: RaggedCache) -> None:
        """Go on with the requests of another cache of the same model too, behind one's own."""
        requests, columns = (len(self.lengths), len(other.lengths)), max(self.columns, other.columns)
        live = [functional.pad(cache._mask(), (0, columns - cache.columns)) for cache in (self, other)]
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.join(more, requests, columns)
        self._live = torch.cat(live)
        self._reset(columns, self.lengths + other.lengths)

    def _attended(self, counts: Sequence[int]) -> Tensor | None:
        """The mask of a run, int64 [B, columns]. A request that has nothing to read, and has read nothing, attends to
        its first hole: a row that attends to nothing may become nan, and a nan is seen through every mask."""
        if self._live is None:
            return None
        mask = self._live.long()
        for slot, count in enumerate(counts):
            if self.lengths[slot] + count == 0:
                mask[slot, 0] = 1
        return mask

    def _mask(self) -> Tensor:
        """bool [B, columns]: which columns hold a token."""
        if self._live is not None:
            return self._live
        return torch.ones((len(self.lengths), self.columns), dtype=torch.bool, device=self._device)

    def _forward(self, forward: Callable[..., Any], mask: Tensor | None, rows: int, inputs: dict[str, Any]) -> Any:
        outputs = forward(attention_mask=mask, past_key_values=self.cache, use_cache=True, **inputs)
        self._columns.used += rows
        if idle := [index for index, layer in enumerate(self.layers) if layer.filled != self.columns]:
            raise ValueError(
                f"model must write its keys and values to the cache that it is given, but {type(forward).__name__} did "
                f"not in layers {idle}: gradient checkpointing in training mode, and architectures with a state of "
                "their own, do not"
            )
        return outputs

    def _reset(self, columns: int, lengths: list[int]) -> None:
        """Have the first columns in use, so many tokens of each request among them."""
        self._columns.used, self.lengths = columns, lengths
        holes = any(length < columns for length in lengths)
        if not holes:
            self._live = None
        elif len(lengths) == 1 or max(lengths) < (1 - MAX_HOLES) * columns:
            self._squeeze()

    def _squeeze(self) -> None:
        # A stable sort keeps tokens in order; positions are in the rotated keys already.
        longest = max(self.lengths)
        order = self._mask().long().argsort(dim=1, descending=True, stable=True)[:, :longest]
        for layer in self.layers:
            layer.rearrange(order)
        self._live = self._mask().gather(1, order)
        self._reset(longest, self.lengths)
