"""What `specdec bench kernels` and `trees` time beside ours: whether it draws from the right distribution, and from
buffers that are as cold for all. No time is looked at."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import islice, pairwise

import pytest
import torch
from rich.console import Console

from specdec_kernels import sample
from specdec_kernels.bench import run, trees
from specdec_kernels.bench.cases import FILTERS, TEMPERATURE, Case, Inputs
from specdec_kernels.bench.contenders import (
    batched,
    by_race,
    by_search,
    contenders,
    lean_batch,
    lean_filtered,
    lean_rows,
)

VOCAB, DRAFTS, REQUESTS = 7, 2, 2000
#: Of chi square with six degrees of freedom, what is exceeded once in a hundred thousand times.
FAR = 33.1


def equal_requests(dtype: torch.dtype, requests: int = REQUESTS, **filters: float) -> Inputs:
    """The same rows for all of them, and drafts that were drawn for each."""
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(DRAFTS + 1, VOCAB, generator=generator).to(dtype)
    draft = target[:DRAFTS] + torch.randn(DRAFTS, VOCAB, generator=generator).to(dtype)
    rows, seed = draft.repeat(requests, 1), torch.arange(requests).repeat_interleave(DRAFTS)
    at = torch.arange(DRAFTS).repeat(requests)
    drawn = sample(rows, seed=seed, position=0, row=at, temperature=TEMPERATURE, **filters)
    shape = requests, DRAFTS
    none = torch.zeros(requests, dtype=torch.int64)
    return Inputs(
        target.repeat(requests, 1, 1), drawn.tokens.reshape(shape), rows.reshape(*shape, VOCAB),
        drawn.stats.reshape(*shape, 3), none, none, none, none,
    )  # fmt: skip


def chi_square(ids: torch.Tensor, expected: torch.Tensor) -> float:
    """How far counts are from what they should be; without end where an id came that cannot."""
    counts, expected = torch.bincount(ids, minlength=VOCAB).double(), expected.double() * len(ids)
    if counts[expected == 0].any():
        return float("inf")
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


def expected_rows(case: Case, x: Inputs) -> torch.Tensor:
    """What the tokens of each place should be drawn from."""
    probs = torch.softmax(x.target[0].double() / TEMPERATURE, -1)
    if case.filtered:
        kept = probs * (probs >= probs.topk(3).values[:, -1:])
        ordered, ids = (kept / kept.sum(-1, keepdim=True)).sort(descending=True)
        ordered = ordered.where(ordered.cumsum(-1) - ordered < FILTERS["top_p"], 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, ids, ordered)
    return probs / probs.sum(-1, keepdim=True)


def far_apart(contender, case: Case, x: Inputs) -> float:
    """The largest chi square of the tokens of each place."""
    verified = contender(case, x)
    accepted, drawn = torch.tensor(verified).T if isinstance(verified, list) else verified
    tokens = torch.cat([x.tokens, x.tokens[:, :1]], 1).scatter_(1, accepted[:, None], drawn.reshape(-1, 1))
    rows = expected_rows(case, x)
    return max(chi_square(tokens[accepted >= place, place], rows[place]) for place in range(DRAFTS + 1))


WAYS = {
    "batched": batched,
    "lean rows": lean_rows,
    "lean rows, searched": partial(lean_rows, draw=by_search),
    "lean batch": lean_batch,
    "lean batch, searched": partial(lean_batch, draw=by_search),
    "lean filtered": lean_filtered,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_has_the_targets_distribution(name, dtype, monkeypatch):
    """In every place; and what it was handed stays as it is, or others would be timed on something else."""
    torch.manual_seed(3)
    monkeypatch.setitem(FILTERS, "top_k", 3)
    filtered = name == "lean filtered"
    case = Case(VOCAB, DRAFTS, REQUESTS, str(dtype), "statistics", filtered=filtered)
    x = equal_requests(dtype, **(FILTERS if filtered else {}))
    before = [value.clone() for value in vars(x).values()]
    assert set(lean_batch(case, x)[0].tolist()) == set(range(DRAFTS + 1))
    assert far_apart(WAYS[name], case, x) < FAR
    assert all(map(torch.equal, vars(x).values(), before))


def test_a_way_with_another_distribution_is_found(monkeypatch):
    """The likeliest token in place of a drawn one; the draft's statistics without its temperature."""
    torch.manual_seed(3)
    case, x = Case(VOCAB, DRAFTS, REQUESTS, "float32", "statistics"), equal_requests(torch.float32)
    assert far_apart(partial(lean_rows, draw=lambda weights: weights.argmax(-1, keepdim=True)), case, x) > FAR
    x.stats[..., 0] = 1.0
    assert far_apart(lean_batch, case, x) > FAR


@pytest.mark.parametrize("draw", [by_race, by_search])
def test_ids_without_mass_are_not_drawn(draw, monkeypatch):
    """Whatever the random number is, its ends among them."""
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    for uniform in (0.0, 0.3, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand_like", lambda like, value=uniform: torch.full_like(like, value))
        assert int(draw(weights.clone())) in (1, 3)
        assert draw(weights.repeat(4, 1)).shape == (4, 1)


def test_whatever_is_lean_counts():
    """The names by which the leanest is looked for are those of the contenders."""
    chosen = contenders(Case(VOCAB, DRAFTS, 1, "float32", "statistics"))
    chosen |= contenders(Case(VOCAB, DRAFTS, 1, "float32", "statistics", filtered=True))
    assert {name for name in chosen if name.startswith("lean")} == set(run.LEAN)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]])
@pytest.mark.parametrize("buffers", [1, 2, 3, 4, 7])
def test_buffers_are_as_cold_for_all(names, buffers):
    """Each is used again when all the others were; each contender comes to all of them equally often, and first."""
    laps = [list(islice(run.turns(names, buffers), lap * buffers, (lap + 1) * buffers)) for lap in range(len(names))]
    assert all([index for _, index in lap] == list(range(buffers)) for lap in laps)
    assert set(Counter(turn for lap in laps for turn in lap).values()) == {1}
    assert sorted(lap[0][0] for lap in laps) == names
    assert all(one != other for lap in laps for (one, _), (other, _) in pairwise(lap))


def test_a_machine_that_is_not_quiet_is_told(monkeypatch, capsys):
    """Once, of the worst case; calls that read more are no sign of it."""
    quiet = {100: [1.0, 1.1, 1.0, 1.2], 900: [9.0, 9.5, 9.2, 9.9]}
    assert run.spread(quiet) < run.QUIET < run.spread({**quiet, 900: [9.0, 19.0, 9.2, 25.0]})
    times = {name: {"p50": 1.0} for name in ("fused", "stream")}
    row = {"vocab": 7, "num_draft": 2, "batch": 1, "dtype": "float32", "rule": "token", "filtered": False,
           "kind": "dense", "microseconds": times, "over_streaming": 1.0}  # fmt: skip
    monkeypatch.setattr(run, "cases", lambda quick: [Case(7, 2, 1, "float32", "dense")] * 3)
    for spreads, said in (([1.2, 1.4, 1.1], ""), ([1.2, 2.6, 1.9], "must be at most 1.5, got 2.6 at a case")):
        given = iter(spreads)
        monkeypatch.setattr(
            run, "measure", lambda case, given=given: {**row, "case": "a case", "stream_spread": next(given)}
        )
        run.main(None, True, Console(quiet=True))
        err = capsys.readouterr().err
        assert err.count("warning: the machine was not quiet") == bool(said)
        assert said in err


# --- trees ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_trees_lie_in_buffers_that_are_cold(monkeypatch, dtype):
    """By what `walk` reads of them, the rule that reads the least; what is timed goes over all of them, and ends with
    the last one, so that the next begins with one that is cold."""
    monkeypatch.setattr(trees, "VOCAB", 64)
    monkeypatch.setattr(trees, "COLD_BYTES", 20_000)
    monkeypatch.setattr(trees, "inputs", partial(trees.inputs, vocab=64))
    buffers, total = trees.cold_buffers(2, dtype)
    read = [int((trees.fused(x, "walk").num_accepted + 1).sum()) * 64 * x.target.element_size() for x in buffers]
    assert sum(read[:-1]) < trees.COLD_BYTES <= sum(read) == total
    monkeypatch.setattr(trees, "MOST_BYTES", 2 * buffers[0].target.nbytes)  # there is a draft beside each target
    fewer, total = trees.cold_buffers(2, dtype)
    assert (len(fewer), total) == (1, read[0])
    seen = []
    monkeypatch.setattr(trees, "timed", lambda call, count, rounds: seen.append((count, rounds)) or 1.0)
    row = trees.verified(buffers, "walk")
    assert set(row["microseconds"]) == {"fused", "stream", *trees.LEAN}
    assert all(count == len(buffers) for count, _ in seen)
    assert all(rounds >= trees.ROUNDS and rounds % count == 0 for count, rounds in seen[:2])


@pytest.mark.parametrize("draw", trees.LEAN.values(), ids=trees.LEAN)
@pytest.mark.parametrize("rule", ["walk", "recursive"])
def test_lean_trees_have_the_targets_distribution(monkeypatch, rule, draw):
    """Behind the root and behind its first child, of requests whose rows are the same."""
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda batch, *shape, **on: 0.4 * randn(1, *shape, **on).repeat(batch, 1, 1))
    monkeypatch.setattr(trees, "PARENTS", (-1, 0, 0, 0, 1, 1, 2))
    torch.manual_seed(3)
    x = trees.inputs(REQUESTS, "float32", 1, VOCAB)
    before = x.target.clone()
    ends = trees.lean(x, rule, draw)
    assert torch.equal(x.target, before)
    behind: dict[int, list[int]] = {0: [], 1: []}
    for tokens, (node, token) in zip(x.tokens.tolist(), ends, strict=True):
        while node >= 0:
            if node in behind:
                behind[node].append(token)
            node, token = trees.PARENTS[node], tokens[node]
    for node, found in behind.items():
        assert len(found) > REQUESTS // 10
        assert chi_square(torch.tensor(found), torch.softmax(x.target[0, node].double() / TEMPERATURE, -1)) < FAR


def test_keys_and_values_are_compared(monkeypatch):
    assert next(trees.keys_and_values())["cache"] == "warm"
    monkeypatch.setattr(trees, "compact_kv", lambda *_: None)
    with pytest.raises(RuntimeError, match="compact_kv: PyTorch disagrees"):
        next(trees.keys_and_values())


@pytest.mark.parametrize("vocab", [7, 1000, 151_936])
def test_every_id_with_mass_comes_by_its_own_uniforms(monkeypatch, vocab):
    """Also where a float32 of all that came before has no digits left for it: the uniform in the middle of its part of
    the distribution draws it."""
    weights = (3 * torch.randn(vocab, generator=torch.Generator().manual_seed(1))).exp()
    weights[::3] = 0
    sums = weights.double().cumsum(0)
    ids = torch.randint(0, vocab, (50,), generator=torch.Generator().manual_seed(2)) // 3 * 3 + 1
    ids = torch.cat([ids[ids < vocab], weights.nonzero()[[0, -1], 0]])
    middles = ((sums[ids] - weights[ids].double() / 2) / sums[-1])[:, None]
    monkeypatch.setattr(torch, "rand_like", lambda like: 1 - middles)
    assert by_search(weights.expand(len(ids), -1)).flatten().tolist() == ids.tolist()
