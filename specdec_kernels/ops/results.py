"""What the functions that draw and verify return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """What :func:`sample` returns."""

    tokens: Tensor
    """int64 [R], always in [0, V)."""
    logprobs: Tensor
    """float32 [R], natural logarithm of the token's probability under the distribution it was drawn from; nan for a row
    that is not valid."""
    stats: Tensor
    """float32 [R, 3], ``(scale, cutoff, logsumexp)``; hand it to :func:`verify_chain` as ``draft_stats``. The
    distribution is ``[logit >= cutoff] * exp(scale * logit - logsumexp)``; cutoff is the smallest logit the filters
    keep, -inf without filters. Where the largest logit is 2^31 temperatures or more, (0, largest, log(how many have
    it)): see docs/noise.md."""


class Verified(NamedTuple):
    """What :func:`verify_chain` returns."""

    tokens: Tensor
    """int64 [B, K+1]: the accepted drafts, the recovered or bonus token, then -1."""
    num_accepted: Tensor
    """int32 [B]: drafts accepted, all of them before the first that was not."""
    valid: Tensor
    """bool [B]: False where a row that had to be read was not usable (nan, +inf, nothing finite)."""
    counters: Tensor
    """int32 [B, 2]: :attr:`num_proposed` and :attr:`num_independent`."""
    logprobs: Tensor
    """float32 [B, K+1]: of ``tokens`` under the target's distribution, after all processing, temperature and filters;
    nan where there is no token or the row is not usable. Empty unless requested."""
    raw_logprobs: Tensor
    """float32 [B, K+1]: of ``tokens`` under ``softmax(target_logits)``. Empty unless requested."""

    @property
    def num_proposed(self) -> Tensor:
        """int32 [B]: drafts there were."""
        return self.counters[:, 0]

    @property
    def num_emitted(self) -> Tensor:
        """int32 [B]: tokens gained, ``num_accepted + 1``."""
        return self.num_accepted + 1

    @property
    def num_independent(self) -> Tensor:
        """int32 [B]: drafts that would be accepted each by itself, whatever became of the ones before; -1 unless asked
        for."""
        return self.counters[:, 1]

    def by_position(self) -> tuple[Tensor, Tensor]:
        """(int64 [K] requests that proposed a draft there, int64 [K] requests that accepted it)."""
        index = torch.arange(self.tokens.shape[1] - 1, device=self.tokens.device)
        return tuple((count[:, None] > index).sum(0) for count in (self.num_proposed, self.num_accepted))  # type: ignore[return-value]


class DrawnChildren(NamedTuple):
    """What :func:`sample_children` returns."""

    tokens: Tensor
    """int64 [R, count]; -1 behind the last, where the distribution has fewer ids to give."""
    logprobs: Tensor
    """float32 [R, count]: natural logarithm of each token's probability under the distribution of the row, whatever its
    siblings; nan where there is none, and for a row that is not valid."""
    stats: Tensor
    """float32 [R, 3]: as of :class:`Sample`; hand them to :func:`verify_tree` as ``draft_stats`` of the node."""


class VerifiedTree(NamedTuple):
    """What :func:`verify_tree` returns."""

    tokens: Tensor
    """int64 [B, N]: the accepted drafts along their path, the recovered or bonus token, then -1."""
    nodes: Tensor
    """int32 [B, N]: the root and the accepted nodes, then -1: the rows whose keys and values stay, as
    :func:`compact_kv` takes them."""
    num_accepted: Tensor
    """int32 [B]: drafts accepted."""
    valid: Tensor
    """bool [B]: False where a row that had to be read was not usable (nan, +inf, nothing finite)."""
    logprobs: Tensor
    """float32 [B, N]: as of :class:`Verified`, and empty unless requested, as the next ones are."""
    raw_logprobs: Tensor
    """float32 [B, N]: of ``tokens`` under ``softmax(target_logits)``."""

    @property
    def num_emitted(self) -> Tensor:
        """int32 [B]: tokens gained, ``num_accepted + 1``."""
        return self.num_accepted + 1
