"""A target whose steps have shapes that depend on no data, so that a whole step can be one CUDA graph.

Eager transformers takes 14 ms for the step of a model of 16 layers on an H200, nearly all of it launching kernels; a
graph launches them at once. What that takes: caches of a fixed length, in which row r of request b goes to column
``lengths[b] + r``, so that taking rows back is a smaller length and leaves no holes; masks and positions that are made
of these lengths on the device; numbers of rows in buckets; a batch that keeps its slots while requests end.

On a CPU the same functions run as they are, and are tested; the capture has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from specdec_kernels.decode import model_facts
from specdec_kernels.decode.cache import check_layers, keep_paths
from specdec_kernels.decode.probe import LONGEST
from specdec_kernels.decode.protocols import Draft, Scores
from specdec_kernels.decode.targets import TransformersTarget, features_of
from specdec_kernels.decode.tensors import padded, to_device
from specdec_kernels.ops import verify_chain
from specdec_kernels.ops.results import Verified
from specdec_kernels.ops.trees import tree_mask, tree_positions


class StaticTarget(TransformersTarget):
    """A ``transformers`` causal language model whose steps have static shapes, on a GPU replayed as CUDA graphs.

    A stream holds caches of the length that its longest request can get to. It captures a graph whenever a step has
    rows, kinds of drafts or sampling parameters of a shape that it has not had before: rows in powers of two, and the
    batch once half of its requests have ended. Chains are scored, verified and committed in one graph; with penalties,
    bias or a grammar, and for trees, the graph ends with the scores.

    Args:
        model: as of :class:`TransformersTarget`, with an attention that takes masks of four dimensions (``"eager"``,
            ``"sdpa"``) and, on a GPU, experts whose shapes depend on no data (``"batched_mm"``, ``"grouped_mm"``).
        max_rows: rows of a request in one step at most: drafts and one.
        check: as of :class:`TransformersTarget`.

    Raises:
        TypeError, ValueError: a model that the loop cannot use, with the reason; ``max_rows`` below 1.
    """

    def __init__(self, model: Any, max_rows: int = 16, *, check: bool = True) -> None:
        super().__init__(model, check=check)
        if isinstance(max_rows, bool) or not isinstance(max_rows, int):
            raise TypeError(f"max_rows must be an int, got {max_rows!r}")
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.max_rows = max_rows

    def begin(  # type: ignore[override]
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
    ) -> StaticSession:
        model_facts.check_tree_attention(self.model)
        self.check_use(prompts, max_new_tokens)
        return StaticSession(self, prompts, feature_layers, max_new_tokens)

    def session_class(self) -> type[Any]:
        return StaticSession


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

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Write rows where they belong; the keys and values that they attend to."""
        new, columns = (key_states, value_states), self._placement.columns
        if columns is None:
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


class Stepped(NamedTuple):
    """What one step makes: the state of the next one and what became of this one."""

    last: Tensor
    """int64 [B, 1]: the last token of each request."""
    lengths: Tensor
    """int64 [B]: tokens before it, which are in the cache."""
    position: Tensor
    """int64 [B]: tokens of each request so far."""
    scores: Scores
    verified: Verified


class StaticSession:
    """One stream of a :class:`StaticTarget`."""

    @torch.inference_mode()
    def __init__(
        self,
        target: StaticTarget,
        prompts: Sequence[Sequence[int]],
        feature_layers: Sequence[int],
        max_new_tokens: Sequence[int],
    ) -> None:
        self._target, self._model, self._feature_layers = target, target.model, feature_layers
        self._device, self._additive = target.device, model_facts.additive_mask(target.model)
        self._longest = max(map(len, prompts)) + max(max_new_tokens)
        # With rows behind the last one that may be kept, and as many as a model is tried out with.
        self._capacity = self._longest + bucket(max(target.max_rows, LONGEST))
        self._placement = Placement()
        layers = check_layers(self._model.config)
        self._layers = [StaticLayer(self._placement, self._capacity) for _ in range(layers)]
        self._cache = Cache(layers=self._layers)
        self._graphs = Graphs()
        read = [list(prompt[:-1]) for prompt in prompts]
        # Causal attention does not see what is behind a short prompt; an empty one is a token that is overwritten.
        options = {"logits_to_keep": 1} if model_facts.takes(self._model, "logits_to_keep") else {}
        tokens = padded(read if any(read) else [[0]] * len(read), 0, device=self._device)
        outputs = self._call(tokens, **options)
        self.features = features_of(outputs, feature_layers) if any(read) else None
        self._keep([len(tokens) for tokens in read], len(prompts))

    def _keep(self, lengths: Sequence[int], slots: int) -> None:
        """Have so many tokens of each request in the cache, and slots for requests in all passes from now on."""
        self.lengths, self._slots = list(lengths), slots
        self._lengths = to_device(self.lengths, torch.int64, self._device)

    def max_rows(self) -> int:
        return self._target.max_rows

    @torch.inference_mode()
    def step(self, last: Tensor, draft: Draft, **verification: Any) -> tuple[Scores, Verified]:
        """Score drafts [B, K] behind the last tokens [B, 1], verify them and keep what was accepted, all of it on the
        device; :meth:`commit` then tells the numbers kept. ``verification`` as of
        :func:`specdec_kernels.verify_chain`, without penalties, bias and mask."""
        drafts = draft.tokens.shape[1]
        more = bucket(drafts + 1) - drafts - 1
        logits, stats = (x if x is None else functional.pad(x, (0, 0, 0, more)) for x in (draft.logits, draft.stats))
        stepped = self._replay(
            self.stepped,
            last=last,
            lengths=self._lengths,
            draft_tokens=functional.pad(draft.tokens, (0, more), value=-1),
            draft_logits=logits,
            draft_stats=stats,
            **verification,
        )
        return _owned(stepped.scores, drafts + 1), stepped.verified

    @torch.inference_mode()
    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        own = to_device(counts, torch.int64, self._device)
        more = bucket(tokens.shape[1]) - tokens.shape[1]
        rows = functional.pad(tokens, (0, more))
        scores: Scores = self._replay(self.scored, tokens=rows, lengths=self._lengths, counts=own)
        return _owned(scores, tokens.shape[1])

    def commit(self, counts: Sequence[int]) -> None:
        self._keep([length + count for length, count in zip(self.lengths, counts, strict=True)], self._slots)

    @torch.inference_mode()
    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        model_facts.check_tree_lengths(self._model, self._longest)
        self._target.try_out("trees")
        more = bucket(tokens.shape[1]) - tokens.shape[1]
        nodes, up = functional.pad(tokens, (0, more)), functional.pad(parents, (0, more), value=-1)
        scores: Scores = self._replay(
            self.scored_tree,
            tokens=nodes,
            lengths=self._lengths,
            depth=tree_positions(up).clamp(min=0).long(),
            ancestors=tree_mask(up),
        )
        return _owned(scores, tokens.shape[1])

    @torch.inference_mode()
    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        caches = [storage[: len(paths)] for layer in self._layers for storage in layer.storage]
        keep_paths(caches, paths, self._lengths)
        self.commit([len(path) for path in paths])

    @torch.inference_mode()
    def select(self, slots: Sequence[int]) -> None:
        index = to_device(slots, torch.int64, self._device)
        for layer in self._layers:
            for storage in layer.storage:
                storage[: len(slots)] = storage[index]  # the right side is a copy
        half = len(slots) <= self._slots // 2
        self._keep([self.lengths[slot] for slot in slots], len(slots) if half else self._slots)

    # What follows takes and returns tensors of fixed shapes and waits for nothing.

    def stepped(
        self,
        last: Tensor,
        lengths: Tensor,
        draft_tokens: Tensor,
        draft_logits: Tensor | None,
        draft_stats: Tensor | None,
        position: Tensor,
        **verification: Any,
    ) -> Stepped:
        """One step of all slots: scored, verified, committed."""
        counts = (draft_tokens >= 0).long().cumprod(1).sum(1) + 1
        scores = self.scored(torch.cat([last, draft_tokens.clamp(min=0)], 1), lengths, counts)
        verified = verify_chain(
            scores.logits, draft_tokens, draft_logits, draft_stats, position=position, **verification
        )
        accepted = verified.num_accepted.long()
        new = verified.tokens.gather(1, accepted[:, None])
        return Stepped(new, lengths + accepted + 1, position + accepted + 1, scores, verified)

    def scored(self, tokens: Tensor, lengths: Tensor, counts: Tensor) -> Scores:
        """Rows [B, R] behind so many tokens each, of which the first ``counts [B]`` are real."""
        row = torch.arange(tokens.shape[1], device=self._device)
        columns = lengths[:, None] + row
        # No row is behind the last real one, which may be the last position there is.
        positions = (lengths[:, None] + torch.minimum(row, counts[:, None] - 1)).clamp(min=0)
        mask = torch.arange(self._capacity, device=self._device) <= columns[..., None]
        return self._scored(tokens, columns, positions, mask)

    def scored_tree(self, tokens: Tensor, lengths: Tensor, depth: Tensor, ancestors: Tensor) -> Scores:
        """Nodes [B, N], each ``depth [B, N]`` behind so many tokens, that see those of ``ancestors [B, N, N]``."""
        columns = lengths[:, None] + torch.arange(tokens.shape[1], device=self._device)
        history = torch.arange(self._capacity, device=self._device) < lengths[:, None, None]
        mask = history.repeat(1, tokens.shape[1], 1).scatter(2, columns[:, None].expand_as(ancestors), ancestors)
        return self._scored(tokens, columns, lengths[:, None] + depth, mask)

    def _scored(self, tokens: Tensor, columns: Tensor, positions: Tensor, mask: Tensor) -> Scores:
        mask = mask[:, None]
        if self._additive is not None:
            lowest = torch.finfo(self._additive).min
            mask = torch.zeros(mask.shape, dtype=self._additive, device=mask.device).masked_fill(~mask, lowest)
        self._placement.columns = columns
        outputs = self._call(tokens, attention_mask=mask, position_ids=positions)
        return Scores(outputs.logits, features_of(outputs, self._feature_layers))

    def _call(self, tokens: Tensor, **inputs: Any) -> Any:
        wanted = bool(self._feature_layers)
        return self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, output_hidden_states=wanted, **inputs
        )

    def _replay(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """A function of all slots, for the requests that go on: the slots behind them repeat the last one's part."""
        batch = len(self.lengths)
        if idle := self._slots - batch:
            arguments = {
                name: torch.cat([x, x[-1:].expand(idle, *x.shape[1:])]) if isinstance(x, Tensor) else x
                for name, x in arguments.items()
            }
        result = self._graphs.run(function, arguments) if self._device.type in Graphs.devices else function(**arguments)
        return tree_map_only(Tensor, lambda x: x[:batch], result) if idle else result


class Graphs:
    """Functions of named tensors, captured once for each set of shapes and replayed.

    Results are overwritten by the next replay of the same graph. The functions are not kept: they are bound to what
    these graphs belong to, whose caches would wait for the garbage collector.
    """

    devices = ("cuda",)
    """Types of devices whose work is captured."""

    def __init__(self) -> None:
        self._captured: dict[Any, tuple[Any, Any, dict[str, Tensor]]] = {}  # graph, results, inputs

    def run(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """``function(**arguments)``; what is no tensor among them is part of the graph."""
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        others = {name: x for name, x in arguments.items() if name not in tensors}
        shapes = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
        key = (function.__name__, shapes, tuple(others.items()))
        if key not in self._captured:
            inputs = {name: x.clone() for name, x in tensors.items()}
            self._captured[key] = (*self.capture(function, inputs, others), inputs)
        graph, results, inputs = self._captured[key]
        for name, x in tensors.items():
            inputs[name].copy_(x)
        graph.replay()
        return results

    @staticmethod
    def capture(function: Callable[..., Any], inputs: dict[str, Tensor], others: dict[str, Any]) -> tuple[Any, Any]:
        """A graph, and the results that it writes. What is made at first use is made by a run before; running again
        writes the same rows to the same places."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            function(**inputs, **others)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function(**inputs, **others)
        return graph, results


def _owned(scores: Scores, rows: int) -> Scores:
    """Scores of the first rows. Features are copied: drafters keep them, and the next replay overwrites its results."""
    features = scores.features
    return Scores(scores.logits[:, :rows], None if features is None else features[:, :rows].clone())
