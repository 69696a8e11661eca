"""Lossy rules: what they do, and how far from the target's law they are."""

from __future__ import annotations

import math

import pytest
import torch
from test_oracle import table

from specdec_kernels import lossy, oracle


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


def test_it_is_not_lossless_and_says_so():
    assert lossy.typical_acceptance.lossless is False
    target, draft = ([float(x) for x in table(3, seed)(())] for seed in (1, 2))
    law = oracle.typical_law(lambda _: target, lambda _: draft, 2)
    assert sum(law.values()) == pytest.approx(1)
    want = oracle.target_law(lambda _: target, 2)
    distance = sum(abs(law.get(text, 0) - want.get(text, 0)) for text in {*law, *want}) / 2
    assert distance == pytest.approx(1 / 24)
    # With a draft of the target's own law, only what is never accepted comes from elsewhere: the target again.
    own = oracle.typical_law(lambda _: target, lambda _: target, 2, epsilon=1e-9)
    assert sum(abs(own[text] - float(want[text])) for text in want) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["temperature", "epsilon", "delta"])
def test_bad_options(name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        lossy.typical_acceptance(
            torch.zeros(1, 1, 3), torch.zeros(1, 1).long(), torch.tensor([[-1]]), seed=1, position=1, **{name: 0.0}
        )
