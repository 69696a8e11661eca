"""Filters and processing of logits: against transformers, and what broke in the field, for every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec_kernels import LogitBias, Penalties, oracle, selftest

INF = float("inf")
FILTERS = [
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.9},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
]


def warped(logits, temperature, top_k=None, top_p=None, min_p=None):
    """What transformers makes of the rows, in float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, logits.double())


def probs_of(logits, stats):
    """The probabilities that three scalars stand for."""
    scale, cutoff, logsumexp = (x[:, None] for x in stats.double().unbind(-1))
    return torch.where(logits.double() < cutoff, 0.0, (scale * logits.double() - logsumexp).exp())


@pytest.mark.interpreted(kept=lambda parameters: parameters["temperature"] < 1 < len(parameters["filters"]))
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_filters_are_those_of_transformers(few, sample, filters, temperature):
    """Case 34 too: log-probabilities are the filtered distribution's."""
    count = few(12)
    logits = torch.randn(count, 1500, generator=torch.Generator().manual_seed(1)) * 3
    logits += torch.arange(1500) * 1e-5  # no ties, which have a test of their own
    drawn = sample(logits, seed=torch.arange(count), position=3, temperature=temperature, **filters)
    want = warped(logits, temperature, **filters).softmax(-1)
    got = probs_of(logits, drawn.stats)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    chosen = want.gather(1, drawn.tokens[:, None])[:, 0].log()
    torch.testing.assert_close(drawn.logprobs.double(), chosen, rtol=0, atol=1e-5)


def test_ties_stay_or_go_together(sample):
    """Top-k and min-p as in transformers; top-p, where transformers keeps whichever sorts first, keeps all."""
    row = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0]).log()[None]
    for filters, kept in (
        ({"top_k": 2}, [0, 2, 3, 4]),
        ({"top_k": 4}, [0, 2, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.35}, [0, 2, 3, 4]),
        ({"top_p": 0.29}, [0]),
        ({"min_p": 0.6}, [0, 2, 3, 4]),
        ({"top_k": 6}, [0, 1, 2, 3, 4]),
    ):
        drawn = sample(row, seed=1, position=1, **filters)
        assert (probs_of(row, drawn.stats)[0] > 0).nonzero()[:, 0].tolist() == kept, filters


def test_a_wrong_filter_is_noticed():
    """Mutants of the filters keep another set: top-p that stops before it reaches the goal, top-k without its ties,
    top-p of the whole row's mass after top-k, min-p relative to the mass."""
    logits = np.log([3.0, 2.0, 2.0, 1.0])
    keep = lambda sampling: int((logits >= oracle.filter_cutoff(logits, 1.0, sampling)[0]).sum())  # noqa: E731
    assert keep(oracle.Sampling(top_p=0.5)) == 3  # one, if it stopped before
    assert keep(oracle.Sampling(top_k=2)) == 3  # two, without the tie
    assert keep(oracle.Sampling(top_k=3, top_p=0.4)) == 1  # 3/8 of the whole row is less, 3/7 of what top-k left is not
    assert keep(oracle.Sampling(min_p=0.5)) == 3  # none, relative to the mass


@pytest.mark.interpreted(kept=lambda parameters: parameters["scale"] == 1)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_filters_on_hard_rows(sample, scale):
    """Rows on which a search by bisection could stall: equal logits, two values, huge gaps, few finite logits."""
    vocab = 1000
    rows = torch.zeros(6, vocab)
    rows[1, ::3] = 1.0
    rows[2, 5], rows[2, 6] = 80.0, 60.0
    rows[3] = torch.linspace(-1, 1, vocab)
    rows[4] = -INF
    rows[4, [3, 500, 999]] = torch.tensor([1.0, 0.5, 0.25])
    rows[5] = torch.linspace(0, 1e-4, vocab)
    rows *= scale
    for filters in ({"top_k": 3}, {"top_p": 0.5}, {"top_k": 900, "top_p": 0.99, "min_p": 1e-3}):
        drawn = sample(rows, seed=torch.arange(6), position=2, **filters)
        for row, stats, token in zip(rows, drawn.stats.tolist(), drawn.tokens.tolist(), strict=True):
            want = oracle.sample(row.double().numpy(), oracle.Noise(0, 2), 0, oracle.Sampling(**filters))
            assert want.margin < selftest.EPSILON or stats[1] == want.stats[1]
            assert row[token] >= stats[1]


def test_filters_per_request_and_off(sample):
    logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(2))
    named = {"seed": torch.arange(3), "position": 4}
    mixed = sample(logits, **named, top_k=torch.tensor([0, 5, 400]), top_p=torch.tensor([1.0, 0.5, 1.0]))
    plain = sample(logits, **named)
    assert mixed.stats[:, 1].isinf().tolist() == [True, False, True]
    assert torch.equal(mixed.tokens[[0, 2]], plain.tokens[[0, 2]])
    assert torch.equal(mixed.stats[[0, 2]], plain.stats[[0, 2]])


# --- processing -------------------------------------------------------------------------------------------------------


def test_penalties_are_those_of_transformers_and_of_the_api(sample):
    """Repetition over prompt and output as in transformers; frequency and presence over the output alone."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 90, generator=generator) * 3
    prompt, output = (torch.randint(0, 90, (4, n), generator=generator) for n in (9, 14))
    penalties = Penalties(prompt, output, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.3)
    drawn = sample(logits, seed=torch.arange(4), position=1, penalties=penalties)
    want = RepetitionPenaltyLogitsProcessor(1.4)(torch.cat([prompt, output], 1), logits.clone())
    counts = torch.nn.functional.one_hot(output, 90).sum(1)
    want = want - 0.3 * counts - 0.6 * (counts > 0)
    chosen = want.double().log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs.double(), chosen, rtol=0, atol=1e-5)


def test_penalties_count_the_drafted_prefix(verify_chain):
    """Case 26: drafts [A, A]; row 1 counts one A, row 2 two, and none of them the draft it judges."""
    vocab, token = 40, 7
    target = torch.zeros(1, 3, vocab)
    target[..., token] = 9.0
    nothing = torch.empty((1, 0), dtype=torch.int64)
    for frequency, accepted in ((8.0, 2), (9.5, 1)):
        penalties = Penalties(nothing, nothing, frequency_penalty=frequency)
        named = {"seed": 1, "position": 1, "temperature": 0.0, "penalties": penalties}
        verified = verify_chain(target, torch.tensor([[token, token]]), **named)
        # Row 0 sees no A, row 1 sees 9 - frequency, row 2 sees 9 - 2 * frequency.
        assert verified.num_accepted.tolist() == [accepted]
        assert int(verified.tokens[0, accepted]) == 0  # the bonus, or what replaces the second A


def test_bias_and_penalties_apply_in_order(verify_chain):
    """Bias first, so that a repetition penalty divides what the bias made positive."""
    target = torch.tensor([[[0.0, 1.5, 2.0]]])
    seen = torch.tensor([[1]])
    named = {"seed": 1, "position": 1, "temperature": 0.0}
    bias = LogitBias(torch.tensor([[1, 1]]), torch.tensor([[1.0, 1.5]]))  # 1.5 + 2.5 = 4 > 2
    penalties = Penalties(seen, seen, repetition_penalty=2.5)  # 4 / 2.5 = 1.6 < 2
    none = torch.empty((1, 0), dtype=torch.int64)
    assert verify_chain(target, none, **named, logit_bias=bias).tokens.tolist() == [[1]]
    assert verify_chain(target, none, **named, logit_bias=bias, penalties=penalties).tokens.tolist() == [[2]]


def words_of(allowed):
    """xgrammar's layout: bit v % 32 of word v // 32."""
    vocab = allowed.shape[-1]
    bits = torch.nn.functional.pad(allowed.long(), (0, -vocab % 32)).unflatten(-1, (-1, 32))
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_masks_change_inside_the_window_and_hold_in_every_row(few, verify_chain, rule):
    """Case 27: another mask in each row, the bonus row included; a draft that a mask excludes is rejected there."""
    count, vocab = few(60), 300
    generator = torch.Generator().manual_seed(3)
    target, draft = torch.randn(count, 3, vocab, generator=generator), torch.randn(count, 2, vocab, generator=generator)
    tokens = torch.randint(0, vocab, (count, 2), generator=generator)
    target[:, :2].scatter_(2, tokens[..., None], 40.0)  # drafts that are accepted wherever they are allowed
    allowed = torch.rand(count, 3, vocab, generator=generator) < 0.3
    allowed[..., 0] = True
    verified = verify_chain(
        target,
        tokens,
        draft,
        draft_temperature=1.0,
        seed=torch.arange(count),
        position=1,
        bitmask=words_of(allowed),
        rule=rule,
    )
    for b in range(count):
        returned = [t for t in verified.tokens[b].tolist() if t >= 0]
        assert all(allowed[b, row, token] for row, token in enumerate(returned))
        permitted = [bool(allowed[b, row, tokens[b, row]]) for row in range(2)]
        assert verified.num_accepted[b] == (2 if all(permitted) else permitted.index(False))


@pytest.mark.parametrize("filters", [{"min_p": 0.2}, {"top_k": 3}, {"top_p": 0.6}], ids=str)
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_filters_hold_on_verified_and_bonus_rows_alike(few, verify_chain, rule, filters):
    """Case 27: nothing that a filter takes away is accepted or drawn, in any row."""
    count, vocab = few(80), 50
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(count, 3, vocab, generator=generator) * 2
    draft = target[:, :2] + torch.randn(count, 2, vocab, generator=generator)
    tokens = torch.multinomial(draft.softmax(-1).flatten(0, 1), 1, generator=generator).reshape(count, 2)
    verified = verify_chain(
        target,
        tokens,
        draft,
        draft_temperature=1.0,
        seed=torch.arange(count),
        position=1,
        rule=rule,
        logprobs=True,
        **filters,
    )
    kept = warped(target.flatten(0, 1), 1.0, **filters).isfinite().unflatten(0, (count, 3))
    there = verified.tokens >= 0
    assert kept.gather(2, verified.tokens.clamp(min=0)[..., None])[..., 0][there].all()
    assert verified.logprobs[there].isfinite().all()
    assert torch.equal(verified.logprobs.isnan(), ~there)


@pytest.mark.interpreted(None)  # 4,000 requests; the exact distributions have to do
def test_a_smaller_draft_vocabulary_leaves_the_tail_its_mass(verify_chain):
    """Case 11: the drafter knows 5 of 8 tokens; the others come out as often as the target says."""
    count, vocab, known = 4000, 8, 5
    generator = torch.Generator().manual_seed(7)
    target = torch.randn(2, vocab, generator=generator)
    draft = torch.full((1, vocab), -INF)
    draft[:, :known] = torch.randn(known, generator=generator)
    tokens = torch.multinomial(draft.softmax(-1).expand(count, vocab), 1, generator=generator)
    verified = verify_chain(
        target.expand(count, 2, vocab), tokens, draft.expand(count, 1, vocab), draft_temperature=1.0,
        seed=torch.arange(count), position=1,
    )  # fmt: skip
    share = (verified.tokens[:, 0] >= known).double().mean()
    tail = target[0].softmax(-1)[known:].sum()
    assert abs(share - tail) < 5 * (tail * (1 - tail) / count) ** 0.5
