"""``verify_chain_lm_head``: verification from hidden states, against logits that are written."""

from __future__ import annotations

import pytest
import torch
from test_law import grids, law_by_counting  # noqa: F401 - a fixture

from specdec_kernels import sample, selftest, verify_chain, verify_chain_lm_head

WITHOUT = ("cpu", "cuda")
KEYS = {"seed": torch.arange(4) + 3, "position": torch.arange(4) * 5}


def example(vocab, width, dtype=torch.float32, longest=3, seed=0):
    """Hidden states, weights, float32 logits, and drafts with their law; row strides of their own."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, longest + 1, width + 3, generator=generator).to(dtype)[..., :width]
    weight = (torch.randn(vocab, width + 2, generator=generator) * 2 / width**0.5).to(dtype)[:, :width]
    target = torch.nn.functional.linear(hidden.double(), weight.double()).float()
    draft = target[:, :longest] + torch.randn(4, longest, vocab, generator=generator) * 0.5
    drawn = [sample(draft[:, i], row=i, temperature=0.8, **KEYS) for i in range(longest)]
    tokens, stats = (torch.stack([getattr(d, name) for d in drawn], 1) for name in ("tokens", "stats"))
    return hidden, weight, target, tokens, draft, stats


def moved(device, *tensors):
    return tuple(selftest.common.moved(x, device) for x in tensors)


def test_against_the_oracle(backend, device):
    """The self-test's own cases, more of them than it takes; their widths are no multiples of a block's."""
    report = selftest.Report()
    for index, case in enumerate(selftest.heads.cases(80, (2, 129, 300, 1500))):
        selftest.heads.check(report, case, index, backend, device)
    assert report.wrong == []
    assert report.too_close <= report.requests // 50
    assert report.requests == 240


def from_hidden(backend, device):
    """``verify_chain`` by hidden states that are the logits, under a head that is the identity."""

    def call(target, tokens, draft, stats, **named):
        named = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in named.items() if name != "rule"
        }
        eye = torch.eye(target.shape[-1])
        verified = verify_chain_lm_head(*moved(device, target, eye, tokens, draft, stats), **named, backend=backend)
        return verified._replace(tokens=verified.tokens.cpu())

    return call


@pytest.mark.parametrize("kind", ["dense", "statistics", "point mass"])
def test_the_law_is_exact(backend, device, grids, kind):  # noqa: F811
    assert law_by_counting(from_hidden(backend, device), grids["token", 1], kind, length=1) == 0


def test_a_wrong_draft_law_is_seen(backend, device, grids):  # noqa: F811
    other = {(): (1, 3)}
    law = law_by_counting(from_hidden(backend, device), grids["token", 1], "dense", drawn_from=other, length=1)
    assert law > 1 / 50


def test_a_wrong_weight_is_seen(backend, device):
    """The comparison can fail: one row of the head moved."""
    hidden, weight, target, tokens, draft, stats = example(300, 70)
    weight = weight.clone()
    weight[17] += 3 * hidden[0, 0]
    named = {name: x.to(device) for name, x in KEYS.items()}
    got = verify_chain_lm_head(*moved(device, hidden, weight, tokens, draft, stats), **named, backend=backend)
    want = verify_chain(target, tokens, draft, stats, **KEYS, backend="reference")
    assert not torch.equal(got.tokens.cpu(), want.tokens)


def test_hidden_states_that_are_not_numbers(backend, device):
    hidden, weight, _, tokens, draft, stats = example(300, 70)
    hidden[1, 0, 5] = torch.nan
    hidden[2, 1, 5] = torch.inf
    named = {name: x.to(device) for name, x in KEYS.items()}
    got = verify_chain_lm_head(*moved(device, hidden, weight, tokens, draft, stats), **named, backend=backend)
    logits = torch.nn.functional.linear(hidden, weight)
    want = verify_chain(logits, tokens, draft, stats, **KEYS, backend="reference")
    assert got.valid.tolist() == want.valid.tolist()
    assert not got.valid[1]
    assert got.num_accepted.tolist() == want.num_accepted.tolist()
    assert ((got.tokens >= -1) & (got.tokens < 300)).all()
    for b in (0, 3):
        assert got.tokens[b].tolist() == want.tokens[b].tolist()


def test_nothing_to_do(backend, device):
    hidden, weight, _, tokens, *_ = moved(device, *example(20, 4))
    none = verify_chain_lm_head(hidden[:0], weight, tokens[:0], seed=1, position=1, backend=backend)
    assert none.tokens.shape == (0, 4)
    alone = verify_chain_lm_head(hidden[:, :1], weight, tokens[:, :0], seed=1, position=1, backend=backend)
    assert alone.num_accepted.tolist() == [0] * 4
    assert ((alone.tokens >= 0) & (alone.tokens < 20)).all()


def test_what_has_no_head_says_so():
    hidden, weight, _, tokens, *_ = example(20, 4)
    with pytest.raises(RuntimeError, match="backend='cpu' has no verify_chain_lm_head: backend=None takes"):
        verify_chain_lm_head(hidden, weight, tokens, seed=1, position=1, backend="cpu")


HIDDEN, WEIGHT, TOKENS = torch.zeros(2, 4, 6), torch.zeros(7, 6), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": HIDDEN[0]},
            ValueError,
            r"hidden must have shape \[B, K\+1, H\] = \[2, 4, \*\], got float32 \[4, 6\]",
        ),
        ({"hidden": HIDDEN.double()}, TypeError, "hidden must be float32 or bfloat16 or float16"),
        ({"hidden": torch.zeros(2, 4, 12)[..., ::2]}, ValueError, r"hidden must be contiguous along H \(stride 1\)"),
        ({"weight": WEIGHT.half()}, TypeError, r"weight must be float32 \[V, H\], got float16"),
        ({"weight": WEIGHT[:, :5]}, ValueError, r"weight must have shape \[V, H\] = \[\*, 6\]"),
        ({"weight": WEIGHT[:0]}, ValueError, "weight must have a vocabulary of at least one token"),
        ({"weight": torch.zeros(6, 7).T}, ValueError, "weight must be contiguous along H"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like hidden, got meta"),
        ({"draft_tokens": TOKENS + 7}, ValueError, r"draft_tokens must be -1 or in \[0, 7\), got 7 at \[0, 0\]"),
        (
            {"draft_logits": torch.zeros(2, 3, 6), "draft_temperature": 1.0},
            ValueError,
            r"draft_logits must have shape .* = \[2, 3, 7\]",
        ),
        ({"draft_stats": torch.zeros(2, 3, 3)}, ValueError, "draft_stats needs the draft_logits"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative"),
        ({"seed": 1.0}, TypeError, r"seed must be int64 \[B\]"),
        ({"backend": "cuda9"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_input(change, error, message):
    named = {"hidden": HIDDEN, "weight": WEIGHT, "draft_tokens": TOKENS, "seed": 1, "position": 1, **change}
    with pytest.raises(error, match=message):
        verify_chain_lm_head(**named)


def test_opcheck():
    hidden, weight, _, tokens, draft, stats = example(20, 4)
    for given in ((None, None, None), (draft, stats, torch.tensor([[0.5], [0.0], [1.0], [2.0]]).repeat(1, 4))):
        *law, sampling = given
        if sampling is not None:
            sampling[:, 1:] = torch.tensor([0.0, 1.0, 0.0])
        operands = (hidden, weight, tokens, *law, None, 1.0, *KEYS.values(), None, sampling, 0.7)
        torch.library.opcheck(torch.ops.specdec.verify_chain_lm_head.default, operands)
