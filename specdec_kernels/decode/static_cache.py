"""A cache of a fixed length, and passes over it whose shapes depend on no data, which a GPU replays as CUDA graphs.

Row r of request b goes to column ``lengths[b] + r``, so that taking rows back is a smaller length and leaves no holes.
Masks and positions are made of these lengths on the device; numbers of rows come in buckets; a batch keeps its slots
while requests end. Layers with a window have as many columns as the others, and are masked.

On a CPU the same functions run as they are, and are tested; the capture has not run on a GPU yet.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from specdec_kernels.decode import model_facts
from specdec_kernels.decode.cache import keep_paths
from specdec_kernels.decode.layer_kinds import Kind, masks_by_kind
from specdec_kernels.tensors import padded, to_device

#: Columns of a cache are a multiple of this, so that streams of about the same length can have the same one.
GRANULARITY = 64


def bucket(rows: int) -> int:
    """The least power of two that is not below a number of rows."""
    return 1 << max(0, rows - 1).bit_length()


class Placement:
    """Where all layers write the rows of a pass: columns [B, R]; None while prompts are read, from the first on."""

    columns: Tensor | None = None


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [B, H, S, D] of one layer. A pass over fewer requests uses the first slots."""

    def __init__(self, placement: Placement, capacity: int) -> None:
        super().__init__()
        self._placement, self._capacity = placement, capacity
        self.storage: tuple[Tensor, ...] = ()
        """Keys, values; of finite numbers, since what is masked out is multiplied by zero."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As large as it is going to be."""
        self.storage = tuple(
            x.new_zeros((*x.shape[:2], self._capacity, x.shape[3])) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def grow(self, capacity: int) -> None:
        """Have so many columns."""
        self.storage, self._capacity = tuple(_longer(x, capacity) for x in self.storage), capacity

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Write rows where they belong; the keys and values that they attend to."""
        new, columns = (key_states, value_states), self._placement.columns
        if columns is None:
            if not self.storage:
                self.lazy_initialization(key_states, value_states)
            for storage, rows in zip(self.storage, new, strict=True):
                storage[:, :, : rows.shape[2]] = rows
            return new
        whole = tuple(storage[: len(columns)] for storage in self.storage)
        for storage, rows in zip(whole, new, strict=True):
            storage.scatter_(2, columns[:, None, :, None].expand_as(rows), rows)
        return whole

    def get_seq_length(self) -> int:
        """Columns before a prompt: none. Nothing else asks."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a prompt attends to: its own."""
        return query_length, 0

    def get_max_length(self) -> int:
        """All columns."""
        return self._capacity


class StaticCache:
    """Keys and values of requests in slots.

    Args:
        model: a transformers model that takes masks of four dimensions.
        kinds: of its layers.
        slots: requests.
        capacity: tokens of the longest of them, with the rows of a step behind it.
    """

    def __init__(self, model: Any, kinds: Sequence[Kind], slots: int, capacity: int) -> None:
        self.model, self.kinds, self.device = model, list(dict.fromkeys(kinds)), model.device
        self._all_slots, self.capacity = slots, capacity
        mask = model_facts.mask_dtype(model)
        assert mask is not None, "that was checked before"
        self._mask: torch.dtype = mask
        self._placement = Placement()
        self.layers = [StaticLayer(self._placement, capacity) for _ in kinds]
        self._cache = Cache(layers=self.layers)
        self._graphs = Graphs()
        self._made_for = _state(model)
        self._set([0] * slots, slots)

    def serves(self, model: Any, slots: int, columns: int) -> bool:
        """Whether another stream can have it, without many more columns than it needs."""
        fits = self._all_slots == slots and columns <= self.capacity <= 2 * columns
        return fits and self.model is model and self._made_for == _state(model)

    @torch.inference_mode()
    def clear(self) -> None:
        """Have nothing of the last stream in it, which may have left a nan."""
        for layer in self.layers:
            for storage in layer.storage:
                storage.zero_()
        self._set([0] * self._all_slots, self._all_slots)

    def _set(self, lengths: Sequence[int], slots: int) -> None:
        """Have so many tokens of each request in the cache, and slots for requests in all passes from now on."""
        self.lengths, self._slots = list(lengths), slots
        self.lengths_there = to_device(self.lengths, torch.int64, self.device)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], features: bool = False) -> Any:
        """Begin with a prompt in each slot; what the model makes of them, with hidden states if they are wanted.

        An empty prompt is a token that is overwritten."""
        options: dict[str, Any] = {}
        if model_facts.takes(self.model, "logits_to_keep"):
            options["logits_to_keep"] = 1
        rows = padded(prompts if any(prompts) else [[0]] * len(prompts), 0, device=self.device)
        if any(kind.window is not None for kind in self.kinds):  # else causal attention does, which sees no padding
            positions = torch.arange(rows.shape[1], device=self.device).expand_as(rows)
            mask = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=self.device).tril()
            options["attention_mask"] = self._masks(mask.expand(len(rows), -1, -1), positions, positions)
        self._placement.columns = None
        outputs = self._call(rows, features, **options)
        self._set([len(prompt) for prompt in prompts], len(prompts))
        return outputs

    def commit(self, counts: Sequence[int]) -> None:
        """Keep so many more of the rows behind each request's tokens."""
        self._set([length + count for length, count in zip(self.lengths, counts, strict=True)], self._slots)

    @torch.inference_mode()
    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        """Of trees behind each request's tokens, keep the nodes of a path."""
        caches = [storage[: len(paths)] for layer in self.layers for storage in layer.storage]
        keep_paths(caches, paths, self.lengths_there)
        self.commit([len(path) for path in paths])

    @torch.inference_mode()
    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only; if they are more than there are slots, since several go on from
        one, with new graphs."""
        index = to_device(slots, torch.int64, self.device)
        if len(slots) > self._all_slots:
            self._all_slots, self._graphs = len(slots), Graphs()
            for layer in self.layers:
                layer.storage = tuple(storage[index] for storage in layer.storage)
        else:
            for layer in self.layers:
                for storage in layer.storage:
                    storage[: len(slots)] = storage[index]  # the right side is a copy
        fits = self._slots // 2 < len(slots) <= self._slots
        self._set([self.lengths[slot] for slot in slots], self._slots if fits else len(slots))

    @torch.inference_mode()
    def make_room(self, rows: int) -> None:
        """Have columns for so many rows behind the longest request: twice as many as there were, and new graphs, if
        they do not suffice."""
        if max(self.lengths) + rows <= self.capacity:
            return
        self._grow(max(2 * self.capacity, rounded(max(self.lengths) + rows)))

    @torch.inference_mode()
    def join(self, other: StaticCache) -> None:
        """Go on with the requests of another cache of the same model too, in slots behind one's own, with new
        graphs."""
        capacity, batch, more = max(self.capacity, other.capacity), len(self.lengths), len(other.lengths)
        for cache in (self, other):
            cache._grow(capacity)
        for layer, behind in zip(self.layers, other.layers, strict=True):
            pairs = zip(layer.storage, behind.storage, strict=True)
            layer.storage = tuple(torch.cat([old[:batch], new[:more]]) for old, new in pairs)
        self._all_slots = batch + more
        self._set(self.lengths + other.lengths, batch + more)

    def _grow(self, capacity: int) -> None:
        """Have so many columns."""
        self.capacity, self._graphs = capacity, Graphs()
        for layer in self.layers:
            layer.grow(capacity)

    def replay(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """``function(self, **arguments)`` of all slots, for the requests that go on: the slots behind them repeat the
        last one's part. Tensors have a request a row; what is no tensor is part of the graph."""
        batch = len(self.lengths)
        if idle := self._slots - batch:
            arguments = {
                name: torch.cat([x, x[-1:].expand(idle, *x.shape[1:])]) if isinstance(x, Tensor) else x
                for name, x in arguments.items()
            }
        captured = self.device.type in Graphs.devices
        result = self._graphs.run(function, self, arguments) if captured else function(self, **arguments)
        return tree_map_only(Tensor, lambda x: x[:batch], result) if idle else result

    # What follows takes and returns tensors of fixed shapes and waits for nothing.

    def pass_over(self, tokens: Tensor, lengths: Tensor, counts: Tensor, features: bool = False) -> Any:
        """What the model makes of rows [B, R] behind so many tokens each, of which the first ``counts [B]`` are
        real."""
        row = torch.arange(tokens.shape[1], device=self.device)
        columns = lengths[:, None] + row
        # No row is behind the last real one, which may be the last position there is.
        positions = (lengths[:, None] + torch.minimum(row, counts[:, None] - 1)).clamp(min=0)
        keys = torch.arange(self.capacity, device=self.device)
        mask = self._masks(keys <= columns[..., None], positions, keys[None])
        return self._behind(tokens, columns, features, attention_mask=mask, position_ids=positions)

    def pass_over_tree(
        self, tokens: Tensor, lengths: Tensor, depth: Tensor, ancestors: Tensor, features: bool = False
    ) -> Any:
        """What it makes of nodes [B, N], each ``depth [B, N]`` behind so many tokens, that see those of ``ancestors
        [B, N, N]``."""
        columns = lengths[:, None] + torch.arange(tokens.shape[1], device=self.device)
        keys = torch.arange(self.capacity, device=self.device)
        history = keys < lengths[:, None, None]
        mask = history.repeat(1, tokens.shape[1], 1).scatter(2, columns[:, None].expand_as(ancestors), ancestors)
        positions = lengths[:, None] + depth
        at = keys.repeat(len(tokens), 1).scatter(1, columns, positions)
        return self._behind(
            tokens, columns, features, attention_mask=self._masks(mask, positions, at), position_ids=positions
        )

    def _masks(self, mask: Tensor, queries: Tensor, keys: Tensor) -> Any:
        """The masks of all kinds of layers, of one [B, R, S] for rows at ``queries [B, R]`` and columns at ``keys [B,
        S]``."""
        by_kind = {}
        for kind in self.kinds:
            own = mask if kind.window is None else mask & kind.sees(queries[..., None], keys[:, None])
            by_kind[kind] = own[:, None]
        return masks_by_kind(by_kind, self._mask)

    def _behind(self, tokens: Tensor, columns: Tensor, features: bool, **inputs: Any) -> Any:
        self._placement.columns = columns
        return self._call(tokens, features, **inputs)

    def _call(self, tokens: Tensor, features: bool, **inputs: Any) -> Any:
        return self.model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, output_hidden_states=features, **inputs
        )


def _state(model: Any) -> tuple[Any, ...]:
    """What a graph takes for granted: where parameters lie, and by what code they are used."""
    places = tuple(parameter.data_ptr() for parameter in model.parameters())
    return model.device, model.dtype, model_facts.attention(model), places


def _longer(storage: Tensor, capacity: int) -> Tensor:
    """Keys or values with more columns behind them."""
    longer = storage.new_zeros((*storage.shape[:2], capacity, storage.shape[3]))
    longer[:, :, : storage.shape[2]] = storage
    return longer


def rounded(columns: int) -> int:
    """Columns that suffice, as streams have them in common."""
    return -(-columns // GRANULARITY) * GRANULARITY


class CachePool:
    """The cache of the last stream that has ended, with its graphs, for one of the same size.

    One cache, since it is large: where several streams run at once, the others' are given up."""

    def __init__(self) -> None:
        # Of threads that take it at once one has it, since ``pop`` is one operation. No lock: a stream may end wherever
        # garbage is collected, in a thread that holds it.
        self._idle: deque[StaticCache] = deque(maxlen=1)

    def lend(self, stream: Any, model: Any, kinds: Sequence[Kind], slots: int, columns: int) -> StaticCache:
        """A cache with at least so many columns, for as long as ``stream`` lives."""
        cache, wanted = None, rounded(columns)
        with suppress(IndexError):
            cache = self._idle.pop()
        if cache is None or not cache.serves(model, slots, wanted):
            cache = StaticCache(model, kinds, slots, wanted)
        cache.clear()
        weakref.finalize(stream, self._take_back, cache).atexit = False
        return cache

    def _take_back(self, cache: StaticCache) -> None:
        self._idle.append(cache)


class Graphs:
    """Functions of a cache and of named tensors, captured once for each set of shapes and replayed.

    Results are overwritten by the next replay of the same graph."""

    devices = ("cuda",)
    """Types of devices whose work is captured."""

    def __init__(self) -> None:
        self._captured: dict[Any, tuple[Any, Any, dict[str, Tensor]]] = {}  # graph, results, inputs

    def run(self, function: Callable[..., Any], cache: StaticCache, arguments: dict[str, Any]) -> Any:
        """``function(cache, **arguments)``; what is no tensor among them is part of the graph."""
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        others = {name: x for name, x in arguments.items() if name not in tensors}
        shapes = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
        key = (function, shapes, tuple(others.items()))
        if key not in self._captured:
            inputs = {name: x.clone() for name, x in tensors.items()}
            self._captured[key] = (*self.capture(function, cache, inputs, others), inputs)
        graph, results, inputs = self._captured[key]
        for name, x in tensors.items():
            inputs[name].copy_(x)
        graph.replay()
        return results

    @staticmethod
    def capture(
        function: Callable[..., Any], cache: StaticCache, inputs: dict[str, Tensor], others: dict[str, Any]
    ) -> tuple[Any, Any]:
        """A graph, and the results that it writes. What is made at first use is made by a run before; running again
        writes the same rows to the same places."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            function(cache, **inputs, **others)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function(cache, **inputs, **others)
        return graph, results
