"""``sample`` and ``verify_chain`` in PyTorch. Shapes, dtypes and semantics: :mod:`specdec_kernels.ops`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.contract import Purpose, Rule
from specdec_kernels.reference.distributions import (
    Adjustments,
    Distributions,
    Sampling,
    distributions,
    draft_distributions,
    draft_temperatures_of,
    flat_race,
    largest_finite,
    plain,
    point_mass,
    processed,
    processed_rows,
    rows_of_target,
    token_logprobs,
    two_level_race,
)
from specdec_kernels.reference.noise import uniforms


def sample(
    logits: Tensor,
    target_to_draft: Tensor | None,
    seed: Tensor,
    position: Tensor,
    row: Tensor,
    sampling: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    bitmask: Tensor | None,
    adjusted_ids: Tensor | None,
    id_counts: Tensor | None,
    id_bias: Tensor | None,
    penalties: Tensor | None,
    coupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = rows_of_target(logits, target_to_draft)
    logits = processed_rows(logits, Adjustments.of(adjusted_ids, id_counts, id_bias, penalties), bitmask)
    distribution = distributions(logits, Sampling.of(sampling, (temperature, top_k, top_p, min_p), logits))
    weights = distribution.probs.nan_to_num(0.0)
    if coupled:
        greedy = distribution.probs.argmax(-1)
        tokens = torch.where(distribution.scale.isinf(), greedy, flat_race(weights, seed, position + row))
    else:
        tokens = two_level_race(weights, seed, position, Purpose.DRAFT, row)
    tokens = torch.where(distribution.valid, tokens, largest_finite(logits))
    logprobs = distribution.probs.gather(-1, tokens[:, None])[:, 0].log()
    return tokens, logprobs.float(), distribution.stats


def _draft_probs(
    vocab: int, drafted: Tensor, logits: Tensor | None, stats: Tensor | None, temperature: Tensor, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """The distributions ``[B, K, V]`` the drafts were drawn from, and whether each is usable."""
    certain = point_mass(drafted, vocab)
    if logits is None:
        return certain, torch.ones_like(drafted, dtype=torch.bool)
    probs = draft_distributions(logits, stats, temperature, drafted)
    # A greedy target accepts its argmax and draws its argmax, whatever the draft's distribution.
    probs = torch.where(greedy[:, None, None], certain, probs)
    return probs, probs.gather(-1, drafted[..., None])[..., 0].isfinite()


def _draft_lengths(draft_tokens: Tensor, num_draft: Tensor | None) -> Tensor:
    """Drafts before the first -1, at most ``num_draft``."""
    lengths = (draft_tokens >= 0).long().cumprod(1).sum(1)
    return lengths if num_draft is None else torch.minimum(lengths, num_draft.long().clamp(min=0))


def check_ids(draft_tokens: Tensor, num_draft: Tensor | None, cu_rows: Tensor | None, vocab: int) -> None:
    """On the CPU, where looking is free, an id outside [-1, V) is an error; elsewhere it ends the draft."""
    live = (draft_tokens == -1).cumsum(1) == 0
    for limit in (num_draft, None if cu_rows is None else cu_rows.diff() - 1):
        if limit is not None:
            live &= torch.arange(draft_tokens.shape[1], device=draft_tokens.device) < limit[:, None]
    bad = (live & ((draft_tokens < -1) | (draft_tokens >= vocab))).nonzero()
    if len(bad):
        b, i = bad[0].tolist()
        raise ValueError(f"draft_tokens must be -1 or in [0, {vocab}), got {int(draft_tokens[b, i])} at [{b}, {i}]")


class _Chains(NamedTuple):
    """Everything the rules decide by."""

    target: Distributions
    draft: Tensor
    draft_valid: Tensor
    drafted: Tensor
    lengths: Tensor
    uniforms: Tensor
    seed: Tensor
    position: Tensor

    @property
    def live(self) -> Tensor:
        """bool [B, K]: which drafts there are."""
        return torch.arange(self.drafted.shape[1], device=self.drafted.device) < self.lengths[:, None]

    def acceptable(self) -> Tensor:
        """bool [B, K]: the token rule's test of each draft; strict: what the target excludes is never accepted."""
        index = self.drafted[..., None]
        target, draft = self.target.probs[:, :-1].gather(-1, index), self.draft.gather(-1, index)
        return self.live & self.draft_valid & (self.uniforms * draft[..., 0] < target[..., 0])

    def coupled(self) -> Tensor:
        """int64 [B, K+1]: what the target draws after each draft; the rows are races of their own."""
        rows = self.target.probs.shape[1]
        weights = self.target.probs.nan_to_num(0.0)
        draws = [flat_race(weights[:, i], self.seed, self.position + i) for i in range(rows)]
        return torch.where(self.target.scale.isinf(), self.target.probs.argmax(-1), torch.stack(draws, 1))


class _Decision(NamedTuple):
    """What a rule decides."""

    accepted: Tensor
    factor: Tensor
    """float64 [B]: the recovered or bonus token is drawn from (factor * target - draft)+ ..."""
    use_residual: Tensor
    """bool [B]: ... where this holds, else from the target."""
    read_valid: Tensor
    """bool [B]: the rows that were looked at, the emitting target row aside, were usable."""


def _token_rule(chains: _Chains) -> _Decision:
    accepted = chains.acceptable().long().cumprod(1).sum(1)
    one = torch.ones_like(accepted, dtype=torch.float64)
    if chains.drafted.shape[1] == 0:
        return _Decision(accepted, one, one < 0, one > 0)
    usable = chains.draft_valid.gather(1, accepted.clamp(max=chains.drafted.shape[1] - 1)[:, None])[:, 0]
    rejected = accepted < chains.lengths
    return _Decision(accepted, one, rejected & usable, usable | ~rejected)


def _block_rule(chains: _Chains) -> _Decision:
    """Sun et al., arXiv:2403.10444; the names follow docs/algorithms.md, 2."""
    index = chains.drafted[..., None]
    target = chains.target.probs[:, :-1]
    prob = target.gather(-1, index)[..., 0]
    # What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
    ratio = torch.where(prob == 0, 0.0, prob / chains.draft.gather(-1, index)[..., 0])
    usable = chains.target.valid[:, :-1] & chains.draft_valid
    path_prob = [torch.ones_like(chains.lengths, dtype=torch.float64)]
    looking = torch.ones_like(chains.lengths, dtype=torch.bool)
    looked_at, read_valid = torch.zeros_like(chains.lengths), looking
    for i in range(chains.drafted.shape[1]):
        looking = looking & chains.live[:, i] & (path_prob[-1] > 0)
        read_valid = read_valid & (usable[:, i] | ~looking)
        looking = looking & usable[:, i]
        path_prob.append(torch.where(looking, (path_prob[-1] * ratio[:, i]).clamp(max=1.0), path_prob[-1]))
        looked_at = looked_at + looking
    accepted = torch.zeros_like(looked_at)
    for row in range(chains.drafted.shape[1], 0, -1):
        keep = path_prob[row]
        if row < chains.drafted.shape[1]:
            rest = (keep[:, None] * target[:, row] - chains.draft[:, row]).nan_to_num(0.0).clamp(min=0.0).sum(-1)
            inside = torch.where(rest + 1 - keep == 0, 1.0, rest / (rest + 1 - keep))
            keep = torch.where(looked_at == row, keep, inside)
        stays = (row <= looked_at) & (chains.uniforms[:, row - 1] < keep)
        accepted = torch.where((accepted == 0) & stays, row, accepted)
    factor = torch.stack(path_prob, 1).gather(1, accepted[:, None])[:, 0]
    return _Decision(accepted, factor, accepted < looked_at, read_valid)


def _coupled_rule(chains: _Chains, draws: Tensor) -> _Decision:
    same = chains.live & chains.target.valid[:, :-1] & (draws[:, :-1] == chains.drafted)
    accepted = same.long().cumprod(1).sum(1)
    one = torch.ones_like(accepted, dtype=torch.float64)
    return _Decision(accepted, one, one < 0, one > 0)


def _emit(chains: _Chains, decision: _Decision, logits: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """The drawn token and whether the row it came from is usable."""
    requests = torch.arange(len(chains.lengths), device=chains.lengths.device)
    accepted = decision.accepted
    row_valid = chains.target.valid[requests, accepted]
    if draws is not None:
        emitted = draws[requests, accepted]
    else:
        weights = chains.target.probs[requests, accepted]
        if chains.drafted.shape[1]:
            draft = chains.draft[requests, accepted.clamp(max=chains.drafted.shape[1] - 1)]
            residual = (decision.factor[:, None] * weights - draft).nan_to_num(0.0).clamp(min=0.0)
            greedy = chains.target.scale[:, 0].isinf()
            use = decision.use_residual & (residual.sum(-1) > 0) & ~greedy
            weights = torch.where(use[:, None], residual, weights)
        weights = weights.nan_to_num(0.0)
        emitted = two_level_race(weights, chains.seed, chains.position, Purpose.TARGET, accepted)
    return torch.where(row_valid, emitted, largest_finite(logits[requests, accepted])), row_valid


def _padded(target_logits: Tensor, cu_rows: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Ragged rows ``[N, V]`` as ``[B, K+1, V]``, and the drafts that each may have."""
    starts = cu_rows.long()
    index = (starts[:-1, None] + torch.arange(rows, device=starts.device)).clamp(max=len(target_logits) - 1)
    return target_logits[index], (starts.diff() - 1).clamp(min=0)


def verify_chain(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    target_to_draft: Tensor | None,
    draft_temperatures: Tensor | None,
    draft_temperature: float,
    seed: Tensor,
    position: Tensor,
    num_draft: Tensor | None,
    cu_rows: Tensor | None,
    sampling: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    bitmask: Tensor | None,
    adjusted_ids: Tensor | None,
    id_counts: Tensor | None,
    id_bias: Tensor | None,
    penalties: Tensor | None,
    rule: int,
    logprobs: bool,
    independent: bool,
    workspace: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, rows = draft_tokens.shape[0], draft_tokens.shape[1] + 1
    device, vocab = target_logits.device, target_logits.shape[-1]
    if draft_tokens.device.type == "cpu":
        check_ids(draft_tokens, num_draft, cu_rows, vocab)
    if cu_rows is not None:
        target_logits, capacity = _padded(target_logits, cu_rows, rows)
        bitmask = None if bitmask is None else _padded(bitmask, cu_rows, rows)[0]
        num_draft = capacity if num_draft is None else torch.minimum(num_draft.long(), capacity)
    parameters = Sampling.of(sampling, (temperature, top_k, top_p, min_p), draft_tokens)
    drafted_tokens = draft_tokens.long().masked_fill(draft_tokens >= vocab, -1)
    lengths = _draft_lengths(drafted_tokens, num_draft)
    drafted = drafted_tokens.clamp(min=0)
    before = torch.ones((rows, rows - 1), dtype=torch.bool, device=device).tril(-1).expand(batch, -1, -1)
    logits = processed(
        target_logits,
        drafted,
        before,
        Adjustments.of(adjusted_ids, id_counts, id_bias, penalties),
        bitmask,
    )

    temperatures = draft_temperatures_of(draft_temperatures, draft_temperature, drafted)
    if draft_logits is not None:
        draft_logits = rows_of_target(draft_logits, target_to_draft)
    draft, draft_valid = _draft_probs(vocab, drafted, draft_logits, draft_stats, temperatures, parameters.scale.isinf())
    steps = torch.arange(rows - 1, device=device).expand(batch, rows - 1)
    u = torch.stack([uniforms(seed, position, steps[:, i]) for i in range(rows - 1)], 1) if rows > 1 else steps.double()
    target = distributions(logits, parameters.repeated(rows))
    chains = _Chains(target, draft, draft_valid, drafted, lengths, u, seed, position)

    draws = chains.coupled() if rule == Rule.COUPLED else None
    if draws is not None:
        decision = _coupled_rule(chains, draws)
    else:
        decision = _block_rule(chains) if rule == Rule.BLOCK else _token_rule(chains)
    emitted, row_valid = _emit(chains, decision, logits, draws)

    index = torch.arange(rows, device=device).expand(batch, rows)
    tokens = functional.pad(drafted_tokens, (0, 1), value=-1)
    tokens = torch.where(index < decision.accepted[:, None], tokens, -1)
    tokens = torch.where(index == decision.accepted[:, None], emitted[:, None], tokens)

    alone = torch.full_like(lengths, -1)
    if independent:
        same = chains.live & (draws[:, :-1] == drafted) if draws is not None else chains.acceptable()
        alone = (same & target.valid[:, :-1]).sum(1)
    counters = torch.stack([lengths, alone], 1).int()
    scores, raw_scores = (target_logits.new_empty((0,), dtype=torch.float32) for _ in range(2))  # no aliases
    if logprobs:
        scores, raw_scores = (token_logprobs(x.probs, tokens) for x in (target, plain(target_logits)))
    return tokens, decision.accepted.int(), decision.read_valid & row_valid, counters, scores, raw_scores
