"""A transformers cache for requests that keep different numbers of rows.

The cache is rectangular. A row that one request takes back while another keeps its own becomes a hole: masked out, and
squeezed out once holes are a quarter of the columns, or once a request is alone. Columns without holes need no mask.

Layers that attend to the same tokens have their columns in common. Those with a window keep what is behind it while
drafts are not decided on, which may be taken back; it is squeezed out once there is as much of it as of the window.

Behind the columns in use there is capacity for more, so that new rows are written where they stay; transformers' own
layers copy everything to put a row behind it. How many columns are in use is one number for all layers of a kind, and
taking rows back changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from specdec_kernels.decode.states import StateLayer
from specdec_kernels.ops.kv import compact_kv
from specdec_kernels.tensors import padded, to_device

#: Share of columns that may be holes before they are squeezed out.
MAX_HOLES = 0.25

#: Columns a cache has capacity for at first; twice as many as needed each time that they do not suffice.
CAPACITY = 256


class Kind(NamedTuple):
    """Which tokens the layers of a kind attend to."""

    name: str
    """transformers' own."""
    window: int | None = None
    """So many of the latest, the token itself among them; None for all."""
    chunked: bool = False
    """Whether a token attends to those of its own chunk of the history, which is cut into such windows."""
    states: int = 0
    """Where there are any, all that is left of the history, in place of keys and values."""

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool: whether tokens at some positions attend to others at positions that are not behind them."""
        assert self.window is not None, "else nobody asks"
        return queries // self.window == keys // self.window if self.chunked else queries - keys < self.window


#: Layers that attend to the whole history.
WHOLE = Kind("full_attention")

_CHUNKED = "chunked_attention"


def layer_kinds(config: Any) -> list[Kind]:
    """Of each layer of a model's cache.

    Raises:
        ValueError: a layer keeps something else than keys and values, or states alone.
    """
    layers, known = DynamicCache(config=config).layers, (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
    if isinstance(count := getattr(config, "num_decoder_layers", None), int):  # T5's, where the encoder has others
        layers = (layers * count)[:count]
    if others := {type(layer).__name__ for layer in layers if type(layer) not in known}:
        raise ValueError(f"model must have layers of keys and values, or of states, got {sorted(others)}")
    text = config.get_text_config(decoder=True)
    chunked = None if getattr(text, "sliding_window", None) else getattr(text, "attention_chunk_size", None)
    names = getattr(text, "layer_types", None)
    kinds = []
    for index, layer in enumerate(layers):
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        inferred = WHOLE.name if window is None else _CHUNKED if chunked == window else "sliding_attention"
        name = names[index] if names else inferred
        states = layer.number_of_states if isinstance(layer, LinearAttentionLayer) else 0
        kinds.append(Kind(name, window, name == _CHUNKED, states))
    if len({kind.name for kind in kinds}) < len(set(kinds)):
        raise ValueError(f"model must have one window for all layers of a type, got {sorted(map(str, set(kinds)))}")
    return kinds


def masks_by_kind(masks: dict[Kind, Tensor], dtype: torch.dtype) -> Any:
    """Masks of bool as transformers takes them: of a dtype, and by name where there are several kinds of layers. One
    that is added to the scores has 0 where a row attends, and the lowest number elsewhere."""
    if dtype != torch.bool:
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # softmax may be in float32
        masks = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
            for kind, mask in masks.items()
        }
    return next(iter(masks.values())) if len(masks) == 1 else {kind.name: mask for kind, mask in masks.items()}


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


class Mark(NamedTuple):
    """What a cache held at some time, to go back to."""

    lengths: list[int]
    columns: list[tuple[int, list[int], Tensor | None]]
    """Of each kind: the columns in use, tokens in them, and which hold a token."""
    states: list[list[Tensor]]
    """Of each layer that has any."""


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
        kinds: of the model's layers.
        batch: requests.
        device: of the model.
        forward: what is called on rows, with a cache of transformers among its arguments.
        mask: dtype of the masks [B, 1, R, columns] that the model takes: ``torch.bool``, or a floating one that is
            added to its scores; ``None`` where it takes none but [B, columns], of 1 where there is a token.
        argument: of ``forward`` that the cache is handed over as.
        positions: whether it takes the positions of rows [B, R], as ``position_ids``.
        column_positions: whether it takes those of all columns [B, S] too, as an argument of that name.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        batch: int,
        device: torch.device,
        forward: Callable[..., Any],
        *,
        mask: torch.dtype | None = torch.bool,
        argument: str = "past_key_values",
        positions: bool = True,
        column_positions: bool = False,
    ) -> None:
        self._device, self._forward, self._mask, self._argument = device, forward, mask, argument
        self._positions, self._column_positions = positions, column_positions
        by_kind = {kind: Columns(kind, batch, device) for kind in dict.fromkeys(kinds) if not kind.states}
        self._columns = list(by_kind.values())
        self.layers = [StateLayer(kind.states) if kind.states else PreallocatedLayer(by_kind[kind]) for kind in kinds]
        self._states = [layer for layer in self.layers if isinstance(layer, StateLayer)]
        self.cache = Cache(layers=self.layers)
        self.lengths = [0] * batch
        """Tokens of each request that were read."""
        self._fresh: list[int] = []  # real rows of the last run
        self._fresh_columns = 0
        self._tree: Tensor | None = None  # int64 [B, T]: depths of a tree's rows that are not decided on yet

    @property
    def columns(self) -> int:
        """Columns in use of the first layer that has any, holes among them."""
        return self._columns[0].used if self._columns else 0

    def run(self, counts: Sequence[int], rows: int, decided: bool = False, **inputs: Any) -> Any:
        """Call ``forward`` on ``rows`` new rows, of which the first ``counts[b]`` of each request are real. Rows that
        are decided on are not taken back by a commit."""
        index = torch.arange(rows, device=self._device)
        lengths, own = to_device([self.lengths, counts], torch.int64, self._device)[..., None].unbind()
        if self._positions:  # no row is behind the last real one, which may be the last position there is
            inputs["position_ids"] = (lengths + torch.minimum(index, own - 1)).clamp(min=0)
        mask = self._chain_mask(counts, lengths + index)
        if self._column_positions:
            inputs["column_positions"] = self._positions_with(0, lengths + index)
        for columns in self._columns:
            columns.add(counts, rows)
        for layer in self._states:
            layer.lead = min(counts) if decided else 0
        outputs = self._called(mask, rows, inputs)
        for layer in self._states:
            layer.keep(counts)
            if decided:
                layer.forget_rows()
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._fresh, self._fresh_columns = list(counts), rows
        return outputs

    def commit(self, counts: Sequence[int]) -> None:
        """Of the last run, keep the first ``counts[b]`` rows of each request."""
        fresh, columns = self._fresh, self._fresh_columns
        for each in self._columns:
            decided = [length - own for length, own in zip(each.lengths, fresh, strict=True)]
            each.keep(each.used - columns, decided, counts)
        for layer in self._states:
            layer.keep(counts)
            layer.forget_rows()
        self.lengths = [n - old + new for n, old, new in zip(self.lengths, fresh, counts, strict=True)]

    def settle(self) -> None:
        """Squeeze out what is behind a window, where all rows so far are decided on."""
        for columns in self._columns:
            columns.settle(columns.used, columns.lengths)

    def run_tree(self, ancestors: Tensor, depth: Tensor, **inputs: Any) -> Any:
        """Call ``forward`` on R rows of a tree: row r is ``depth[b, r]`` behind the history, and attends to it and to
        those of the tree's rows so far, these R the last of them, that ``ancestors [B, R, T]`` marks."""
        assert self._mask is not None, "that was checked before"
        assert not self._states, "likewise"
        lengths = to_device(self.lengths, torch.int64, self._device)[:, None]
        queries, rows = lengths + depth, depth.shape[1]
        before, self._tree = self._tree, depth if self._tree is None else torch.cat([self._tree, depth], 1)
        start = 0 if before is None else before.shape[1]
        masks = {
            columns.kind: columns.attended(columns.used - start, queries, ancestors, lengths + self._tree)
            for columns in self._columns
        }
        if self._column_positions:
            inputs["column_positions"] = self._positions_with(start, lengths + self._tree)
        outputs = self._called(masks_by_kind(masks, self._mask), rows, {"position_ids": queries, **inputs})
        for columns in self._columns:
            if columns.live is not None:
                columns.live = functional.pad(columns.live, (0, rows))
        return outputs

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the tree's rows, keep those of a path of nodes of each request; an empty one keeps nothing."""
        rows = 0 if self._tree is None else self._tree.shape[1]
        for columns in self._columns:
            keep_paths([cache for layer in columns.layers for cache in layer.in_use()], paths, columns.used - rows)
        self._tree, self._fresh, self._fresh_columns = None, [0] * len(paths), rows
        self.commit([len(path) for path in paths])

    def mark(self) -> Mark:
        """What is in the cache now."""
        columns = [(each.used, each.lengths, each.live) for each in self._columns]
        return Mark(self.lengths, columns, [layer.state() for layer in self._states])

    def restore(self, mark: Mark) -> None:
        """Take back everything that came after a mark; nothing of before may have been taken back since."""
        self.lengths = mark.lengths
        for columns, (used, lengths, live) in zip(self._columns, mark.columns, strict=True):
            columns.live = live
            columns.settle(used, lengths)
        for layer, state in zip(self._states, mark.states, strict=True):
            layer.put(state)
            layer.forget_rows()

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Take back at the end whatever is read within, and taken back."""
        mark = self.mark()
        for columns in self._columns:
            columns.pinned = True
        try:
            yield
        finally:
            self.restore(mark)
            for columns in self._columns:
                columns.pinned = False

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only."""
        index = to_device(slots, torch.int64, self._device)
        self.cache.batch_select_indices(index)
        self.lengths = [self.lengths[slot] for slot in slots]
        for columns in self._columns:
            columns.select(slots, index)

    def join(self, other: Self) -> None:
        """Go on with the requests of another cache of the same model too, behind one's own."""
        for columns, more in zip(self._columns, other._columns, strict=True):
            columns.join(more)
        for layer, also in zip(self._states, other._states, strict=True):
            layer.join(also, (len(self.lengths), len(other.lengths)))
        self.lengths = self.lengths + other.lengths

    def _positions_with(self, last: int, new: Tensor) -> Tensor:
        """int64 [B, S]: the positions of all columns, ``new [B, T]`` for the last ones in use or behind them."""
        first = self._columns[0]
        return torch.cat([first.positions(first.used - last), new], 1)

    def _chain_mask(self, counts: Sequence[int], positions: Tensor) -> Any:
        """Which columns new rows at ``positions [B, R]`` attend to: all that hold a token, and of the new ones those up
        to their own, so that a row that is none attends to something and does not become nan. No mask where that is
        what a model does without one."""
        rows = positions.shape[1]
        ragged = any(count < rows for count in counts)
        if not any(ragged or columns.live is not None or columns.kind.window for columns in self._columns):
            return None  # nor where there are no columns
        if self._mask is None:
            return self._column_mask(counts, rows)
        causal = torch.ones((1, rows, rows), dtype=torch.bool, device=self._device).tril()
        masks = {each.kind: each.attended(each.used, positions, causal, positions) for each in self._columns}
        return masks_by_kind(masks, self._mask)

    def _column_mask(self, counts: Sequence[int], rows: int) -> Tensor:
        """The mask of a run, int64 [B, columns]. A request that has nothing to read, and has read nothing, attends to
        its first hole: a row that attends to nothing may become nan, and a nan is seen through every mask."""
        (columns,) = self._columns
        own = to_device([max(count, length == 0) for count, length in zip(counts, self.lengths, strict=True)],
                        torch.int64, self._device)[:, None]  # fmt: skip
        new = torch.arange(rows, device=self._device) < own
        return torch.cat([columns.mask(), new], 1).long()

    def _called(self, mask: Any, rows: int, inputs: dict[str, Any]) -> Any:
        outputs = self._forward(attention_mask=mask, use_cache=True, **{self._argument: self.cache}, **inputs)
        for columns in self._columns:
            columns.used += rows
        idle = [index for index, layer in enumerate(self.layers) if not layer.was_written(rows)]
        if idle:
            raise ValueError(
                "model must write its keys and values, or states, to the cache that it is given, but "
                f"{type(self._forward).__name__} did not in layers {idle}: gradient checkpointing in training mode, "
                "and architectures with a state of their own, do not"
            )
        return outputs
