"""A target whose steps have shapes that depend on no data, so that a whole step can be one CUDA graph.

Eager transformers takes 14 ms for the step of a model of 16 layers on an H200, nearly all of it launching kernels; a
graph launches them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.checks import whole
from specdec_kernels.decode import model_facts
from specdec_kernels.decode.drafts import Draft
from specdec_kernels.decode.probe import LONGEST
from specdec_kernels.decode.protocols import Scores
from specdec_kernels.decode.static_cache import CachePool, StaticCache, bucket
from specdec_kernels.decode.targets import TransformersTarget, features_of
from specdec_kernels.ops import verify_chain
from specdec_kernels.ops.results import Verified
from specdec_kernels.ops.trees import tree_mask, tree_positions
from specdec_kernels.tensors import to_device


class StaticTarget(TransformersTarget):
    """A ``transformers`` causal language model whose steps have static shapes, on a GPU replayed as CUDA graphs.

    A stream has caches of the length that its longest request can get to, and takes them over, with their graphs, from
    the last stream of as many requests and about that length. A graph is captured whenever a step has rows, kinds of
    drafts or sampling parameters of a shape that was not there before: rows in powers of two, and the batch once half
    of its requests have ended; all of them when a request joins. Chains are scored, verified and committed in one
    graph; with penalties, bias or a grammar, and for trees, the graph ends with the scores.

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
        model_facts.check_decoder_alone(model, "for steps of static shapes", "use TransformersTarget")
        model_facts.check_no_states(self.layers, "for steps of static shapes", "use TransformersTarget")
        model_facts.check_masks(model, "for steps of static shapes", "use TransformersTarget")
        whole("max_rows", max_rows, 1)
        self.max_rows = max_rows
        self.caches = CachePool()

    def begin(  # type: ignore[override]
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
    ) -> StaticSession:
        model_facts.check_masks(self.model, "for steps of static shapes", "use TransformersTarget")
        self.check_use(prompts, max_new_tokens)
        longest, window = max(map(len, prompts)) + max(max_new_tokens), model_facts.column_window(self.model)
        if window is not None and longest > window:
            raise ValueError(
                f"max_new_tokens must leave at most {window} tokens to a model that looks at columns of its cache in "
                f"steps of static shapes, got {longest}: use TransformersTarget"
            )
        return StaticSession(self, prompts, feature_layers, max_new_tokens)

    def session_class(self) -> type[Any]:
        return StaticSession


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
        self._target, self._feature_layers = target, tuple(feature_layers)
        self._longest = max(map(len, prompts)) + max(max_new_tokens)
        # With rows behind the last one that may be kept, and as many as a model is tried out with.
        columns = self._longest + bucket(max(target.max_rows, LONGEST))
        self._cache = target.caches.lend(self, target.model, target.layers, len(prompts), columns)
        read = [prompt[:-1] for prompt in prompts]
        outputs = self._cache.read(read, bool(feature_layers))
        self.features = features_of(outputs, feature_layers) if any(read) else None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request that were read."""
        return self._cache.lengths

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
        made = self._cache.replay(
            stepped,
            last=last,
            lengths=self._cache.lengths_there,
            draft_tokens=functional.pad(draft.tokens, (0, more), value=-1),
            draft_logits=logits,
            draft_stats=stats,
            feature_layers=self._feature_layers,
            **verification,
        )
        return _owned(made.scores, drafts + 1), made.verified

    @torch.inference_mode()
    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        own = to_device(counts, torch.int64, self._target.device)
        more = bucket(tokens.shape[1]) - tokens.shape[1]
        rows = functional.pad(tokens, (0, more))
        scores: Scores = self._cache.replay(
            scored, tokens=rows, lengths=self._cache.lengths_there, counts=own, feature_layers=self._feature_layers
        )
        return _owned(scores, tokens.shape[1])

    def commit(self, counts: Sequence[int]) -> None:
        self._cache.commit(counts)

    @torch.inference_mode()
    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        model_facts.check_tree_lengths(self._target.model, self._longest)
        self._target.try_out("trees")
        more = bucket(tokens.shape[1]) - tokens.shape[1]
        nodes, up = functional.pad(tokens, (0, more)), functional.pad(parents, (0, more), value=-1)
        scores: Scores = self._cache.replay(
            scored_tree,
            tokens=nodes,
            lengths=self._cache.lengths_there,
            depth=tree_positions(up).clamp(min=0).long(),
            ancestors=tree_mask(up),
            feature_layers=self._feature_layers,
        )
        return _owned(scores, tokens.shape[1])

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        self._cache.commit_path(paths)

    def select(self, slots: Sequence[int]) -> None:
        if len(slots) > len(self.lengths):  # several that go on from one
            self._target.check_batch([self._longest] * len(slots))
        self._cache.select(slots)

    def join(self, other: StaticSession) -> None:
        self._target.check_batch([self._longest, other._longest])
        self._cache.join(other._cache)
        self._longest = max(self._longest, other._longest)


# What follows takes and returns tensors of fixed shapes and waits for nothing.


def stepped(
    cache: StaticCache,
    last: Tensor,
    lengths: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    position: Tensor,
    feature_layers: Sequence[int] = (),
    **verification: Any,
) -> Stepped:
    """One step of all slots: scored, verified, committed."""
    counts = (draft_tokens >= 0).long().cumprod(1).sum(1) + 1
    scores = scored(cache, torch.cat([last, draft_tokens.clamp(min=0)], 1), lengths, counts, feature_layers)
    verified = verify_chain(scores.logits, draft_tokens, draft_logits, draft_stats, position=position, **verification)
    accepted = verified.num_accepted.long()
    new = verified.tokens.gather(1, accepted[:, None])
    return Stepped(new, lengths + accepted + 1, position + accepted + 1, scores, verified)


def scored(
    cache: StaticCache, tokens: Tensor, lengths: Tensor, counts: Tensor, feature_layers: Sequence[int] = ()
) -> Scores:
    """Rows [B, R] behind so many tokens each, of which the first ``counts [B]`` are real."""
    outputs = cache.pass_over(tokens, lengths, counts, bool(feature_layers))
    return Scores(outputs.logits, features_of(outputs, feature_layers))


def scored_tree(
    cache: StaticCache,
    tokens: Tensor,
    lengths: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    feature_layers: Sequence[int] = (),
) -> Scores:
    """Nodes [B, N], each ``depth [B, N]`` behind so many tokens, that see those of ``ancestors [B, N, N]``."""
    outputs = cache.pass_over_tree(tokens, lengths, depth, ancestors, bool(feature_layers))
    return Scores(outputs.logits, features_of(outputs, feature_layers))


def _owned(scores: Scores, rows: int) -> Scores:
    """Scores of the first rows. Features are copied: drafters keep them, and the next replay overwrites its results."""
    features = scores.features
    return Scores(scores.logits[:, :rows], None if features is None else features[:, :rows].clone())
