"""What broke in the field (shared cases), for every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec_kernels import oracle, selftest

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch(vocab=131, count=3, drafts=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(count, drafts + 1, vocab, generator=generator)
    draft = torch.randn(count, drafts, vocab, generator=generator)
    tokens = torch.randint(0, vocab, (count, drafts), generator=generator)
    return target, tokens, draft


def test_a_product_of_zero_is_not_below_a_target_of_zero(verify_chain):
    """Case 1: handed-over statistics that make uniform * draft exactly 0, as a uniform of 0 would."""
    target = torch.tensor([[-INF, 0.0, 0.0], [0.0, 0.0, 0.0]])[None]
    stats = torch.tensor([[[1.0, -INF, 1e5]]])
    verified = verify_chain(target, torch.tensor([[0]]), torch.zeros(1, 1, 3), stats, seed=1, position=1)
    assert verified.num_accepted.tolist() == [0]
    assert verified.tokens[0, 0] in (1, 2)


def test_what_the_residual_excludes_is_never_drawn(few, verify_chain):
    """Case 2, at the last id of a short tile."""
    count, vocab = few(400), 130
    target = torch.zeros(count, 2, vocab)
    draft = torch.zeros(count, 1, vocab)
    draft[:, :, -1] = 9.0  # the target gives the last id less
    verified = verify_chain(
        target, torch.full((count, 1), vocab - 1), draft, draft_temperature=1.0, seed=torch.arange(count), position=1
    )
    rejected = verified.num_accepted == 0
    assert rejected.sum() > 0.75 * count
    assert (verified.tokens[rejected, 0] != vocab - 1).all()


@pytest.mark.parametrize("ratio", [1e-9, 1e-4])
def test_residual_precision(few, verify_chain, ratio):
    """Case 9: a draft token that is nearly certain, and a target that gives it almost nothing."""
    count = few(200)
    target = torch.tensor([[ratio, 0.5, 0.5 - ratio], [1, 1, 1]], dtype=torch.float64).log().float()
    draft = torch.tensor([[1 - 2e-7, 1e-7, 1e-7]], dtype=torch.float64).log().float()
    verified = verify_chain(
        target.expand(count, 2, 3), torch.zeros(count, 1, dtype=torch.int64), draft.expand(count, 1, 3),
        draft_temperature=1.0,
        seed=torch.arange(count), position=3,
    )  # fmt: skip
    for seed in range(count):
        want = oracle.verify_chain(target.double().numpy(), [0], draft.double().numpy(), None, oracle.Noise(seed, 3))
        if want.margin > selftest.EPSILON:
            assert verified.tokens[seed].tolist()[: len(want.tokens)] == want.tokens


def test_a_greedy_row_among_sampled_ones(verify_chain, sample):
    """Case 13: temperature 0 is the exact argmax, lowest id on ties."""
    target, tokens, draft = batch()
    target[1, :, 40] = target[1, :, 100] = 20.0
    tokens[1] = torch.tensor([40, 100])
    temperature = torch.tensor([1.0, 0.0, 0.7])
    verified = verify_chain(target, tokens, draft, draft_temperature=1.0, seed=1, position=1, temperature=temperature)
    assert verified.tokens[1].tolist() == [40, 40, -1]
    drawn = sample(target[:, 0], seed=1, position=1, temperature=temperature)
    assert drawn.tokens[1] == 40
    assert drawn.stats[1].tolist() == [INF, 20.0, 0.0]
    assert drawn.logprobs[1] == 0.0
    assert drawn.stats[[0, 2]].isfinite()[:, ::2].all()


def test_greedy_statistics_are_a_point_mass(few, verify_chain):
    count = few(64)
    target, tokens, draft = batch(count=count)
    stats = torch.tensor([INF, 3.0, 0.0]).expand(count, 2, 3)
    a = verify_chain(target, tokens, draft, stats, seed=torch.arange(count), position=1)
    b = verify_chain(target, tokens, seed=torch.arange(count), position=1)
    assert torch.equal(a.tokens, b.tokens)


def test_a_one_hot_draft_is_a_point_mass(few, verify_chain):
    """A draft without logits means the same as the draft with all its mass on the token."""
    count = few(64)
    target, tokens, _ = batch(count=count)
    one_hot = torch.full((count, 2, 131), -INF).scatter(2, tokens[..., None], 0.0)
    a = verify_chain(target, tokens, one_hot, draft_temperature=1.0, seed=torch.arange(count), position=1)
    b = verify_chain(target, tokens, seed=torch.arange(count), position=1)
    assert torch.equal(a.tokens, b.tokens)


def test_zero_residual(few, verify_chain):
    """Case 14: a rejection with nothing left over (declared twice too likely) draws from the target."""
    count = few(300)
    row = torch.tensor([0.5, 0.5, 0.0, 0.0]).log()
    stats = torch.tensor([1.0, -INF, -float(np.log(4.0))]).expand(count, 1, 3)
    verified = verify_chain(
        row.expand(count, 2, 4), torch.zeros(count, 1, dtype=torch.int64), row.expand(count, 1, 4), stats,
        seed=torch.arange(count), position=1,
    )  # fmt: skip
    rejected = verified.num_accepted == 0
    assert rejected.sum() > count / 3
    assert set(verified.tokens[rejected, 0].tolist()) == {0, 1}
    assert verified.valid.all()


@pytest.mark.parametrize("with_stats", [False, True])
def test_a_nan_draft_row_accepts_nothing(verify_chain, with_stats):
    """Case 15: not even a token to which the target gives 1e-22."""
    target = torch.tensor([[-50.0, 0.0, 0.0], [0.0, 0.0, 0.0]])[None]
    draft = torch.full((1, 1, 3), NAN)
    stats = torch.tensor([[[1.0, -INF, 1.0]]]) if with_stats else None
    heat = None if with_stats else 1.0
    verified = verify_chain(target, torch.tensor([[0]]), draft, stats, draft_temperature=heat, seed=1, position=1)
    assert verified.num_accepted.tolist() == [0]
    assert verified.valid.tolist() == [False]
    assert verified.tokens[0, 0] in (1, 2)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_unusable_target_row_harms_nobody_else(verify_chain, bad, temperature):
    """Cases 16 and 17, a vocabulary that is no multiple of anything."""
    target, tokens, draft = batch(vocab=300, count=4)
    named = {"seed": torch.arange(4), "position": 9, "temperature": temperature}
    before = verify_chain(target, tokens, draft, draft_temperature=1.0, **named)
    broken = target.clone()
    if bad == -INF:
        broken[2, 0] = -INF
        largest = 0
    else:
        broken[2, 0, 299] = bad
        largest = int(broken[2, 0, :299].argmax())
    after = verify_chain(broken, tokens, draft, draft_temperature=1.0, **named)
    assert after.valid.tolist() == [True, True, False, True]
    assert after.num_accepted[2] == 0
    assert after.tokens[2].tolist() == [largest, -1, -1]
    others = [0, 1, 3]
    assert torch.equal(before.tokens[others], after.tokens[others])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_unusable_row_in_sample(sample, bad, temperature):
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    logits[1, :] = torch.where(torch.arange(300) == 200, bad, -INF if bad == -INF else logits[1])
    drawn = sample(logits, seed=1, position=1, temperature=temperature)
    finite = logits[1].isfinite()
    assert drawn.tokens[1] == (int(logits[1].masked_fill(~finite, -INF).argmax()) if finite.any() else 0)
    assert drawn.logprobs[1].isnan()
    assert drawn.stats[1].isnan().all()
    assert drawn.logprobs[0].isfinite()


@pytest.mark.parametrize("temperature", [1e-30, 2e-5, 1e-3, 100.0])
def test_large_logits_at_extreme_temperatures(verify_chain, temperature):
    """Case 17: fp16 near its largest number, at a large scale."""
    target, tokens, draft = batch(count=8)
    target, draft = (target * 20_000).clamp(-65_504, 65_504).half(), draft.half()
    verified = verify_chain(
        target, tokens, draft, draft_temperature=1.0, seed=torch.arange(8), position=1, temperature=temperature
    )
    assert verified.valid.all()
    if temperature < 1:
        first = target[:, 0].gather(1, verified.tokens[:, :1])[:, 0]
        assert torch.equal(first, target[:, 0].amax(-1))


@pytest.mark.interpreted(kept=lambda parameters: parameters["vocab"] < 5000)
@pytest.mark.parametrize(("vocab", "token"), [(128, 100), (700, 699), (5000, 3), (5000, 4100)])
def test_a_mask_leaves_one_token_wherever_its_logit_lies(verify_chain, vocab, token):
    """Case 17: what a grammar makes of a row, by -inf, by large numbers and by bits."""
    values = torch.tensor([-1000.0, -300.0, -100.0, 0.0, 300.0])
    masks = torch.tensor([float("-inf"), -1e30, -60_000.0])
    target = masks.repeat_interleave(len(values))[:, None, None].repeat(1, 1, vocab)
    target[:, 0, token] = values.repeat(len(masks))
    behind = torch.full((len(values), 1, vocab), 50.0)
    behind[:, 0, token] = values
    words = torch.zeros(len(values), 1, -(-vocab // 32), dtype=torch.int32)
    words[..., token // 32] = torch.tensor(1 << token % 32).int()
    for logits, bitmask in ((target, None), (behind, words)):
        nothing = torch.empty(len(logits), 0, dtype=torch.int64)
        verified = verify_chain(logits, nothing, seed=1, position=1, bitmask=bitmask, logprobs=True)
        assert verified.valid.all()
        assert (verified.tokens == token).all()
        torch.testing.assert_close(verified.logprobs, torch.zeros(len(logits), 1), rtol=0, atol=1e-5)


@pytest.mark.backends("cpu")  # a buffer of 4 GiB; the other backends take strides as 64-bit integers the same way
def test_offsets_beyond_two_to_the_31(verify_chain):
    """Case 18: rows that start beyond 2^31 elements; a view, so that no memory is needed."""
    vocab = 131
    storage = torch.empty(2**31 + 4096, dtype=torch.float16)  # untouched pages cost nothing
    target, tokens, draft = batch(count=2, drafts=1)
    far = torch.as_strided(storage, (2, 2, vocab), (2**31, 1024, 1))
    far.copy_(target)
    a = verify_chain(far, tokens, draft.half(), draft_temperature=1.0, seed=torch.arange(2), position=1)
    b = verify_chain(target.half(), tokens, draft.half(), draft_temperature=1.0, seed=torch.arange(2), position=1)
    assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("kind", ["dense", "point mass"])
@pytest.mark.parametrize("end", range(4))
def test_minus_one_ends_a_draft(few, verify_chain, kind, end):
    """Case 19: at every position, whatever stands behind it; the same as a shorter num_draft."""
    count = few(32)
    target, tokens, draft = batch(count=count, drafts=3)
    target = target * 0.01 + 5 * torch.nn.functional.one_hot(torch.cat([tokens, tokens[:, :1]], 1), 131)
    drafted = {} if kind == "point mass" else {"draft_logits": draft, "draft_temperature": 1.0}
    cut = tokens.clone()
    if end < 3:
        cut[:, end] = -1
    named = {"seed": torch.arange(count), "position": 1}
    a = verify_chain(target, cut, **drafted, **named)
    b = verify_chain(target, tokens, **drafted, **named, num_draft=torch.full((count,), end))
    assert torch.equal(a.tokens, b.tokens)
    assert (a.num_accepted <= end).all()
    assert ((a.tokens >= 0).sum(1) == a.num_accepted + 1).all()
    assert end == 0 or (a.num_accepted == end).any()


def test_empty_batches_and_empty_drafts(verify_chain, sample):
    """Case 20."""
    none = verify_chain(torch.zeros(0, 3, 7), torch.zeros(0, 2, dtype=torch.int64), seed=1, position=1)
    assert [list(x.shape) for x in none] == [[0, 3], [0], [0], [0, 2], [0], [0]]
    plain = verify_chain(torch.zeros(2, 1, 7), torch.zeros(2, 0, dtype=torch.int64), seed=1, position=1)
    assert list(plain.tokens.shape) == [2, 1]
    assert plain.num_accepted.tolist() == [0, 0]
    assert [list(x.shape) for x in sample(torch.zeros(0, 7), seed=1, position=1)] == [[0], [0], [0, 3]]
    target, tokens, draft = batch()
    mixed = verify_chain(
        target, tokens, draft, draft_temperature=1.0, seed=1, position=1, num_draft=torch.tensor([0, 2, 1])
    )
    assert mixed.num_accepted[0] == 0


def test_a_request_does_not_depend_on_its_batch(few, verify_chain):
    """Case 22: alone, among 64, permuted: bitwise the same tokens; other seeds give other ones."""
    count = few(64)
    target, tokens, draft = batch(vocab=1000, count=count, drafts=3)
    seed, position = torch.arange(count) + 5, torch.arange(count) * 7
    named = {"temperature": 0.9}
    together = verify_chain(target, tokens, draft, draft_temperature=1.0, seed=seed, position=position, **named).tokens
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    permuted = verify_chain(
        target[order],
        tokens[order],
        draft[order],
        draft_temperature=1.0,
        seed=seed[order],
        position=position[order],
        **named,
    ).tokens
    assert torch.equal(permuted, together[order])
    for b in range(0, count, max(1, count // 4)):
        one = slice(b, b + 1)
        alone = verify_chain(
            target[one], tokens[one], draft[one], draft_temperature=1.0, seed=seed[one], position=position[one], **named
        )
        assert torch.equal(alone.tokens[0], together[b])
    other = verify_chain(
        target, tokens, draft, draft_temperature=1.0, seed=seed + 1000, position=position, **named
    ).tokens
    assert not torch.equal(other, together)


def test_inputs_are_not_changed(verify_chain, sample):
    """Case 24."""
    target, tokens, draft = batch()
    drawn = sample(draft.reshape(-1, 131), seed=1, position=1)
    given = [target, tokens, draft, drawn.stats.reshape(3, 2, 3)]
    copies = [x.clone() for x in given]
    verify_chain(*given, seed=1, position=1)
    sample(target[:, 0], seed=1, position=1, temperature=0.5)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@pytest.mark.interpreted(kept=lambda parameters: parameters["temperature"] == 0.3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_logprobs_are_the_targets(few, sample, dtype, temperature):
    """Case 34, as far as there are no filters: within 1e-5, never a blanket 0.0."""
    count = few(20)
    logits = (torch.randn(count, 999, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    drawn = sample(logits, seed=torch.arange(count), position=3, temperature=temperature)
    want = (logits.double() / temperature).log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs.double(), want, rtol=0, atol=1e-5)


def test_int32_ids_are_the_same(verify_chain):
    target, tokens, draft = batch()
    wide = verify_chain(
        target, tokens, draft, draft_temperature=1.0, seed=1, position=1, num_draft=torch.tensor([2, 1, 2])
    )
    narrow = verify_chain(
        target,
        tokens.int(),
        draft,
        draft_temperature=1.0,
        seed=1,
        position=1,
        num_draft=torch.tensor([2, 1, 2], dtype=torch.int32),
    )
    assert torch.equal(wide.tokens, narrow.tokens)


def test_rows_behind_the_rejection_are_not_read(few, verify_chain):
    """A nan there is not even noticed."""
    count = few(32)
    target, tokens, draft = batch(count=count)
    named = {"seed": torch.arange(count), "position": 1}
    before = verify_chain(target, tokens, draft, draft_temperature=1.0, **named)
    broken, broken_draft = target.clone(), draft.clone()
    for b, accepted in enumerate(before.num_accepted.tolist()):
        broken[b, accepted + 1 :] = NAN
        broken_draft[b, accepted + 1 :] = NAN
    after = verify_chain(broken, tokens, broken_draft, draft_temperature=1.0, **named)
    assert after.valid.all()
    assert torch.equal(before.tokens, after.tokens)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_row_behind_the_last_draft_is_read_only_if_that_is_accepted(few, verify_chain, rule):
    """Rule block reads all others, wherever the path ends."""
    target, tokens, draft = batch(count=few(32))
    named = {"draft_temperature": 1.0, "seed": torch.arange(len(target)), "position": 1, "rule": rule}
    before = verify_chain(target, tokens, draft, **named)
    rejected = before.num_accepted < tokens.shape[1]
    assert rejected.any()
    target[rejected, -1] = NAN
    after = verify_chain(target, tokens, draft, **named)
    assert after.valid.all()
    assert torch.equal(before.tokens, after.tokens)
