"""Lossy rules: what they do, and how far from the target's distribution they are."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from distributions import table
from tiny import VOCAB, slow_greedy, tiny

from specdec_kernels import lossy, oracle
from specdec_kernels.decode import Scheduler, Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import CallableDrafter, ModelDrafter, TreeDrafter
from specdec_kernels.ops import validate


def naive(logits, tokens, parents, epsilon, delta):
    """The longest acceptable path of one tree."""
    best, good = [0], {0: [0]}
    for node in range(1, len(parents)):
        if parents[node] not in good:
            continue
        probs = logits[parents[node]].double().softmax(-1)
        entropy = -float((probs * probs.log()).sum())
        if probs[tokens[node]] > min(epsilon, delta * math.exp(-entropy)):
            good[node] = [*good[parents[node]], node]
            if len(good[node]) > len(best):
                best = good[node]
    return best


def test_typical_acceptance_takes_the_longest_typical_path():
    generator = torch.Generator().manual_seed(0)
    parents = torch.tensor([[-1, 0, 0, 1, 2, 4, -1]] * 50)
    logits = torch.randn(50, 7, 6, generator=generator) * 2
    tokens = torch.randint(0, 6, (50, 7), generator=generator)
    result = lossy.typical_acceptance(logits, tokens, parents, seed=torch.arange(50), position=3)
    lengths = set()
    for b in range(50):
        path = naive(logits[b], tokens[b].tolist(), parents[b, :6].tolist(), 0.09, 0.3)
        lengths.add(len(path))
        assert result.nodes[b].tolist() == path + [-1] * (7 - len(path))
        assert result.tokens[b, : len(path) - 1].tolist() == tokens[b, path[1:]].tolist()
        assert (result.tokens[b, len(path) :] == -1).all()
        assert int(result.num_accepted[b]) == len(path) - 1
    assert lengths == {1, 2, 3, 4}


def test_ids_that_are_none_are_not_accepted():
    """Those of the root and behind the last node mean nothing; elsewhere, as on a GPU, where ids are not checked."""
    logits, parents = torch.zeros(1, 4, 6), torch.tensor([[-1, 0, 1, -1]])

    def accepted(*tokens):
        return int(lossy.typical_acceptance(logits, torch.tensor([tokens]), parents, seed=1, position=3).num_accepted)

    assert accepted(0, 1, 2, 0) == accepted(600, 1, 2, -1) == accepted(-1, 1, 2, 600) == 2
    with patch.object(validate, "readable", lambda _: False):
        assert (accepted(0, 600, 2, 0), accepted(0, 1, -1, 0)) == (0, 1)


def test_it_is_not_lossless_and_says_so():
    assert lossy.typical_acceptance.lossless is False
    target, draft = ([float(x) for x in table(3, seed)(())] for seed in (1, 2))
    distribution = oracle.typical_distribution(lambda _: target, lambda _: draft, 2)
    assert sum(distribution.values()) == pytest.approx(1)
    want = oracle.target_distribution(lambda _: target, 2)
    distance = (
        sum(abs(distribution.get(sequence, 0) - want.get(sequence, 0)) for sequence in {*distribution, *want}) / 2
    )
    assert distance == pytest.approx(1 / 24)
    # With a draft of the target's own distribution, only what is never accepted comes from elsewhere: the target again.
    own = oracle.typical_distribution(lambda _: target, lambda _: target, 2, epsilon=1e-9)
    assert sum(abs(own[sequence] - float(want[sequence])) for sequence in want) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1e39])
@pytest.mark.parametrize("name", ["temperature", "epsilon", "delta"])
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and at most"):
        lossy.typical_acceptance(
            torch.zeros(1, 1, 3), torch.zeros(1, 1).long(), torch.tensor([[-1]]), seed=1, position=1, **{name: value}
        )


# --- load tests -------------------------------------------------------------------------------------------------------

RATES = [0.9, 0.6, 0.2]


def shares(target, rule, temperature, **options):
    """Of the drafts by index, the share that was accepted, and the largest deviation that chance explains."""
    statistics = Statistics()
    drafter = CallableDrafter(lambda history, count: [(history[-1] + 1) % VOCAB] * count)
    generate(
        target, [[1, 2]] * 60, drafter=drafter, num_draft=4, max_new_tokens=40, temperature=temperature, rule=rule,
        statistics=statistics, **options,
    )  # fmt: skip
    rates = [a / p for a, p in zip(statistics.accepted_at, statistics.proposed_at, strict=True)]
    return rates, [5 * (0.25 / count) ** 0.5 for count in statistics.proposed_at]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_synthetic_acceptance(rule, temperature):
    blank = lossy.BlankTarget(VOCAB)
    for target in (blank, TransformersTarget(tiny(1))):
        synthetic = lossy.SyntheticAcceptance(target, RATES)
        assert not synthetic.lossless
        got, slack = shares(synthetic, rule, temperature)
        for rate, want, allowed in zip(got, [*RATES, 0.0], slack, strict=True):
            assert abs(rate - want) < allowed
        assert got[3] == 0.0
        control, _ = shares(target, rule, temperature)
        assert abs(control[0] - RATES[0]) > slack[0]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"temperature": 1e20}),
        (torch.bfloat16, {"temperature": 5000.0, "repetition_penalty": 0.5}),
        (torch.float16, {"temperature": 1000.0}),
        (torch.float32, {"temperature": 1.0, "logit_bias": {5: 1000.0}, "presence_penalty": 100.0}),
    ],
)
def test_synthetic_rates_depend_on_no_parameter(dtype, options):
    synthetic = lossy.SyntheticAcceptance(lossy.BlankTarget(VOCAB, dtype=dtype), RATES)
    got, slack = shares(synthetic, "token", **options)
    for rate, want, allowed in zip(got, [*RATES, 0.0], slack, strict=True):
        assert abs(rate - want) < allowed


def test_what_is_forbidden_is_rejected():
    """Every draft is a token that a bias forbids; the text goes on all the same."""
    synthetic, statistics = lossy.SyntheticAcceptance(lossy.BlankTarget(VOCAB), [1.0]), Statistics()
    drafter = CallableDrafter(lambda history, count: [3] * count)
    (result,) = generate(
        synthetic, [[1]], drafter=drafter, max_new_tokens=8, logit_bias={3: -math.inf}, statistics=statistics
    )
    assert len(result.tokens) == 8
    assert statistics.accepted == 0 < statistics.proposed


@pytest.mark.parametrize("model", [False, True])
def test_load_tests_run_in_the_scheduler(model):
    """More requests than run at once, so that some join others."""
    target = TransformersTarget(tiny(1)) if model else lossy.BlankTarget(300)
    statistics = Statistics()
    drafter = CallableDrafter(lambda history, count: [0] * count)
    scheduler = Scheduler(
        lossy.SyntheticAcceptance(target, [1.0, 1.0]), drafter, max_requests=2, num_draft=2, statistics=statistics
    )
    submissions = [scheduler.submit([1, 2, 3], max_new_tokens=4 + index, seed=index) for index in range(5)]
    assert [len(submission.result().tokens) for submission in submissions] == [4, 5, 6, 7, 8]
    assert statistics.accepted == statistics.proposed > 0


def test_synthetic_acceptance_leaves_the_bonus_row_alone():
    """Requests that have fewer drafts than others: all are accepted, and the token behind them is the target's own."""
    target = TransformersTarget(tiny(1))
    always = lossy.SyntheticAcceptance(target, [1.0] * 4)
    drafts = {1: [3], 2: [4, 5, 6]}
    drafter = CallableDrafter(lambda history, count: drafts[history[0]] if len(history) == 1 else [])
    results = generate(always, [[1], [2]], drafter=drafter, num_draft=3, max_new_tokens=5, temperature=0.0)
    for start, result in zip((1, 2), results, strict=True):
        drafted = drafts[start]
        assert result.tokens[: len(drafted)] == drafted
        assert result.tokens[len(drafted) :] == slow_greedy(target.model, [start, *drafted], 5 - len(drafted))


@pytest.mark.parametrize("rates", [[0.5, 0.6], [1.1], [-0.1], [float("nan")]])
def test_synthetic_rates_that_are_none(rates):
    with pytest.raises(ValueError, match=r"rates must be in \[0, 1\], none above the one before"):
        lossy.SyntheticAcceptance(lossy.BlankTarget(VOCAB), rates)


def test_load_tests_refuse_what_they_have_not():
    synthetic = lossy.SyntheticAcceptance(lossy.BlankTarget(VOCAB), RATES)
    drafter = TreeDrafter(ModelDrafter(tiny(2)))
    with pytest.raises(ValueError, match="SyntheticAcceptance takes chains of drafts, got a tree"):
        generate(synthetic, [[1, 2]], drafter=drafter)
    with pytest.raises(ValueError, match="feature_layers must be none of a BlankTarget"):
        lossy.BlankTarget(VOCAB).begin([[1]], [1], [0])
