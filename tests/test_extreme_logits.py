"""Whatever the logits, temperatures and filters are: an emitted id is in range, allowed, and not impossible; or the row
is called not valid, and what is documented is emitted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec_kernels import (
    BACKENDS,
    LogitBias,
    oracle,
    sample,
    sample_children,
    verify_chain,
    verify_chain_lm_head,
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


def emitted_by(row: Tensor, temperature: float) -> Tensor:
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
    """``tokens`` came from rows ``path``, each as its law sees it."""
    for index, (row, token) in enumerate(zip(path, tokens, strict=True)):
        assert 0 <= token < rows.shape[1], tokens
        able = emitted_by(rows[row], temperature)
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
    law = {"temperature": call["temperature"], **call["filters"], "backend": backend}
    rows = torch.stack([masked(target[i], None if bitmask is None else bitmask[i]) for i in range(TREE)])

    for coupled in (False, True):
        drawn = sample(target, **keys, **law, bitmask=bitmask, coupled=coupled)
        for row in range(TREE):
            valid = bool(drawn.logprobs[row].isfinite())
            assert valid == bool(drawn.stats[row, 2].isfinite()) == bool(emitted_by(rows[row], 1.0).any())
            check(rows, [int(drawn.tokens[row])], [row], valid, call["temperature"])
    for method in CHILDREN:
        children = sample_children(target, 3, method, **keys, **law, bitmask=bitmask)
        for row, ids in enumerate(children.tokens.tolist()):
            assert ids[0] >= 0
            for token in ids if method != "top" else ids[:1]:
                if token >= 0:
                    check(rows, [token], [row], not children.stats[row].isnan().any(), call["temperature"])
            for token in (t for t in ids if t >= 0):
                assert token < target.shape[1]
                assert rows[row, token] > -INF or not emitted_by(rows[row], 1.0).any()

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
                target[None, : CHAIN + 1], tokens[None, 1 : CHAIN + 1], *drafts, **keys, **law, rule=rule, bitmask=mask,
                draft_temperature=drafted_at, logprobs=True,
            )  # fmt: skip
            count = int(chain.num_accepted) + 1
            check(rows, chain.tokens[0, :count].tolist(), list(range(count)), bool(chain.valid), call["temperature"])
            emitted = [i for i in range(count) if emitted_by(rows[i], 1.0).any()]
            assert chain.logprobs[0, emitted].isfinite().all()
        drafts = () if logits is None else (logits[None], None if scalars is None else scalars[None])
        mask = None if bitmask is None else bitmask[None]
        for rule in TREE_RULES:
            tree = verify_tree(
                target[None], tokens[None], PARENTS, *drafts, **keys, **law, rule=rule, bitmask=mask,
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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls((1, 3, 130, 300, 2500)))
@pytest.mark.parametrize("name", ["reference", "cpu", "cuda"])
def test_every_function(name, call):
    run(call, name)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(call=calls((3, 130)))
def test_every_function_of_triton(call):
    run(call, "triton")
