"""The oracle: its distribution in fractions, the mutants that must fail, its margins."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from backends import on_device
from distributions import PAIRS
from forms import some

from specdec_kernels import oracle, sample, sample_children, selftest, verify_chain, verify_tree
from specdec_kernels.contract import Purpose, Rule, TreeRule

F = Fraction


@pytest.mark.parametrize("pair", PAIRS)
def test_token_rule_is_exact(pair):
    target, draft, length = PAIRS[pair]()
    distribution = oracle.chain_distribution(target, draft, length)
    assert oracle.total_variation(distribution, oracle.target_distribution(target, length)) == 0


@pytest.mark.parametrize(
    "mutant",
    [
        {"accept": lambda p, q: min(F(1), p / q / 2 + F(1, 2))},
        {"residual": lambda p, q: p},
        {"residual": lambda p, q: abs(p - q)},
        {"accept": lambda p, q: F(1)},
    ],
    ids=["lenient", "residual is the target", "residual not clipped", "accept all"],
)
def test_wrong_rules_have_a_wrong_distribution(mutant):
    target, draft, length = PAIRS["random"]()
    distribution = oracle.chain_distribution(target, draft, length, **mutant)
    assert oracle.total_variation(distribution, oracle.target_distribution(target, length)) > F(1, 100)


def test_wrong_bonus_row_has_a_wrong_distribution():
    target, draft, length = PAIRS["random"]()
    distribution = oracle.chain_distribution(target, draft, length, bonus_row=1)
    assert oracle.total_variation(distribution, oracle.target_distribution(target, length)) > F(1, 100)


def test_accepted_tokens_of_the_known_example():
    """docs/algorithms.md, 2: of two drafts, 10/9 are accepted under the token rule, 11/9 under the block rule."""
    target, draft = [F(1, 3), F(2, 3)], [F(2, 3), F(1, 3)]
    alpha = sum(min(p, q) for p, q in zip(target, draft, strict=True))
    assert alpha + alpha**2 == F(10, 9)
    assert oracle.block_distribution(lambda _: target, lambda _: draft, 2)[1] == F(11, 9)


@pytest.mark.parametrize("pair", PAIRS)
def test_block_rule_is_exact_and_accepts_no_less(pair):
    target, draft, length = PAIRS[pair]()
    distribution, accepted = oracle.block_distribution(target, draft, length)
    assert oracle.total_variation(distribution, oracle.target_distribution(target, length)) == 0
    assert accepted >= token_rule_accepts(target, draft, length)


def token_rule_accepts(target, draft, length, prefix=()):
    """Expected number of drafts the token rule accepts."""
    if len(prefix) == length:
        return F(0)
    return sum(
        min(p, q) * (1 + token_rule_accepts(target, draft, length, (*prefix, token)))
        for token, (p, q) in enumerate(zip(target(prefix), draft(prefix), strict=True))
    )


@pytest.mark.parametrize(
    "mutant",
    [{"cap": lambda a: a}, {"scaled_residual": False}, {"early_stop": True}],
    ids=["uncapped", "residual without a_tau", "early stop"],
)
def test_wrong_block_rules_have_a_wrong_distribution(mutant):
    target, draft, length = PAIRS["zeros"]()
    distribution, _ = oracle.block_distribution(target, draft, length, **mutant)
    assert oracle.total_variation(distribution, oracle.target_distribution(target, length)) > F(1, 100)


class Injected(oracle.Noise):
    """Chosen uniforms; exponentials from elsewhere."""

    def __init__(self, uniforms, exponentials=None):
        super().__init__(1, 2)
        self.uniforms, self.given = uniforms, exponentials

    def uniform(self, row):
        return self.uniforms[row]

    def exponentials(self, purpose, level, row, count):
        return super().exponentials(purpose, level, row, count) if self.given is None else self.given(count)


def test_uniform_zero_rejects_what_the_target_excludes():
    """Case 1; a rule with <= instead of < accepts here."""
    target = np.array([[-np.inf, 0.0], [0.0, 0.0]])
    verified = oracle.verify_chain(target, [0], np.zeros((1, 2)), None, Injected([0.0]))
    assert verified.tokens == [1]


def test_uniform_near_one_never_draws_what_the_residual_excludes():
    """Case 2: the residual is zero at the last id."""
    target, draft = np.log([[0.5, 0.3, 0.2], [1, 1, 1]]), np.log([[0.1, 0.3, 0.6]])
    for seed in range(50):
        noise = Injected([np.nextafter(1, 0)], lambda n, seed=seed: np.random.default_rng(seed).exponential(size=n))
        assert oracle.verify_chain(target, [2], draft, None, noise).tokens == [0]


def test_margin_of_a_uniform_is_the_error_that_flips_it():
    target, draft = np.log([[0.3, 0.7], [0.5, 0.5]]), np.log([[0.6, 0.4]])
    verified = oracle.verify_chain(target, [0], draft, None, Injected([0.49]))
    assert verified.num_accepted == 1
    expected = (0.3 - 0.49 * 0.6) / (0.3 + 0.49 * 0.6)
    assert verified.margins[0] == pytest.approx(expected)
    lower, higher = 0.3 * (1 - 1.01 * expected), 0.6 * (1 + 1.01 * expected)
    assert not 0.49 * higher < lower


def test_margin_of_a_race_is_the_error_that_flips_it():
    rng = np.random.default_rng(0)
    for _ in range(200):
        target, draft = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
        noise = rng.exponential(size=5)
        weights, slack = np.maximum(target - draft, 0), target + draft
        winner, margin = oracle.race(weights, slack, noise)
        for factor, flips in ((0.99, False), (1.01, True)):
            if not np.isfinite(margin) or margin * factor >= 1:
                continue
            moved = weights + factor * margin * slack  # everybody else gains, the winner loses
            moved[winner] = weights[winner] - factor * margin * slack[winner]
            with np.errstate(divide="ignore"):
                changed = np.argmin(np.where(moved > 0, noise / moved, np.inf)) != winner
            assert changed == flips


def test_reused_noise_gives_a_wrong_distribution():
    """Case 6: residual noise that is the draft's own makes some texts impossible."""

    class Reused(oracle.Noise):
        def exponentials(self, purpose, level, row, count):
            return super().exponentials(Purpose.DRAFT, level, row, count)

    probs, count = np.array([0.6, 0.37, 0.03]), 1500
    target, draft = np.log([probs, np.ones(3)]), np.log([[0.38, 0.005, 0.615]])
    counts = {Reused: np.zeros(3), oracle.Noise: np.zeros(3)}
    for seed in range(count):
        drawn = oracle.sample(draft[0], oracle.Noise(seed, 0)).token
        for kind, seen in counts.items():
            seen[oracle.verify_chain(target, [drawn], draft, None, kind(seed, 0)).tokens[0]] += 1
    chi2 = {kind: float(((seen - count * probs) ** 2 / (count * probs)).sum()) for kind, seen in counts.items()}
    assert chi2[oracle.Noise] < 28 < chi2[Reused]  # two degrees of freedom, one in a million


def test_twenty_four_bit_uniforms_lose_the_tail():
    """Case 10's mutant: -log of a 24-bit uniform is 0 for one word in 2^24, so any token wins that often."""
    largest = 2.0**32 - 1
    assert -np.log(np.ceil((largest + 1) / 2**8) / 2**24) == 0
    assert -np.log1p(-(0 + 0.5) * 2.0**-32) > 0
    assert np.isfinite(-np.log1p(-(largest + 0.5) * 2.0**-32))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_small_vocabularies(backend, few, rule):
    """Where drafts are often accepted in part, and paths have probabilities below one, as large ones seldom have."""
    generator, count, drafts = torch.Generator().manual_seed(1), few(some(200, 300)), 3
    target, draft = (torch.randn(count, n, 4, generator=generator) * 1.5 for n in (drafts + 1, drafts))
    drawn = [sample(draft[:, i], seed=torch.arange(count), position=5, row=i) for i in range(drafts)]
    tokens, keys = torch.stack([each.tokens for each in drawn], 1), {"seed": torch.arange(count), "position": 5}
    found = on_device(verify_chain, backend)(target, tokens, draft, draft_temperature=1.0, rule=rule, **keys)
    partly = 0
    for b in range(count):
        rows = target[b].double().numpy(), tokens[b].tolist(), draft[b].double().numpy(), None
        want = oracle.verify_chain(*rows, oracle.Noise(b, 5), rule=Rule[rule.upper()])
        partly += 0 < want.num_accepted < drafts
        if want.margin > selftest.EPSILON:
            assert [token for token in found.tokens[b].tolist() if token >= 0] == want.tokens
    assert partly > count / 4


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("siblings", ["iid", "without_replacement"])
def test_small_trees(backend, few, rule, siblings):
    """Three siblings of four tokens, the later ones of what the earlier ones left."""
    generator, count = torch.Generator().manual_seed(2), few(some(200, 300))
    target, draft = torch.randn(2, count, 4, 4, generator=generator) * 1.5
    keys = {"seed": torch.arange(count), "position": 5}
    children = sample_children(draft[:, 0], 3, siblings, **keys, backend="reference").tokens
    tokens, parents = torch.cat([torch.zeros(count, 1, dtype=torch.int64), children], 1), [-1, 0, 0, 0]
    found = on_device(verify_tree, backend)(
        target, tokens, torch.tensor([parents] * count), draft, draft_temperature=1.0, siblings=siblings, rule=rule,
        **keys,
    )  # fmt: skip
    behind = 0
    for b in range(count):
        rows = target[b].double().numpy(), tokens[b].tolist(), parents, draft[b].double().numpy(), None
        how = {"rule": TreeRule[rule.upper()], "replacement": siblings == "iid"}
        want = oracle.verify_tree(*rows, oracle.Noise(b, 5), **how)
        behind += want.nodes[-1] > 1
        if want.margin > selftest.EPSILON:
            assert [token for token in found.tokens[b].tolist() if token >= 0] == want.tokens
    assert behind > count / 10
