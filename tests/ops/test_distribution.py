"""The distribution of every backend: exactly, by seeds that put each random number into a chosen cell, and by
statistics."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from distributions import (
    QUARTERS,
    RACE_CELLS,
    TWELFTHS,
    F,
    distance_from_target,
    g_test,
    limit,
    logits_of,
    probs_of,
    seeds_by_cell,
    uniforms,
)

from specdec_kernels.contract import TILE, Purpose

POSITION = 11

DENSE = {(): (2, 2), (0,): (2, 2), (1,): (2, 2)}
CERTAIN = {(): (4, 0), (0,): (0, 4), (1,): (4, 0)}
DRAFTS = {"dense": DENSE, "statistics": DENSE, "point mass": CERTAIN}
FILTERS = {"none": {}, "top_k": {"top_k": 2}, "top_p": {"top_p": 0.85}, "min_p": {"min_p": 0.22}}


@cache
def cells(rule, length):
    """Seeds for every combination of the numbers that decide; those of acceptance in a grid as fine as the rule's
    chances."""
    rows = range(length + 1)
    if rule == "coupled":
        return seeds_by_cell([([(Purpose.COUPLED, POSITION + row, 0)], RACE_CELLS) for row in rows])
    count = 12 if (rule, length) == ("block", 2) else 4
    acceptances = [([(Purpose.ACCEPT, POSITION, row)], count) for row in rows[:length]]
    return seeds_by_cell([*acceptances, ([(Purpose.TARGET, POSITION, row) for row in rows], RACE_CELLS)])


def distance_by_counting(verify_chain, kind, *, rule="token", filters="none", length=2, drawn_from=None):
    """How far the distribution of length + 1 tokens is from the target's: every draft, every cell, continued by the
    target."""
    rows, draft = (TWELFTHS if (rule, kind, length) == ("block", "point mass", 2) else QUARTERS), DRAFTS[kind]
    seeds = cells(rule, length)
    drafts, masses = [], []
    for tokens in product(range(2), repeat=length):
        mass = F(1, len(seeds))
        for i, token in enumerate(tokens):
            mass *= probs_of((drawn_from or draft)[tokens[:i]])[token]
        if mass:
            drafts.append(tokens)
            masses += [mass] * len(seeds)
    filtered = filters != "none"
    target = torch.stack([torch.stack([logits_of(rows[t[:i]], filtered) for i in range(length + 1)]) for t in drafts])
    # A dense draft is drawn from its softmax as it is; one with statistics carries a filter of its own.
    own = filtered and kind == "statistics"
    logits = torch.stack([torch.stack([logits_of(draft[t[:i]], own) for i in range(length)]) for t in drafts])
    if filtered and not own:
        logits = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    cutoff = float(np.float32(np.log(0.5))) if own else -torch.inf
    stats = torch.tensor([1.0, cutoff, 0.0]).expand(len(masses), length, 3)
    verified = verify_chain(
        target.repeat_interleave(len(seeds), 0),
        torch.tensor(drafts).repeat_interleave(len(seeds), 0),
        None if kind == "point mass" else logits.repeat_interleave(len(seeds), 0),
        stats if kind == "statistics" else None,
        draft_temperature=1.0 if kind == "dense" else None,
        seed=torch.tensor(seeds).repeat(len(drafts)),
        position=POSITION,
        rule=rule,
        **FILTERS[filters],
    )
    return distance_from_target(verified.tokens, masses, rows, length + 1)


#: The rule coupled does not read what drafts were drawn from.
RULES_AND_DRAFTS = [(rule, kind) for rule in ("token", "block") for kind in DRAFTS] + [("coupled", "point mass")]


#: Triton draws the oracle's tokens, decision by decision (test_backends.py); with these the distribution is counted.
COUNTED = {("token", "statistics"), ("block", "dense"), ("coupled", "point mass")}


def one_of_each(parameters):
    return parameters["filters"] == "none" and (parameters["rule"], parameters["kind"]) in COUNTED


@pytest.mark.interpreted(kept=one_of_each)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(("rule", "kind"), RULES_AND_DRAFTS)
def test_the_distribution_is_exact(backend, verify_chain, rule, kind, filters):
    # The interpreter takes a minute for what the others do in a second: there one draft, but everything else.
    length = 1 if backend == "triton" else 2
    assert distance_by_counting(verify_chain, kind, rule=rule, filters=filters, length=length) == 0


@pytest.mark.interpreted(kept=lambda parameters: False)
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["dense", "statistics"])
def test_a_wrong_draft_distribution_is_seen(verify_chain, rule, kind):
    """Case 3: drafts from another distribution than the declared one change the text."""
    other = dict.fromkeys(DRAFTS[kind], (1, 3))
    assert distance_by_counting(verify_chain, kind, rule=rule, drawn_from=other, length=1) > F(1, 50)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_drafts_at_a_temperature_of_their_own(backend, sample, verify_chain, rule):
    """Case 3, by frequencies: declared as it was, the text has the target's distribution, declared as 1 it has not; and
    decision by decision it is that of the stats, and that of logits divided by it."""
    count, heat = {"triton": 12, "cuda": 200}.get(backend, 20_000), 0.5
    generator = torch.Generator().manual_seed(2)
    target, draft = torch.randn(6, generator=generator), torch.randn(6, generator=generator) * 0.8
    seeds, key = torch.arange(count), {"seed": torch.arange(count), "position": POSITION, "rule": rule}
    drawn = sample(draft.expand(count, 6), seed=seeds, position=POSITION, temperature=heat)
    rows, drafts = target.expand(count, 2, 6), draft.expand(count, 1, 6)
    right = verify_chain(rows, drawn.tokens[:, None], drafts, **key, draft_temperature=heat)
    each = verify_chain(rows, drawn.tokens[:, None], drafts, **key, draft_temperature=torch.full((count,), heat))
    divided = verify_chain(rows, drawn.tokens[:, None], drafts / heat, **key, draft_temperature=1.0)
    by_stats = verify_chain(rows, drawn.tokens[:, None], drafts, drawn.stats[:, None], **key)
    for other in (each, divided, by_stats):
        assert (other.tokens != right.tokens).sum() <= count // 10_000  # rounded apart
    wrong = verify_chain(rows, drawn.tokens[:, None], drafts, **key, draft_temperature=1.0)
    if count < 20_000:  # interpreted, or emulated: too few for frequencies
        assert not torch.equal(wrong.tokens, right.tokens)
        return

    def apart(verified):
        found = torch.bincount(verified.tokens[:, 0], minlength=6) / count
        return float((found - target.softmax(-1)).abs().sum() / 2)

    assert apart(right) < 0.0135
    assert apart(wrong) > 0.03


def test_the_raw_distribution_of_a_filtered_draft_is_seen(verify_chain):
    """Case 4: drafts that were filtered, and are declared as if they were not."""
    named = {"filters": "top_k", "length": 1}
    assert distance_by_counting(verify_chain, "statistics", **named) == 0
    # Declared with the third token, whose mass takes some from the others: 4 / 4.4 of what they were drawn with.
    wrong = distance_by_counting(raw(verify_chain), "statistics", **named)
    assert wrong > F(1, 100)


def raw(verify_chain):
    """The same call with the scalars of the unfiltered draft."""

    def call(target, tokens, logits, stats, **named):
        logsumexp = logits.double().logsumexp(-1).float()
        stats = torch.stack([torch.ones_like(logsumexp), torch.full_like(logsumexp, -torch.inf), logsumexp], -1)
        return verify_chain(target, tokens, logits, stats, **named)

    return call


@pytest.mark.parametrize("rule", ["block", "coupled"])
def test_drafts_of_another_rule_are_seen(verify_chain, rule):
    """Shared noise is lossless with accept-iff-equal alone, and never with a uniform: drafts drawn with the target's
    own race, verified by the token rule as if they were independent."""
    seeds = torch.tensor(cells("coupled", 1))
    target = logits_of(QUARTERS[()], False).expand(len(seeds), 2, 2)
    draft = logits_of(DENSE[()], False).expand(len(seeds), 1, 2)
    race = uniforms(seeds, Purpose.COUPLED, POSITION, 0)
    drawn = torch.as_tensor(race >= 0.5).long()[:, None]
    first = verify_chain(target, drawn, draft, draft_temperature=1.0, seed=seeds, position=POSITION, rule=rule).tokens[
        :, 0
    ]
    share = F(int((first == 0).sum()), len(seeds))
    assert (share == F(1, 4)) == (rule == "coupled")


# 20,000 requests take the interpreter minutes; there the exact tests above have to do.
@pytest.mark.interpreted(None)
def test_residual_noise_is_not_the_drafts(sample, verify_chain):
    """Case 6: the joint distribution of (draft, verified token) over many requests, across tiles."""
    vocab, count = TILE + 3, 20_000
    generator = torch.Generator().manual_seed(4)
    draft, target = torch.full((2, vocab), -torch.inf)
    ids = torch.tensor([0, 1, TILE, TILE + 2])
    draft[ids], target[ids] = torch.randn(4, generator=generator), torch.randn(4, generator=generator)
    seed = torch.arange(count)
    drawn = sample(draft.expand(count, vocab), seed=seed, position=5)
    rows = torch.stack([target, target]).expand(count, 2, vocab)
    verified = verify_chain(
        rows, drawn.tokens[:, None], draft.expand(count, 1, vocab), drawn.stats[:, None], seed=seed, position=5
    )
    p, q = target.double().softmax(-1).numpy(), draft.double().softmax(-1).numpy()
    residual = np.maximum(p - q, 0)
    joint = np.zeros((vocab, vocab, vocab))
    for x in ids.tolist():
        accept = min(1.0, p[x] / q[x])
        for y in ids.tolist():
            joint[x, x, y] += q[x] * accept * p[y]
            joint[x, y, 0] += q[x] * (1 - accept) * residual[y] / residual.sum()
    second = verified.tokens[:, 1].clamp(min=0)
    counts = np.zeros_like(joint)
    np.add.at(counts, (drawn.tokens.numpy(), verified.tokens[:, 0].numpy(), second.numpy()), 1)
    statistic, freedom = g_test(counts.ravel(), joint.ravel())
    assert statistic < limit(freedom)


@pytest.mark.backends("cpu")  # 100,000 rows of 129,280
def test_noise_tail(sample):
    """Case 10: a large vocabulary, logit gaps of 18 and 20, the tail drawn as often as it should be."""
    vocab, draws = 129_280, 100_000
    row = torch.full((vocab,), -18.0)
    row[1::2] = -20.0
    row[777] = 0.0
    probability = 1 - float(row.double().softmax(-1)[777])
    drawn = sample(row.expand(draws, vocab), seed=torch.arange(draws), position=1)
    tail = int((drawn.tokens != 777).sum())
    assert abs(tail - draws * probability) < 4 * (draws * probability) ** 0.5


@pytest.mark.interpreted(None)
def test_two_steps_in_a_row_are_independent(verify_chain):
    """The noise of one step says nothing of the next: the joint distribution of two bonus draws."""
    count = 20_000
    target = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(count, 1, 3)
    empty = torch.empty((count, 0), dtype=torch.int64)
    first, second = (
        verify_chain(target, empty, seed=torch.arange(count), position=position).tokens[:, 0] for position in (7, 8)
    )
    counts = np.zeros((3, 3))
    np.add.at(counts, (first.numpy(), second.numpy()), 1)
    probs = np.array([0.5, 0.3, 0.2])
    statistic, freedom = g_test(counts.ravel(), np.outer(probs, probs).ravel())
    assert statistic < limit(freedom)
