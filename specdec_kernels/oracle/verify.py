"""``sample`` and ``verify_chain`` of one request, with the margin of every decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec_kernels.contract import Purpose, Rule
from specdec_kernels.oracle.distributions import (
    Distribution,
    Processing,
    Sampling,
    distribution,
    flat_race,
    largest_finite,
    row_is_valid,
    rows_of_target,
    two_level_race,
)
from specdec_kernels.oracle.noise import Floats, Noise
from specdec_kernels.oracle.step import PLAIN, UNPROCESSED, Step, Verified


@dataclass
class Sampled:
    """One row of :func:`specdec_kernels.sample`."""

    token: int
    logprob: float
    stats: tuple[float, float, float]
    margin: float


def sample(
    logits: Floats,
    noise: Noise,
    row: int = 0,
    sampling: Sampling = PLAIN,
    processing: Processing = UNPROCESSED,
    coupled: bool = False,
) -> Sampled:
    """Draw one token from a row; see :func:`specdec_kernels.sample`."""
    logits = processing.apply(logits, 0, ())
    if not row_is_valid(logits):
        return Sampled(largest_finite(logits), np.nan, (np.nan,) * 3, np.inf)
    dist = distribution(logits, sampling)
    if coupled:
        token, margin = flat_race(dist.probs, dist.probs, noise, row)
    else:
        token, margin = two_level_race(dist.probs, dist.probs, noise, Purpose.DRAFT, row)
    with np.errstate(divide="ignore"):
        return Sampled(token, float(np.log(dist.probs[token])), dist.stats, min(margin, dist.margin))


@dataclass
class Chain(Step):
    """Drafts one after the other: row i is the target's after i of them."""

    def drafted(self, row: int) -> Sequence[int]:
        """The drafts before a row."""
        return self.tokens[:row]

    def stop(self, accepted: int, last: int, valid: bool) -> Verified:
        """The result; ``last`` is the recovered or bonus token."""
        tokens = [*(int(t) for t in self.tokens[:accepted]), last]
        return self.scored(tokens, range(accepted + 1), accepted, valid)

    def accepts(self, target: Floats, draft: Floats, row: int) -> bool:
        """The token rule's test of one draft; strict, so that what the target excludes is never accepted."""
        token, uniform = int(self.tokens[row]), self.noise.uniform(row)
        scale = target[token] + uniform * draft[token]
        self.margins.append(abs(target[token] - uniform * draft[token]) / scale if scale > 0 else np.inf)
        return bool(uniform * draft[token] < target[token])


def verify_chain(
    target_logits: Floats,
    draft_tokens: Sequence[int],
    draft_logits: Floats | None,
    draft_stats: Floats | None,
    noise: Noise,
    sampling: Sampling = PLAIN,
    processing: Processing = UNPROCESSED,
    rule: Rule = Rule.TOKEN,
    draft_temperature: float = 1.0,
    draft_to_target: Sequence[int] | None = None,
) -> Verified:
    """Verify one request; see :func:`specdec_kernels.verify_chain`.

    ``target_logits [K+1, V]``, ``draft_tokens`` without padding (K of them or fewer), ``draft_logits [K, V]``, or
    ``[K, Vd]`` with the target ids of the Vd.
    """
    target_logits = np.asarray(target_logits, np.float64)
    draft_logits = rows_of_target(draft_logits, draft_to_target, target_logits.shape[1])
    chain = Chain(target_logits, draft_tokens, draft_logits, draft_stats, noise, sampling, processing)
    chain.draft_temperature = draft_temperature
    result = {Rule.TOKEN: _token_rule, Rule.BLOCK: _block_rule, Rule.COUPLED: _coupled_rule}[rule](chain)
    chain.margins = []
    result.num_proposed, result.num_independent = len(draft_tokens), _independent(chain, rule)
    result.independent_margin = min(chain.margins, default=np.inf)
    return result


def _token_rule(chain: Chain) -> Verified:
    for row, token in enumerate([*chain.tokens, None]):
        dist = chain.read(row)
        if dist is None:
            return chain.stop(row, largest_finite(chain.logits(row)), False)
        target = dist.probs
        if token is None:
            return chain.stop(row, chain.draw(target, target, row), True)
        draft = chain.draft(row, int(chain.tokens[row]))
        if draft is None:
            return chain.stop(row, chain.draw(target, target, row), False)
        if not chain.accepts(target, draft, row):
            return chain.stop(row, _residual_draw(chain, target, draft, 1.0, 0.0, row), True)
    raise AssertionError("unreachable: the bonus row returns")


def _residual_draw(chain: Chain, target: Floats, draft: Floats, factor: float, error: float, row: int) -> int:
    """From (factor * target - draft)+, from the target where nothing is left; ``error`` is that of the factor."""
    residual = np.fmax(factor * target - draft, 0.0)  # nothing where the draft's probability is not a number
    if chain.greedy or not residual.any():
        return chain.draw(target, target, row)
    return chain.draw(residual, factor * target * (1 + error) + np.nan_to_num(draft), row)


def _block_rule(chain: Chain) -> Verified:
    """Sun et al., arXiv:2403.10444: every draft is visited, the longest acceptable prefix is kept."""
    dists: list[tuple[Distribution | None, Floats | None]] = []
    path_prob = [1.0]  # a_i of docs/algorithms.md, 2
    for row, token in enumerate(chain.tokens):
        if path_prob[-1] == 0:  # and so will be all that follow
            break
        dist = chain.read(row)
        draft = None if dist is None else chain.draft(row, int(chain.tokens[row]))
        dists.append((dist, draft))
        if dist is None or draft is None:
            break
        # What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
        with np.errstate(divide="ignore"):
            path_prob.append(
                min(1.0, path_prob[-1] * dist.probs[token] / draft[token]) if dist.probs[token] > 0 else 0.0
            )
    visited = len(path_prob) - 1
    valid = all(draft is not None for _, draft in dists)
    accepted = 0
    for row in range(visited, 0, -1):
        probability, error = path_prob[row], 2.0 * row * path_prob[row]
        if row < visited:
            dist, draft = dists[row]
            assert dist is not None
            assert draft is not None
            probability, error = _block_acceptance(dist.probs, draft, path_prob[row], row)
        if chain.passes(row - 1, probability, error):
            accepted = row
            break
    dist, draft = dists[accepted] if accepted < len(dists) else (chain.read(accepted), None)
    if dist is None:
        return chain.stop(accepted, largest_finite(chain.logits(accepted)), False)
    if draft is None:
        return chain.stop(accepted, chain.draw(dist.probs, dist.probs, accepted), valid)
    recovered = _residual_draw(chain, dist.probs, draft, path_prob[accepted], 2.0 * accepted, accepted)
    return chain.stop(accepted, recovered, valid)


def _block_acceptance(target: Floats, draft: Floats, path_prob: float, row: int) -> tuple[float, float]:
    """h_i, and how far a relative error of one in every probability moves it, to first order."""
    residual = np.fmax(path_prob * target - draft, 0.0)
    z = residual.sum()
    if z + 1 - path_prob == 0:
        return 1.0, 0.0
    moved_path_prob = 2.0 * row * path_prob if path_prob < 1 else 0.0
    moved_z = ((path_prob * target + draft)[residual > 0]).sum() + moved_path_prob * target[residual > 0].sum()
    error = ((1 - path_prob) * moved_z + z * moved_path_prob) / (z + 1 - path_prob) ** 2
    return float(z / (z + 1 - path_prob)), float(error)


def _coupled_rule(chain: Chain) -> Verified:
    """Daliri et al., arXiv:2408.07978: the sequence is a function of seed and target alone."""
    for row, token in enumerate([*chain.tokens, None]):
        dist = chain.read(row)
        if dist is None:
            return chain.stop(row, largest_finite(chain.logits(row)), False)
        drawn, margin = flat_race(dist.probs, dist.probs, chain.noise, row)
        chain.margins.append(margin)
        if drawn != token:
            return chain.stop(row, drawn, True)
    raise AssertionError("unreachable: the bonus row returns")


def _independent(chain: Chain, rule: Rule) -> int:
    """How many drafts would be accepted each by itself, whatever became of the ones before it."""
    accepted = 0
    for row, token in enumerate(chain.tokens):
        dist, draft = chain.read(row), chain.draft(row, int(chain.tokens[row]))
        if dist is None:
            continue
        if rule == Rule.COUPLED:
            drawn, margin = flat_race(dist.probs, dist.probs, chain.noise, row)
            chain.margins.append(margin)
            accepted += drawn == token
        elif draft is not None:
            accepted += chain.accepts(dist.probs, draft, row)
    return accepted
