"""What tells the rules apart: the block rule's rescues, the coupled rule's text, counters, ragged batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forms import some

from specdec_kernels import ops, oracle
from specdec_kernels.contract import Rule


def drawn(logits, generator=None):
    """A token of each row [..., V] of logits."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    probs = logits.softmax(-1).flatten(0, -2)
    return torch.multinomial(probs, 1, generator=generator).reshape(logits.shape[:-1])


def rows(*probs):
    return torch.tensor(probs, dtype=torch.float64).log().float()


def test_a_later_token_rescues_an_earlier_one(few, verify_chain):
    """Case 8: ratios 1/2 and 2 make the pair certain under the block rule, whatever the uniforms."""
    count = few(96)
    target = rows([0.25, 0.75], [0.8, 0.2], [0.5, 0.5]).expand(count, 3, 2)
    draft = rows([0.5, 0.5], [0.4, 0.6]).expand(count, 2, 2)
    tokens = torch.zeros(count, 2, dtype=torch.int64)
    named = {"seed": torch.arange(count), "position": 4}
    assert (verify_chain(target, tokens, draft, draft_temperature=1.0, **named, rule="block").num_accepted == 2).all()
    by_token = verify_chain(target, tokens, draft, draft_temperature=1.0, **named)
    assert count / 8 < (by_token.num_accepted == 0).sum() < count * 7 / 8


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_what_the_target_excludes_is_never_accepted(verify_chain, rule):
    """Case 1 for every rule: not even where the declared draft gives it probability 0 as well."""
    target = torch.tensor([[-torch.inf, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).expand(20, 3, 3)
    stats = torch.tensor([1.0, 5.0, 0.0]).expand(20, 2, 3)  # a cutoff above every logit
    tokens = torch.zeros(20, 2, dtype=torch.int64)
    named = {"seed": torch.arange(20), "position": 1, "rule": rule}
    verified = verify_chain(target, tokens, torch.zeros(20, 2, 3), stats, **named)
    assert (verified.num_accepted == 0).all()
    assert (verified.tokens[:, 0] > 0).all()


def test_block_is_the_token_rule_for_one_draft(few, verify_chain):
    generator, count = torch.Generator().manual_seed(1), few(40)
    target, draft = torch.randn(count, 2, 300, generator=generator), torch.randn(count, 1, 300, generator=generator)
    tokens = torch.randint(0, 300, (count, 1), generator=generator)
    named = {"seed": torch.arange(count), "position": 4}
    a, b = (
        verify_chain(target, tokens, draft, draft_temperature=1.0, **named, rule=rule) for rule in ("token", "block")
    )
    assert torch.equal(a.tokens, b.tokens)


@pytest.mark.interpreted(None)  # 20,000 requests; the exact distributions have to do
def test_block_accepts_no_less_in_the_mean(verify_chain):
    """docs/algorithms.md, 2: 10/9 of two drafts under the token rule, 11/9 under the block rule."""
    count = 20_000
    target = rows([1 / 3, 2 / 3]).expand(count, 3, 2)
    draft = rows([2 / 3, 1 / 3]).expand(count, 2, 2)
    tokens = drawn(draft)
    for rule, mean in (("token", 10 / 9), ("block", 11 / 9)):
        accepted = verify_chain(
            target, tokens, draft, draft_temperature=1.0, seed=torch.arange(count), position=4, rule=rule
        ).num_accepted
        assert abs(float(accepted.double().mean()) - mean) < 5 * 0.9 / count**0.5


class AbsoluteUniforms(oracle.Noise):
    """A wrong contract: uniforms keyed on the absolute position, so that a step meets the last one's again."""

    def uniform(self, row):
        return oracle.Noise(self.seed, self.position + row).uniform(0)


def sequence_statistic(noise_kind, count):
    """Chi-square of the first two tokens of sequences that the block rule writes with two drafts a step: the two tokens
    are equally likely, the first draft is nearly always 0, the second always 1."""
    target, draft = np.log([[0.5, 0.5]] * 3), np.array([np.log([0.9, 0.1]), [-np.inf, 0.0]])
    counts = np.zeros((2, 2))
    for seed in range(count):
        rng, history = np.random.default_rng(seed), []
        while len(history) < 2:
            drafts = [int(rng.random() < 0.1), 1]
            noise = noise_kind(seed, 10 + len(history))
            history += oracle.verify_chain(target, drafts, draft, None, noise, rule=Rule.BLOCK).tokens
        counts[tuple(history[:2])] += 1
    return float(((counts - count / 4) ** 2 / (count / 4)).sum())


def test_block_uniforms_are_not_met_again_in_the_next_step():
    """Case 7: the block rule reads uniforms behind the stop; a next step that meets them again has another
    distribution."""
    limit, count = 33, some(1000, 1500)  # three degrees of freedom, three in ten million
    assert sequence_statistic(oracle.Noise, count) < limit < sequence_statistic(AbsoluteUniforms, count)


# --- coupled ----------------------------------------------------------------------------------------------------------


def table(history, vocab=200):
    """A target that is a function of the last two tokens."""
    generator = torch.Generator().manual_seed(hash(tuple(history[-2:])) % 2**31)
    return torch.randn(vocab, generator=generator) * 2


def write(sample, verify_chain, num_draft, drafter, length=24, **options):
    """Decode with drafts of ``drafter(history, row, logits)`` (None: from ``sample``)."""
    history = [1, 2]
    while len(history) < length:
        drafted, start = [], len(history)
        for row in range(num_draft):
            logits = table([*history, *drafted])
            if drafter is None:
                noisy = logits + 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(row))
                drawn = sample(noisy[None], seed=5, position=start, row=row, coupled=True, **options)
                drafted.append(int(drawn.tokens[0]))
            else:
                drafted.append(drafter(history, row))
        target = torch.stack([table([*history, *drafted[:row]]) for row in range(num_draft + 1)])[None]
        tokens = torch.tensor([drafted], dtype=torch.int64).reshape(1, num_draft)
        step = verify_chain(target, tokens, seed=5, position=start, rule="coupled", **options)
        history += [t for t in step.tokens[0].tolist() if t >= 0]
    return history[:length]


@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9}], ids=str)
def test_the_coupled_text_depends_on_no_drafter(few, sample, verify_chain, options):
    """Case 25: with any drafter, any K, or none, at T > 0."""
    options = {**options, "length": 5 + few(19)}
    alone = write(sample, verify_chain, 0, None, **options)
    for num_draft, drafter in (
        (1, None),
        (4, None),
        (3, lambda history, row: history[row % 2]),
        (2, lambda history, row: 199),
    ):
        assert write(sample, verify_chain, num_draft, drafter, **options) == alone


def test_coupled_drafts_are_accepted_more_than_independent_ones(few, sample, verify_chain):
    """The reason for shared noise; drafts drawn without it are accepted about as often as draws from two
    distributions agree by chance."""
    count = few(200)
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(count, 2, 60, generator=generator)
    draft = target[:, 0] + 0.2 * torch.randn(count, 60, generator=generator)
    seed, accepted = torch.arange(count), {}
    for coupled in (True, False):
        drawn = sample(draft, seed=seed, position=3, coupled=coupled).tokens[:, None]
        accepted[coupled] = int(verify_chain(target, drawn, seed=seed, position=3, rule="coupled").num_accepted.sum())
    assert accepted[True] > 0.75 * count
    assert accepted[False] < 0.25 * count


# --- counters, ragged batches -----------------------------------------------------------------------------------------


def chains(count=24, drafts=3, vocab=150, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(count, drafts + 1, vocab, generator=generator)
    draft = target[:, :drafts] + 0.8 * torch.randn(count, drafts, vocab, generator=generator)
    tokens = drawn(draft, generator)
    return target, tokens, draft


@pytest.mark.parametrize("rule", ["token", "coupled", "block"])
def test_four_counters(few, verify_chain, rule):
    """Case 21: prefix-accepted <= independently accepted <= proposed; emitted is one more than accepted."""
    count = max(8, few(24))
    target, tokens, draft = chains(count)
    named = {"seed": torch.arange(count), "position": 1, "rule": rule}
    if rule == "coupled":
        drawn = [ops.sample(draft[:, i], seed=named["seed"], position=1, row=i, coupled=True) for i in range(3)]
        tokens = torch.stack([one.tokens for one in drawn], 1)
    tokens[3, 1], tokens[4, 0] = -1, -1
    proposed = torch.full((count,), 3)
    proposed[3], proposed[4] = 1, 0
    verified = verify_chain(target, tokens, draft, draft_temperature=1.0, **named, count_independent=rule != "block")
    assert torch.equal(verified.num_proposed.long(), proposed)
    assert (verified.num_accepted <= verified.num_proposed).all()
    assert torch.equal((verified.tokens >= 0).sum(1), verified.num_emitted.long())
    if rule == "block":
        assert (verified.num_independent == -1).all()
    else:
        assert (verified.num_accepted <= verified.num_independent).all()
        assert (verified.num_independent <= verified.num_proposed).all()
        assert (verified.num_independent > verified.num_accepted).any()
        assert torch.equal(verify_chain(target, tokens, draft, draft_temperature=1.0, **named).tokens, verified.tokens)
    at, kept = verified.by_position()
    assert at.tolist() == [count - 1, count - 2, count - 2]
    assert kept.tolist() == [int((verified.num_accepted > i).sum()) for i in range(3)]


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_ragged_rows_are_the_padded_ones(verify_chain, rule):
    """``cu_rows``, of either dtype, with requests without drafts first, last and in between."""
    lengths = torch.tensor([0, 3, 0, 1, 2, 0])
    target, tokens, draft = chains(count=len(lengths))
    ragged = torch.cat([target[b, : n + 1] for b, n in enumerate(lengths.tolist())])
    cu_rows = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)])
    cu_rows = cu_rows.int() if rule == "block" else cu_rows
    named = {"seed": torch.arange(len(lengths)), "position": 1, "rule": rule, "top_k": 40}
    a = verify_chain(target, tokens, draft, draft_temperature=1.0, **named, num_draft=lengths)
    b = verify_chain(ragged, tokens, draft, draft_temperature=1.0, **named, cu_rows=cu_rows)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.num_proposed, b.num_proposed)


def test_raw_and_processed_logprobs(verify_chain):
    """Case 34: of accepted, recovered and bonus tokens, within 1e-5, with and without what was done to the logits."""
    target, tokens, draft = chains(count=12)
    verified = verify_chain(
        target,
        tokens,
        draft,
        draft_temperature=1.0,
        seed=torch.arange(12),
        position=1,
        temperature=0.6,
        top_p=0.9,
        logprobs=True,
    )
    there = verified.tokens >= 0
    ids = verified.tokens.clamp(min=0)[..., None]
    raw = target.double().log_softmax(-1).gather(2, ids)[..., 0]
    torch.testing.assert_close(verified.raw_logprobs[there].double(), raw[there], rtol=0, atol=1e-5)
    assert (verified.logprobs[there] > verified.raw_logprobs[there]).any()
    plain = verify_chain(target, tokens, draft, draft_temperature=1.0, seed=torch.arange(12), position=1)
    assert plain.logprobs.numel() == plain.raw_logprobs.numel() == 0
    assert ops.verify_chain(target, tokens, seed=1, position=1, logprobs=True).logprobs.shape == (12, 4)
