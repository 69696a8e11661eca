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
from transformers import Cache

from specdec_kernels.decode.columns import Columns, PreallocatedLayer
from specdec_kernels.decode.layer_kinds import Kind, masks_by_kind
from specdec_kernels.decode.states import StateLayer
from specdec_kernels.ops.kv import compact_kv
from specdec_kernels.tensors import padded, to_device


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
