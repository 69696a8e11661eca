"""Counts that are kept from step to step give what counting the whole sequences gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels import LogitBias, Penalties, TokenCounts, sample, verify_chain, verify_tree
from specdec_kernels.ops import processing
from specdec_kernels.ops.validate import ArgumentChecker

VOCAB = 12
ids = st.integers(0, VOCAB - 1)
sequences = st.lists(ids, max_size=10)
STRENGTHS = {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.3}


def padded(rows):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.int64).view(len(rows), -1)


@st.composite
def histories(draw):
    """Prompts and outputs of a batch after some steps, and the counts that went through them."""
    prompts = draw(st.lists(sequences, min_size=1, max_size=3))
    outputs = [[] for _ in prompts]
    counts = TokenCounts(prompts, VOCAB, "cpu")
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            added = [draw(sequences) for _ in prompts]
            outputs = [[*old, *new] for old, new in zip(outputs, added, strict=True)]
            counts.extend(added)
        else:
            slots = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=3))
            prompts, outputs = [prompts[slot] for slot in slots], [outputs[slot] for slot in slots]
            counts.select(slots)
    return prompts, outputs, counts


def tensors(draw, batch, low, elements):
    """int64 [batch, *], padded anywhere."""
    width = draw(st.integers(low, 4))
    return torch.tensor(draw(st.lists(st.lists(elements, min_size=width, max_size=width), min_size=batch,
                                      max_size=batch))).view(batch, width)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(histories(), st.data())
def test_adjustments_are_those_of_the_whole_sequences(history, data):
    prompts, outputs, counts = history
    batch = len(prompts)
    drafts = tensors(data.draw, batch, 0, st.integers(-1, VOCAB - 1)).long()
    bias = data.draw(st.none() | st.just(0))
    if bias is not None:
        biased = tensors(data.draw, batch, 0, st.integers(-1, VOCAB - 1)).long()
        bias = LogitBias(biased, torch.linspace(-1, 2, biased.numel()).view(biased.shape))
    logits = torch.zeros(batch, drafts.shape[1] + 1, VOCAB)

    def of(penalties):
        ids, adjustments, added, strengths = processing.adjustments(
            ArgumentChecker("logits", logits, B=batch, V=VOCAB), penalties, bias, drafts
        )
        return [
            [
                (token, *often, value)
                for token, often, value in zip(*(x[b].tolist() for x in (ids, adjustments, added)), strict=True)
                if token < VOCAB
            ]
            for b in range(batch)
        ], strengths.tolist()

    kept = of(Penalties(counts=counts, **STRENGTHS))
    assert kept == of(Penalties(padded(prompts), padded(outputs), **STRENGTHS))
    for b, own in enumerate(kept[0]):
        touched = {*prompts[b], *outputs[b], *drafts[b].tolist(), *([] if bias is None else bias.tokens[b].tolist())}
        assert [token for token, *_ in own] == sorted(touched - {-1})
        for token, in_prompt, in_output, value in own:
            assert in_prompt == prompts[b].count(token)
            assert in_output == outputs[b].count(token)
            here = 0.0 if bias is None else float(bias.values[b][bias.tokens[b] == token].sum())
            assert value == pytest.approx(here, abs=1e-6)
    assert counts.ids.shape[1] == max(len({*p, *o}) for p, o in zip(prompts, outputs, strict=True))


@settings(deadline=None, max_examples=40)
@given(histories(), st.integers(0, 1000))
def test_operators_take_either(history, seed):
    prompts, outputs, counts = history
    batch, generator = len(prompts), torch.Generator().manual_seed(seed)
    target = torch.randn(batch, 4, VOCAB, generator=generator)
    drafts = torch.randint(0, VOCAB, (batch, 3), generator=generator)
    drafts[:, 2:] = -1
    tree = torch.randint(0, VOCAB, (batch, 4), generator=generator)
    parents = torch.tensor([[-1, 0, 0, 1]]).expand(batch, -1)
    bias = LogitBias(drafts[:, :2], torch.randn(batch, 2, generator=generator))
    named = {"seed": seed, "position": 5, "logit_bias": bias}
    kept, whole = (
        [
            *verify_chain(target, drafts, penalties=penalties, **named),
            *verify_tree(target, tree, parents, penalties=penalties, **named),
            *sample(target[:, 0], penalties=penalties, **named),
        ]
        for penalties in (
            Penalties(counts=counts, **STRENGTHS),
            Penalties(padded(prompts), padded(outputs), **STRENGTHS),
        )
    )
    for a, b in zip(kept, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_step_leaves_what_was_handed_out_before():
    """Operators of the step before may still be reading it on a device."""
    counts = TokenCounts([[1, 3], [2]], 5, "cpu")
    before = counts.ids, counts.counts
    copies = [x.clone() for x in before]
    counts.extend([[3, 0], []])
    counts.select([1])
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))
    assert counts.ids.tolist() == [[2]]


def test_nothing_depends_on_the_default_device_and_dtype():
    def everything():
        counts = TokenCounts([[1, 2, 2], []], 6, "cpu")
        counts.extend([[4], [0, 4]])
        counts.select([1, 0])
        penalties = [Penalties(counts=counts, **STRENGTHS), Penalties(tokens, tokens[:, :1], **STRENGTHS)]
        check = ArgumentChecker("logits", logits, B=2, V=6)
        return [x for p in penalties for x in processing.adjustments(check, p, bias, tokens)]

    tokens, logits = torch.tensor([[1, 5], [3, -1]]), torch.zeros(2, 3, 6)
    bias = LogitBias(tokens, torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    want, dtype = everything(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = everything()
    finally:
        torch.set_default_dtype(dtype)
    assert [(x.device.type, x.dtype) for x in got] == [(x.device.type, x.dtype) for x in want]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


TEXT = torch.tensor([[1], [2]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.extend([[1]]), ValueError, "tokens must have one entry for each of the 2 requests, got 1"),
        (lambda c: c.extend([[1], [6]]), ValueError, r"tokens\[1\] must hold token ids in \[0, 6\), got 6"),
        (lambda c: c.extend([[1], [-1]]), ValueError, r"tokens\[1\] must hold token ids in \[0, 6\), got -1"),
        (lambda c: c.extend([[1], [0.5]]), TypeError, r"tokens\[1\] must be a list of token ids, got \[0.5\]"),
        (lambda c: c.extend([[1], 3]), TypeError, r"tokens\[1\] must be a list of token ids, got 3"),
        (
            lambda c: c.extend([[1], [[1], [2, 3]]]),
            TypeError,
            r"tokens\[1\] must be a list of token ids, got \[\[1\], ",
        ),
        (lambda c: c.extend(3), TypeError, "tokens must be a list of texts, got 3"),
        (lambda c: c.select([0, 2]), ValueError, r"slots must hold slots in \[0, 2\), got 2"),
        (lambda c: c.select([-1]), ValueError, r"slots must hold slots in \[0, 2\), got -1"),
        (lambda c: c.select([1.0]), TypeError, r"slots must be a list of slots, got \[1.0\]"),
        (lambda c: TokenCounts(None, 6, "cpu"), TypeError, "prompts must be a list of texts, got None"),
        (lambda c: TokenCounts([[1]], 4.0, "cpu"), TypeError, "vocab_size must be an int, got 4.0"),
        (lambda c: TokenCounts([[]], 0, "cpu"), ValueError, r"vocab_size must be in \[1, 2147483648\), got 0"),
        (lambda c: use(Penalties(TEXT, counts=c)), ValueError, "either counts, or prompt and output, got both"),
        (lambda c: use(Penalties(counts=c), vocab=7), ValueError, "penalties.counts must be of V = 7 ids, got 6"),
        (
            lambda c: use(Penalties(counts=c), batch=1),
            ValueError,
            r"penalties.counts must have shape \[B, ids\] = \[1, \*\], got int32 \[2, 2\]",
        ),
        (lambda c: use(Penalties(counts=[1])), TypeError, r"penalties.counts must be TokenCounts, got \[1\]"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(call, error, message):
    counts = TokenCounts([[1, 2], [3]], 6, "cpu")
    with pytest.raises(error, match=message):
        call(counts)
    assert counts.ids.tolist() == [[1, 2], [3, 6]]
    assert counts.counts.tolist() == [[[1, 0], [1, 0]], [[1, 0], [0, 0]]]
    counts.extend([[5], [3]])
    assert counts.ids.tolist() == [[1, 2, 5], [3, 6, 6]]


def use(penalties, batch=2, vocab=6):
    none = torch.empty((batch, 0), dtype=torch.int64)
    return verify_chain(torch.zeros(batch, 1, vocab), none, seed=1, position=1, penalties=penalties)
