"""Whatever the logits, temperatures and filters are: a drawn id is in range, allowed, and not impossible; or the row is
called not valid, and what is documented is returned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from forms import some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec_kernels import (
    LogitBias,
    oracle,
    sample,
    sample_children,
    verify_chain,
    verify_tree,
)
from specdec_kernels.lossy import typical_acceptance

INF = math.inf
MOST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DENORMAL = 2.0**-149
CHAIN_RULES, TREE_RULES = ("token", "block", "coupled"), ("walk", "recursive", "traversal", "coupled")
CHILDREN = ("top", "iid", "without_replacement", "race")

#: A chain of two drafts, and a tree of a root, two children and one grandchild.
PARENTS = torch.tensor([[-1, 0, 0, 1]])
CHAIN, TREE = 2, PARENTS.shape[1]


def greedy(temperature: float) -> bool:
    return bool(np.float32(temperature) < np.float32(1e-5))


def possible(row: Tensor, temperature: float) -> Tensor:
    """Which ids of a processed row may be drawn, in float64; none where the row is not valid."""
    x = row.double()
    if x.isnan().any() or (x == INF).any() or not x.isfinite().any():
        return torch.zeros_like(x, dtype=torch.bool)
    if greedy(temperature):
        return torch.arange(len(x)) == x.argmax()
    return (x - x.max()) / temperature > -150  # float32 ends near -104


def largest_finite(row: Tensor) -> int:
    return int(row.float().masked_fill(~row.float().isfinite(), -INF).argmax())


def masked(row: Tensor, words: Tensor | None) -> Tensor:
    if words is None:
        return row
    bits = (words[:, None] >> torch.arange(32) & 1).flatten()[: len(row)]
    return row.float().masked_fill(bits == 0, -INF)


def check(rows: Tensor, tokens: list[int], path: list[int], valid: bool, temperature: float) -> None:
    """``tokens`` came from rows ``path``, each as its distribution has it."""
    for index, (row, token) in enumerate(zip(path, tokens, strict=True)):
        assert 0 <= token < rows.shape[1], tokens
        able = possible(rows[row], temperature)
        if able.any():
            assert able[token], (row, token)
        else:
            assert not valid
            assert index == len(path) - 1
            assert token == largest_finite(rows[row])


# --- what may come ----------------------------------------------------------------------------------------------------


def magnitudes(dtype: torch.dtype) -> st.SearchStrategy[float]:
    most = MOST[dtype]
    edges = [0.0, -0.0, most, -most, most / 2, -most / 2, DENORMAL, -DENORMAL, 2.0**20, 65504.0, -65504.0]
    return st.one_of(st.sampled_from(edges), st.floats(-30, 30), st.floats(-most, most))


temperatures = st.one_of(
    st.sampled_from([0.0, 1e-6, 1e-5, 1.1e-5, 1e-3, 0.5, 0.9, 1.0, 2.0, 1e10, 1e30, 1e37, 3e38, MOST[torch.float32]]),
    st.floats(-5, 38).map(lambda e: 10**e),
)
filters = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from([None, None, 1, 3, 1 << 24, (1 << 24) + 1, 1 << 40, 1 << 70]),
        "top_p": st.sampled_from([None, None, DENORMAL, 1e-300, 1e-38, 0.5, 0.999]),
        "min_p": st.sampled_from([None, None, DENORMAL, 0.3, 1.0]),
    }
)


@st.composite
def calls(draw: st.DrawFn, vocabs: tuple[int, ...]) -> dict[str, Any]:
    vocab, dtype = draw(st.sampled_from(vocabs)), draw(st.sampled_from(list(MOST)))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        """A few values over the row, -inf among them, some of them unlike all others."""
        some = draw(st.lists(magnitudes(dtype), min_size=1, max_size=3))
        some += [-INF] * draw(st.integers(0, 2))
        values = torch.tensor(some).clamp(-MOST[dtype], MOST[dtype]).where(torch.tensor(some).isfinite(), -INF)
        x = values[torch.randint(0, len(some), (count, vocab), generator=generator)]
        for _ in range(draw(st.integers(0, 2))):
            at = torch.randint(0, vocab, (count,), generator=generator)
            x[torch.arange(count), at] = torch.tensor(draw(magnitudes(dtype))).clamp(-MOST[dtype], MOST[dtype])
        return x.to(dtype)

    allowed = None
    if draw(st.booleans()):  # one id each
        at = torch.randint(0, vocab, (TREE,), generator=generator)
        allowed = torch.zeros(TREE, -(-vocab // 32), dtype=torch.int64)
        allowed[torch.arange(TREE), at // 32] = 1 << (at % 32)
        allowed = torch.where(allowed >= 1 << 31, allowed - (1 << 32), allowed).int()
    target, draft, temperature, heat = rows(TREE), rows(TREE), draw(temperatures), draw(temperatures)
    likely = target.float().argmax(1).roll(1)
    return {
        "target": target,
        "draft": draft,
        "tokens": torch.where(torch.rand(TREE, generator=generator) < 0.6, likely, 0),
        "temperature": temperature,
        "heat": heat,
        "bitmask": allowed,
        "filters": draw(filters),
        "stats": draw(st.sampled_from(["sampled", "odd"])),
        "odd": torch.tensor([[draw(magnitudes(torch.float32)) for _ in range(3)] for _ in range(TREE)]),
        "keys": {"seed": seed, "position": 7},
    }


def run(call: dict[str, Any], backend: str) -> None:
    """Every function and rule on one set of rows."""
    target, draft, tokens, keys = call["target"], call["draft"], call["tokens"], call["keys"]
    heat, bitmask = call["heat"], call["bitmask"]
    options = {"temperature": call["temperature"], **call["filters"], "backend": backend}
    rows = torch.stack([masked(target[i], None if bitmask is None else bitmask[i]) for i in range(TREE)])

    for coupled in (False, True):
        drawn = sample(target, **keys, **options, bitmask=bitmask, coupled=coupled)
        for row in range(TREE):
            valid = bool(drawn.logprobs[row].isfinite())
            assert valid == bool(drawn.stats[row, 2].isfinite()) == bool(possible(rows[row], 1.0).any())
            check(rows, [int(drawn.tokens[row])], [row], valid, call["temperature"])
    for method in CHILDREN:
        children = sample_children(target, 3, method, **keys, **options, bitmask=bitmask)
        for row, ids in enumerate(children.tokens.tolist()):
            assert ids[0] >= 0
            for token in ids if method != "top" else ids[:1]:
                if token >= 0:
                    check(rows, [token], [row], not children.stats[row].isnan().any(), call["temperature"])
            for token in (t for t in ids if t >= 0):
                assert token < target.shape[1]
                assert rows[row, token] > -INF or not possible(rows[row], 1.0).any()

    stats = sample(draft, **keys, temperature=heat, backend=backend).stats
    stats = call["odd"] if call["stats"] == "odd" else stats
    kinds: list[tuple[Tensor | None, Tensor | None, float | None]] = [
        (None, None, None), (draft, stats, None), (draft, None, heat)
    ]  # fmt: skip
    for logits, scalars, drafted_at in kinds:
        drafts = () if logits is None else (logits[None, :CHAIN], None if scalars is None else scalars[None, :CHAIN])
        mask = None if bitmask is None else bitmask[None, : CHAIN + 1]
        for rule in CHAIN_RULES:
            chain = verify_chain(
                target[None, : CHAIN + 1], tokens[None, 1 : CHAIN + 1], *drafts, **keys, **options, rule=rule,
                bitmask=mask, draft_temperature=drafted_at, logprobs=True,
            )  # fmt: skip
            count = int(chain.num_accepted) + 1
            check(rows, chain.tokens[0, :count].tolist(), list(range(count)), bool(chain.valid), call["temperature"])
            drawable = [i for i in range(count) if possible(rows[i], 1.0).any()]
            assert chain.logprobs[0, drawable].isfinite().all()
        drafts = () if logits is None else (logits[None], None if scalars is None else scalars[None])
        mask = None if bitmask is None else bitmask[None]
        for rule in TREE_RULES:
            tree = verify_tree(
                target[None], tokens[None], PARENTS, *drafts, **keys, **options, rule=rule, bitmask=mask,
                siblings="without_replacement", draft_temperature=drafted_at,
            )  # fmt: skip
            count = int(tree.num_accepted) + 1
            path = tree.nodes[0, :count].tolist()
            check(rows, tree.tokens[0, :count].tolist(), path, bool(tree.valid), call["temperature"])
    if not greedy(call["temperature"]):
        typical = typical_acceptance(
            target[None], tokens[None], PARENTS, **keys, temperature=call["temperature"], backend=backend
        )
        count = int(typical.num_accepted) + 1
        path = typical.nodes[0, :count].tolist()
        check(target, typical.tokens[0, :count].tolist(), path, bool(typical.valid), call["temperature"])


@settings(max_examples=some(60, 150), deadline=None, derandomize=True)
@given(call=calls((1, 3, 130, 300, 2500)))
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_every_function(name, call):
    run(call, name)


@settings(max_examples=some(6, 12), deadline=None, derandomize=True)
@given(call=calls((1, 3, 130, 300)))
def test_every_function_of_the_reference(call):
    run(call, "reference")


@settings(max_examples=some(1, 3), deadline=None, derandomize=True)
@given(call=calls((130,)))
def test_every_function_of_triton(call):
    run(call, "triton")


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [0, 128, 299])
def test_one_id_is_left_at_the_end_of_float32(backend, token):
    """Once scaled by more than one it is no float32, and there is nothing else to draw."""
    least = torch.finfo(torch.float32).min
    row = torch.full((1, 2, 300), -INF)
    row[..., token] = least
    named = {"seed": 1, "position": 1, "temperature": 0.9, "backend": backend}
    drawn = sample(row[0], **named)
    assert drawn.tokens.tolist() == [token] * 2
    assert drawn.stats.tolist() == [[0.0, least, 0.0]] * 2
    for rule in CHAIN_RULES:
        verified = verify_chain(row, torch.tensor([[token]]), **named, rule=rule, logprobs=True)
        assert verified.tokens.tolist() == [[token] * 2]
        assert verified.valid
        assert verified.logprobs.tolist() == verified.raw_logprobs.tolist() == [[0.0, 0.0]]
    dense = verify_chain(row, torch.tensor([[token]]), row[:, :1], drawn.stats[None, :1], **named)
    assert dense.tokens.tolist() == [[token] * 2]
    assert dense.valid


def test_a_mask_leaves_the_smallest_logit(backend):
    """A grammar's only id is what is drawn, whatever the others are."""
    row = torch.full((1, 1, 300), 3.4e38)
    row[..., 40] = torch.finfo(torch.float32).min
    words = torch.zeros(1, 1, 10, dtype=torch.int32)
    words[..., 1] = 1 << 8
    nothing = torch.empty(1, 0, dtype=torch.int64)
    for temperature in (1e-5, 0.5, 1.0, 3e38):
        made = verify_chain(
            row, nothing, seed=1, position=1, temperature=temperature, bitmask=words, backend=backend, logprobs=True
        )
        assert made.tokens.tolist() == [[40]]
        assert made.valid
        assert made.logprobs.abs().item() < 1e-5


def test_steep_ties_are_uniform(backend):
    """A steep row is drawn from its largest logits, all alike; what is handed over verifies, and says so."""
    row = torch.tensor([3e38, -3e38, 3e38, 2.9e38, -INF] * 60).repeat(9, 1)
    named = {"position": 1, "temperature": 0.5, "backend": backend}
    drawn = sample(row, seed=torch.arange(9), **named)
    assert set((drawn.tokens % 5).tolist()) == {0, 2}
    torch.testing.assert_close(drawn.stats[0], torch.tensor([0.0, 3e38, math.log(120)]))
    torch.testing.assert_close(drawn.logprobs, torch.full((9,), -math.log(120)))
    for how in ({"draft_stats": drawn.stats[:, None]}, {"draft_temperature": 0.5}):
        for rule in ("token", "block"):
            verified = verify_chain(
                row[:, None].repeat(1, 2, 1), drawn.tokens[:, None], row[:, None], **how, seed=torch.arange(9) + 100,
                rule=rule, **named,
            )  # fmt: skip
            assert verified.valid.all()
            assert (verified.num_accepted == 1).all()  # the drafts' distribution is the target's


@pytest.mark.parametrize("temperature", [3e38, 1e38, 1e37])
def test_logits_further_apart_than_a_float_goes(backend, temperature):
    """At such a temperature they are near each other, and the difference of two of them is no float32."""
    row = torch.tensor([-3.4e38, 3.4e38, -3e38, 0.0, -INF] * 60)[None]
    row[:, :256:3] = -INF  # among them what a pass looks at first
    want = (row.double() / temperature).log_softmax(-1)
    for filters, keeps in (({}, -4e38), ({"top_k": 100}, 0.0), ({"top_p": 1e-45}, 3.3e38), ({"min_p": 0.9}, 3.3e38)):
        drawn = sample(row, seed=3, position=1, temperature=temperature, **filters, backend=backend)
        kept = row >= drawn.stats[0, 1]
        again = want.masked_fill(~kept, -INF).log_softmax(-1)
        torch.testing.assert_close(drawn.logprobs.double(), again[0, drawn.tokens], rtol=0, atol=1e-5)
        if keeps > 0:
            assert row[0, drawn.tokens].item() > keeps
        if not filters:
            total = (drawn.stats[0, 0].double() * row.double() - drawn.stats[0, 2].double()).exp().sum()
            assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_top_k_of_a_vocabulary_and_more_is_off(backend):
    row = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    named = {"seed": 3, "position": 1, "backend": backend}
    want = sample(row, **named)
    for k in (300, 301, 1 << 24, (1 << 24) + 1, 1 << 40, 1 << 64):
        assert torch.equal(sample(row, **named, top_k=k).stats, want.stats), k
    for k in ((1 << 24) + 1, 1 << 62):
        assert torch.equal(sample(row, **named, top_k=torch.tensor([k, 0])).stats, want.stats), k


def test_the_oracle_agrees_on_steep_rows(backend):
    generator = torch.Generator().manual_seed(5)
    row = torch.tensor([3e9, 3e9 - 256, -3e9, -INF])[torch.randint(0, 4, (20, 400), generator=generator)]
    drawn = sample(row, seed=torch.arange(20), position=2, temperature=0.7, backend=backend)
    for r in range(20):
        want = oracle.sample(row[r].numpy(), oracle.Noise(r, 2), sampling=oracle.Sampling(temperature=0.7))
        assert want.margin > 1e-5
        assert int(drawn.tokens[r]) == want.token
        torch.testing.assert_close(drawn.stats[r], torch.tensor(want.stats))


ODD = [
    (1e30, -INF, 0.0), (-1.0, -INF, 0.0), (math.nan, 0.0, 0.0), (0.0, -INF, -INF), (1.0, INF, INF),
    (1.0, -INF, math.nan), (DENORMAL, 0.0, -100.0), (INF, 0.0, 0.0),
]  # fmt: skip


@pytest.mark.interpreted(kept=lambda parameters: parameters["stats"] in (ODD[0], ODD[2], ODD[6]))
@pytest.mark.parametrize("stats", ODD)
def test_odd_scalars_of_drafts(backend, stats):
    """Whatever is handed over, ids stay in range; what says nothing about the draft is not used."""
    generator = torch.Generator().manual_seed(3)
    target, draft = (torch.randn(4, n, 300, generator=generator) * 5 for n in (3, 2))
    draft[:, :, 9] = -INF
    tokens = torch.randint(0, 300, (4, 2), generator=generator)
    scalars = torch.tensor(stats).expand(4, 2, 3).contiguous()
    for rule in ("token", "block"):
        made = verify_chain(
            target, tokens, draft, scalars, seed=torch.arange(4), position=1, rule=rule, backend=backend
        )
        want = verify_chain(
            target, tokens, draft, scalars, seed=torch.arange(4), position=1, rule=rule, backend="reference"
        )
        assert torch.equal(made.tokens, want.tokens)
        assert torch.equal(made.valid, want.valid)


def test_biases_at_the_end_of_float32(backend):
    row = torch.zeros(1, 1, 300)
    bias = LogitBias(torch.tensor([[7, 8]]), torch.tensor([[3.4e38, -3.4e38]]))
    nothing = torch.empty(1, 0, dtype=torch.int64)
    made = verify_chain(row, nothing, seed=1, position=1, logit_bias=bias, temperature=0.5, backend=backend)
    assert made.tokens.tolist() == [[7]]
    assert made.valid
