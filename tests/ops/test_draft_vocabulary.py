"""Drafters with fewer ids than their targets: the same bits as with rows scattered to the target's ids, exact
distributions, and what is refused."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
from backends import on_device
from distributions import RACE_CELLS, F, logits_of, probs_of, seeds_by_cell
from forms import some
from processes import run_python

from specdec_kernels import DraftVocabulary, oracle, sample, sample_children, selftest, verify_chain, verify_tree
from specdec_kernels.contract import Purpose
from specdec_kernels.ops.tree_rules import CHILDREN
from specdec_kernels.selftest.common import BATCH


def scattered(rows: torch.Tensor, vocabulary: DraftVocabulary) -> torch.Tensor:
    full = rows.new_full((*rows.shape[:-1], vocabulary.vocab_size), -torch.inf)
    full[..., vocabulary.draft_to_target] = rows
    return full


def random_vocabulary(vocab: int, index: int) -> DraftVocabulary:
    """Ids in any order: few of them, half, or all."""
    count = max(1, (vocab // 16, vocab // 2, vocab)[index % 3])
    return DraftVocabulary(torch.randperm(vocab, generator=torch.Generator().manual_seed(index))[:count], vocab)


def assert_equal(one: Any, other: Any) -> None:
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


# --- bit for bit as scattered rows ------------------------------------------------------------------------------------


def reduced(case: Any, index: int) -> tuple[DraftVocabulary, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A vocabulary for the drafts of a case, its rows of logits, a token drawn of each, and stats if the case has
    some."""
    vocabulary = random_vocabulary(case.target.shape[-1], index)
    logits = case.draft[..., vocabulary.draft_to_target].contiguous()
    rows = logits.shape[1]
    heat = case.options["draft_temperature"]
    heat = case.options["temperature"] if heat is None else heat
    keys = {name: case.options[name].repeat_interleave(rows) for name in ("seed", "position")}
    drawn = sample(
        logits.flatten(0, 1),
        **keys,
        row=torch.arange(rows).repeat(BATCH),
        temperature=heat.repeat_interleave(rows),
        coupled=case.options["rule"] == "coupled",
        draft_to_target=vocabulary,
        backend="reference",
    )
    stats = None if case.stats is None else drawn.stats.unflatten(0, (BATCH, rows))
    return vocabulary, logits, drawn.tokens.unflatten(0, (BATCH, rows)), stats


#: That are compared with scattered rows.
CASES = some(48, 72)


def compare_with_the_oracle(report: selftest.Report, index: int, tokens: torch.Tensor, expected: Any) -> None:
    """Each request's tokens with what the oracle says of it."""
    for request, row in enumerate(tokens.tolist()):
        said = expected(request)
        report.compare(
            f"case {index} request {request}", row, said.tokens + [-1] * (len(row) - len(said.tokens)), said.margin
        )


def test_a_chain_is_verified_as_with_scattered_rows(backend, few):
    """And as the oracle says. Every third batch has drafts outside of the drafter's vocabulary."""
    verify, report = on_device(verify_chain, backend), selftest.Report()
    for index, case in enumerate(selftest.chains.cases(few(CASES), (2, 129, 300 if backend == "triton" else 1000))):
        if case.draft is None or case.draft.shape[1] == 0:
            continue
        vocabulary, logits, drawn, stats = reduced(case, index)
        tokens = case.tokens if index % 3 == 0 else torch.where(case.tokens < 0, -1, drawn)
        got = verify(case.target, tokens, logits, stats, **case.options, draft_to_target=vocabulary)
        want = verify(case.target, tokens, scattered(logits, vocabulary), stats, **case.options)
        assert_equal(got, want)
        if index < few(CASES) // 2:  # given as ids
            by_ids = vocabulary.draft_to_target.int()
            assert_equal(got, verify(case.target, tokens, logits, stats, **case.options, draft_to_target=by_ids))
        full = selftest.chains.Case(case.target, tokens, scattered(logits, vocabulary), stats, case.options)
        compare_with_the_oracle(report, index, got.tokens, partial(selftest.chains.expected, full))
    assert not report.wrong
    assert report.requests > 8 * report.too_close


@pytest.mark.interpreted(None)  # its launches are cut small, with such rows, in tests/triton_kernels
@pytest.mark.parametrize("rule", ["token", "block"])
def test_long_rows_are_measured_as_scattered_ones(backend, rule):
    """Of more ids than a warp measures at a time, at addresses that whole rows are loaded from."""
    verify, vocabulary = on_device(verify_chain, backend), random_vocabulary(3000, 1)
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(16, 3, 3000, generator=generator)
    logits = target[:, :2, vocabulary.draft_to_target] + torch.randn(16, 2, 1500, generator=generator)
    keys: dict[str, Any] = {"seed": torch.arange(16), "position": 5}
    drawn = [sample(logits[:, i], row=i, **keys, draft_to_target=vocabulary, backend="reference") for i in (0, 1)]
    given = {**keys, "draft_temperature": 1.0, "rule": rule, "logprobs": True}
    tokens = torch.stack([each.tokens for each in drawn], 1)
    got = verify(target, tokens, logits, **given, draft_to_target=vocabulary)
    assert_equal(got, verify(target, tokens, scattered(logits, vocabulary), **given))


def test_a_tree_is_verified_as_with_scattered_rows(backend, few):
    verify, report = on_device(verify_tree, backend), selftest.Report()
    for index, case in enumerate(selftest.trees.cases(few(CASES), (2, 12, 130, 300 if backend == "triton" else 1000))):
        if case.draft is None or case.options["rule"] in ("walk", "coupled"):
            continue
        vocabulary, logits, drawn, stats = reduced(case, index)
        children = drawn.gather(1, case.parents.clamp(min=0))  # the same of all children of a node
        tokens = torch.where(torch.rand(drawn.shape, generator=torch.Generator().manual_seed(index)) < 0.5, children,
                             case.tokens.long())  # fmt: skip
        given = (case.target, tokens, case.parents)
        got = verify(*given, logits, stats, **case.options, draft_to_target=vocabulary)
        assert_equal(got, verify(*given, scattered(logits, vocabulary), stats, **case.options))
        full = selftest.trees.Case(*given, scattered(logits, vocabulary), stats, case.options)
        compare_with_the_oracle(report, index, got.tokens, partial(selftest.trees.expected, full))
    assert not report.wrong
    assert report.requests > 8 * report.too_close


def test_the_oracle_reads_reduced_rows_as_scattered_ones():
    vocabulary = DraftVocabulary(torch.tensor([6, 0, 3]), 8)
    generator = torch.Generator().manual_seed(3)
    target, draft = torch.randn(3, 8, generator=generator), torch.randn(2, 3, generator=generator)
    full = scattered(draft, vocabulary).numpy()
    ids = vocabulary.draft_to_target.tolist()
    for seed in range(20):
        noise, rows, drafts = oracle.Noise(seed, 5), target.numpy(), [6, 3]
        got = oracle.verify_chain(rows, drafts, draft.numpy(), None, noise, draft_to_target=ids)
        assert got == oracle.verify_chain(rows, drafts, full, None, noise)
        pair = torch.cat([draft, draft[:1]]).numpy(), torch.cat([torch.from_numpy(full), torch.from_numpy(full[:1])])
        tree = (rows, [0, *drafts], [-1, 0, 0])
        got = oracle.verify_tree(*tree, pair[0], None, noise, rule=1, draft_to_target=ids)  # type: ignore[arg-type]
        assert got == oracle.verify_tree(*tree, pair[1].numpy(), None, noise, rule=1)  # type: ignore[arg-type]


@pytest.mark.interpreted(kept=lambda parameters: parameters["dtype"] == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_drawn_is_what_scattered_rows_give(backend, few, dtype):
    """The noise is that of the target's ids, filters and masks and penalties are of them: all of it bit for bit."""
    draw, choose = on_device(sample, backend), on_device(sample_children, backend)
    for index, case in enumerate(selftest.chains.cases(few(24), (3, 129, 1000, 5000))):
        rows, options = case.first_rows()
        vocabulary = random_vocabulary(rows.shape[-1], index)
        logits = rows[..., vocabulary.draft_to_target].to(dtype)
        options["row"] = index
        full = scattered(logits, vocabulary)
        for coupled in (False, True):
            got = draw(logits, **options, coupled=coupled, draft_to_target=vocabulary)
            assert_equal(got, draw(full, **options, coupled=coupled))
            assert torch.isin(got.tokens, vocabulary.draft_to_target).all() or got.stats.isnan().any()
        method = CHILDREN[index % len(CHILDREN)]
        got = choose(logits, 3, method, **options, draft_to_target=vocabulary)
        assert_equal(got, choose(full, 3, method, **options))


SCATTERED = """
import torch
from specdec_kernels import DraftVocabulary, ops, sample
print(ops.BACKENDS["cpu"].detail)
generator = torch.Generator().manual_seed(1)
vocabulary = DraftVocabulary(torch.randperm(1003, generator=generator)[:400], 1003)
rows, named = 3 * torch.randn(20, 400, generator=generator), {"seed": torch.arange(20), "position": 5, "top_k": 50}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    full = torch.full((20, 1003), -torch.inf, dtype=dtype)
    full[:, vocabulary.draft_to_target] = rows.to(dtype)
    reduced = sample(rows.to(dtype), **named, draft_to_target=vocabulary, backend="cpu")
    assert all(map(torch.equal, reduced, sample(full, **named, backend="cpu")))
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_reads_the_same_columns(isa):
    result = run_python("-c", SCATTERED, SPECDEC_CPU_ISA=isa)
    if result.stdout.strip() == "C++, none":
        pytest.skip(f"this machine has no {isa}")
    assert (result.returncode, result.stdout.strip()) == (0, f"C++, {isa}"), result.stderr


def test_coupled_draws_of_a_reduced_vocabulary_meet_the_targets(backend, few):
    """Where draft and target have the same probabilities for what both know, most coupled drafts are the target's."""
    draw, verify = on_device(sample, backend), on_device(verify_chain, backend)
    count, vocabulary = few(200), DraftVocabulary(torch.randperm(60)[:40], 60)
    target = torch.randn(count, 2, 60, generator=torch.Generator().manual_seed(4))
    target[..., vocabulary.target_to_draft < 0] -= 6.0  # the tail has little
    key: dict[str, Any] = {"seed": torch.arange(count), "position": 9}
    drafted = draw(target[:, 0, vocabulary.draft_to_target], **key, coupled=True, draft_to_target=vocabulary)
    verified = verify(target, drafted.tokens[:, None], **key, rule="coupled")
    assert (verified.num_accepted == 1).float().mean() > 0.9


# --- exact distributions ----------------------------------------------------------------------------------------------

POSITION = 11
#: Of three ids the drafter knows two, in falling order, with probabilities of 3/4 and 1/4. What it never accepts of the
#: target's is the third, whose mass a rejection leaves: chances are thirds, and no race but the bonus token's is held.
KNOWN = DraftVocabulary(torch.tensor([1, 0]), 3)
DRAFT = (1, 3)
ROOT = (1, 1, 2)
LEAF = {0: (1, 3, 0), 1: (3, 1, 0)}


@cache
def all_cells(nodes: int) -> list[int]:
    """Seeds for each combination of the numbers that nodes are accepted and bonus tokens drawn by."""
    acceptances = [([(Purpose.ACCEPT, POSITION, node)], 12) for node in range(nodes)]
    races = [(Purpose.TARGET, POSITION, row) for row in range(1, nodes + 1)]
    return seeds_by_cell([*acceptances, (races, RACE_CELLS)])


def two_tokens(verified: Any, masses: list[Any]) -> Any:
    """The distribution of the first two tokens: continued by the target where there is but one."""
    distribution: oracle.SequenceDistribution = {}
    for row, mass in zip(verified.tokens.tolist(), masses, strict=True):
        first, second = row[:2]
        others = {second: F(1)} if second >= 0 else dict(enumerate(probs_of(LEAF.get(first, ROOT))))
        for token, chance in others.items():
            distribution[first, token] = distribution.get((first, token), F(0)) + mass * chance
    return distribution


def exact() -> Any:
    return oracle.target_distribution(lambda prefix: probs_of(LEAF.get(prefix[0], ROOT) if prefix else ROOT), 1)


@pytest.mark.interpreted(kept=lambda parameters: False)  # there the bits of scattered rows have to do
@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_distribution_of_a_chain_is_exact(backend, rule, stats):
    verify, cells = on_device(verify_chain, backend), all_cells(1)
    drafts = [(token, seed) for token in (0, 1) for seed in cells]
    masses = [probs_of(DRAFT)[token] / len(cells) for token, _ in drafts]
    target = torch.stack([torch.stack([logits_of(ROOT, False), logits_of(LEAF[token], False)]) for token, _ in drafts])
    logits = logits_of(DRAFT, False)[KNOWN.draft_to_target].expand(len(drafts), 1, 2)
    verified = verify(
        target,
        torch.tensor([[token] for token, _ in drafts]),
        logits,
        torch.tensor([1.0, -torch.inf, 0.0]).expand(len(drafts), 1, 3) if stats else None,
        draft_temperature=None if stats else 1.0,
        draft_to_target=KNOWN,
        seed=torch.tensor([seed for _, seed in drafts]),
        position=POSITION,
        rule=rule,
    )
    assert oracle.total_variation(two_tokens(verified, masses), exact()) == 0


# 2,304 trees take the interpreter minutes.
@pytest.mark.interpreted(None)
@pytest.mark.parametrize("siblings", ["iid", "without_replacement"])
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_the_distribution_of_a_tree_is_exact(backend, rule, siblings):
    """Two children of the root."""
    verify, cells = on_device(verify_tree, backend), all_cells(2)
    distribution = probs_of(DRAFT)
    pairs = {
        pair: distribution[pair[0]] * (distribution[pair[1]] if siblings == "iid" else int(pair[0] != pair[1]))
        for pair in product((0, 1), repeat=2)
    }
    nodes = [(pair, seed) for pair, mass in pairs.items() if mass for seed in cells]
    masses = [pairs[pair] / len(cells) for pair, _ in nodes]
    logits = logits_of(DRAFT, False)[KNOWN.draft_to_target].expand(len(nodes), 3, 2)
    verified = verify(
        torch.stack(
            [
                torch.stack([logits_of(distribution, False) for distribution in (ROOT, *(LEAF[t] for t in p))])
                for p, _ in nodes
            ]
        ),
        torch.tensor([(0, *pair) for pair, _ in nodes]),
        torch.tensor([[-1, 0, 0]]).expand(len(nodes), 3),
        logits,
        draft_temperature=1.0,
        draft_to_target=KNOWN.draft_to_target,
        siblings=siblings,
        seed=torch.tensor([seed for _, seed in nodes]),
        position=POSITION,
        rule=rule,
    )
    assert oracle.total_variation(two_tokens(verified, masses), exact()) == 0


def test_a_rule_that_forgets_the_tail_is_wrong():
    """In fractions: a residual over the drafter's ids alone."""
    draft = [F(1, 4), F(3, 4), F(0)]

    def target(prefix: tuple[int, ...]) -> Any:
        return probs_of(LEAF.get(prefix[0], ROOT) if prefix else ROOT)

    distribution = oracle.chain_distribution(target, lambda prefix: draft, 1)
    assert oracle.total_variation(distribution, exact()) == 0
    residual = lambda p, q: max(F(0), p - q) if q else F(0)  # noqa: E731
    wrong = oracle.chain_distribution(target, lambda prefix: draft, 1, residual=residual)
    assert oracle.total_variation(wrong, exact()) > F(1, 5)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([3, 0, 7]), ValueError, r"draft_to_target must be in \[0, 7\), got 7 at \[2\]"),
        (torch.tensor([3, -1, 9]), ValueError, r"draft_to_target must be in \[0, 7\), got -1 at \[1\]"),
        (torch.tensor([3, 0, 4, 0, 9]), ValueError, r"draft_to_target must be distinct, got 0 at \[3\]"),
        (torch.tensor([3.0]), TypeError, r"draft_to_target must be int64 or int32 \[Vd\], got float32 \[1\]"),
        (torch.tensor([[3]]), ValueError, r"draft_to_target must have shape \[Vd\] = \[\*\], got int64 \[1, 1\]"),
        (torch.tensor([]).long(), ValueError, r"draft_to_target must have at least one id, got int64 \[0\]"),
    ],
)
def test_ids_that_are_none_of_the_targets(ids, error, message):
    with pytest.raises(error, match=message):
        DraftVocabulary(ids, 7)
    rows = torch.zeros(1, 1, len(ids)), None
    with pytest.raises(error, match=message):
        verify_chain(
            torch.zeros(1, 2, 7), torch.tensor([[3]]), *rows, draft_temperature=1.0, draft_to_target=ids, seed=1,
            position=1,
        )  # fmt: skip


@pytest.mark.parametrize("size", [0, 1.0])
def test_a_target_without_a_number_of_ids(size):
    with pytest.raises((TypeError, ValueError), match="vocab_size must be"):
        DraftVocabulary(torch.tensor([0]), size)


THREE = DraftVocabulary(torch.tensor([3, 0, 6]), 7)
MISMATCHED = [
    ({"draft_logits": None}, ValueError, "draft_to_target needs the draft_logits that it describes"),
    ({"draft_to_target": [3, 0, 6]}, TypeError, r"draft_to_target must be int64 \[Vd\] or a DraftVocabulary"),
    (
        {"draft_to_target": DraftVocabulary(torch.tensor([3, 0, 6]), 9)},
        ValueError,
        "draft_to_target must be of the V = 7 ids of target_logits, got a DraftVocabulary of 3 of 9 ids",
    ),
    (
        {"draft_logits": torch.zeros(1, 2, 7)},
        ValueError,
        r"draft_logits must have a column for each of the Vd = 3 ids of draft_to_target, got float32 \[1, 2, 7\]",
    ),
    ({"draft_logits": torch.zeros(1, 1, 3)}, ValueError, r"draft_logits must have shape \[B, ., Vd\] = \[1, 2, \*\]"),
    ({"draft_logits": torch.zeros(1, 2, 3).long()}, TypeError, r"draft_logits must be float32 .* \[B, ., Vd\]"),
    ({"draft_to_target": None}, ValueError, r"draft_logits must have shape \[B, ., V\] = \[1, 2, 7\], got float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISMATCHED)
def test_a_vocabulary_that_does_not_fit(change, error, message):
    given: dict[str, Any] = {"draft_logits": torch.zeros(1, 2, 3), "draft_to_target": THREE, **change}
    named: dict[str, Any] = {"seed": 1, "position": 1, **given}
    if named["draft_logits"] is not None:
        named["draft_temperature"] = 1.0
    with pytest.raises(error, match=message):
        verify_chain(torch.zeros(1, 3, 7), torch.tensor([[3, 0]]), **named)
    with pytest.raises(error, match=message):
        verify_tree(
            torch.zeros(1, 2, 7), torch.tensor([[0, 3]]), torch.tensor([[-1, 0]]), siblings="iid", rule="recursive",
            **named,
        )  # fmt: skip


@pytest.mark.parametrize("op", [sample, lambda rows, **named: sample_children(rows, 2, **named)])
def test_rows_that_a_vocabulary_does_not_fit(op):
    key: dict[str, Any] = {"seed": 1, "position": 1}
    with pytest.raises(ValueError, match="logits must have a column for each of the Vd = 3 ids"):
        op(torch.zeros(1, 7), draft_to_target=THREE, **key)
    with pytest.raises(
        TypeError, match="draft_to_target must be a DraftVocabulary, which says how many ids the target"
    ):
        op(torch.zeros(1, 3), draft_to_target=THREE.draft_to_target, **key)
    wide = DraftVocabulary(torch.tensor([3, 0, 6]), 40)
    with pytest.raises(ValueError, match=r"bitmask must have shape \[R, ceil\(V/32\)\] = \[1, 2\], got int32 \[1, 1\]"):
        op(torch.zeros(1, 3), draft_to_target=wide, bitmask=torch.ones(1, 1, dtype=torch.int32), **key)


def test_compiled_without_a_break():
    vocabulary = random_vocabulary(50, 1)

    def step(target: torch.Tensor, draft: torch.Tensor, seed: torch.Tensor) -> Any:
        drawn = sample(draft[:, 0], seed=seed, position=9, draft_to_target=vocabulary)
        return verify_chain(
            target,
            drawn.tokens[:, None],
            draft,
            drawn.stats[:, None],
            draft_to_target=vocabulary,
            seed=seed,
            position=9,
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for index in range(2):
        generator = torch.Generator().manual_seed(index)
        given = torch.randn(2, 2, 50, generator=generator), torch.randn(2, 1, 25, generator=generator)
        seed = torch.tensor([index, 7])
        assert_equal(compiled(*given, seed), step(*given, seed))


def test_a_vocabulary_keeps_its_ids():
    ids = torch.tensor([1, 2])
    vocabulary = DraftVocabulary(ids, 4)
    ids.fill_(0)
    assert vocabulary.draft_to_target.tolist() == [1, 2]


def test_a_vocabulary_can_move():
    moved = THREE.to("meta")
    assert moved.target_to_draft.is_meta
    assert (len(moved), moved.vocab_size, repr(moved)) == (3, 7, "DraftVocabulary of 3 of 7 ids")
    assert THREE.to(torch.device("meta")) is moved, "a graph of its kernels is captured for it, once"
    assert moved.to("cpu") is THREE
