"""A target that keeps the logits every token was drawn from, for stacks that hand them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec_kernels.decode.protocols import Scores, Target, TargetSession, shares_ids


class RecordingTarget:
    """Another target, with the rows of one stream kept: of each request the logits float32 [V] of each of its tokens,
    and of those that an end cut off."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.device, self.vocab_size, self.stop_tokens = target.device, target.vocab_size, target.stop_tokens
        self.shares_ids = shares_ids(target)
        self.rows: list[list[Tensor]] = []

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
    ) -> _RecordingSession:
        """As of :class:`specdec_kernels.decode.Target`; what was kept of an earlier stream is dropped."""
        self.rows = [[] for _ in prompts]
        return _RecordingSession(self._target.begin(prompts, max_new_tokens, feature_layers), self.rows)


class _RecordingSession:
    """One stream of a :class:`RecordingTarget`."""

    def __init__(self, session: TargetSession, rows: list[list[Tensor]]) -> None:
        self._session, self._rows = session, rows
        self.features, self.max_rows = session.features, session.max_rows
        self._logits = torch.empty(0)

    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        return self._kept(self._session.score(tokens, counts))

    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        return self._kept(self._session.score_tree(tokens, parents))

    def commit(self, counts: Sequence[int]) -> None:
        self._session.commit(counts)
        self._record([range(count) for count in counts])

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        self._session.commit_path(paths)
        self._record(paths)

    def select(self, slots: Sequence[int]) -> None:
        self._session.select(slots)
        self._rows = [self._rows[slot] for slot in slots]

    def _kept(self, scores: Scores) -> Scores:
        self._logits = scores.logits
        return scores

    def _record(self, kept: Sequence[Sequence[int]]) -> None:
        for rows, logits, own in zip(self._rows, self._logits, kept, strict=True):
            rows += [logits[row].to(torch.float32, copy=True) for row in own]
