"""Verifying trees: exact distributions, wrong rules that are seen, chains as trees, and what engines get wrong."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from backends import on_device
from distributions import (
    ENDING,
    PAIRS,
    QUARTERS,
    RACE_CELLS,
    TWELFTHS,
    distance_from_target,
    logits_of,
    probs_of,
    seeds_by_cell,
    table,
)

from specdec_kernels import oracle, sample_children, selftest, verify_chain, verify_tree
from specdec_kernels.contract import TILE, Purpose
from specdec_kernels.ops import BACKENDS, tree_rules

F = Fraction
KINDS = ("iid", "without_replacement", "top")
RULES = ("walk", "recursive", "traversal")


@pytest.fixture
def verify(backend):
    return on_device(verify_tree, backend)


@pytest.fixture
def children(backend):
    return on_device(sample_children, backend)


# --- the distribution of the rules, in fractions ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", ["random", "zeros", "equal", "disjoint", "deep"])
def test_every_rule_is_exact(pair, kind, rule):
    target, draft, _ = (table(3, 1), table(3, 2), 3) if pair == "deep" else PAIRS[pair]()
    for widths in ((3, 3, 3),) if pair == "deep" else ((3, 2), (1, 1, 1), (2,)):
        distribution, _ = oracle.tree_distribution(target, draft, widths, kind, rule)
        assert oracle.total_variation(distribution, oracle.target_distribution(target, len(widths))) == 0


def test_traversal_accepts_no_less_than_recursive_and_both_are_the_chains_rules():
    target, draft, _ = PAIRS["random"]()
    for widths in ((3, 2), (2, 2, 2), (1, 1, 1)):
        for kind in KINDS:
            accepted = {rule: oracle.tree_distribution(target, draft, widths, kind, rule)[1] for rule in RULES}
            assert accepted["traversal"] >= accepted["recursive"] >= accepted["walk"]
    distribution, accepted = oracle.tree_distribution(target, draft, (1, 1, 1), "iid", "traversal")
    assert (distribution, accepted) == oracle.block_distribution(target, draft, 3)
    chain = oracle.chain_distribution(target, draft, 3)
    assert oracle.tree_distribution(target, draft, (1, 1, 1), "iid", "recursive")[0] == chain


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize(
    ("mutant", "kind"),
    [({"updated": False}, "iid"), ({"updated": False}, "without_replacement"), ({"merged": True}, "iid")],
)
def test_wrong_rules_have_a_wrong_distribution(rule, mutant, kind):
    """Case 12: siblings against the target as it was; equal siblings tested once."""
    target, draft, _ = PAIRS["random"]()
    distribution, _ = oracle.tree_distribution(target, draft, (3, 2), kind, rule, **mutant)
    assert oracle.total_variation(distribution, oracle.target_distribution(target, 2)) > F(1, 200)


# --- the distribution of the backends ---------------------------------------------------------------------------------

POSITION = 11
#: Root with two children, each with one of its own, in the order they are drawn in.
DEEP = (-1, 0, 0, 1, 2)
FLAT = DEEP[:3]
#: Chances of this tree of point masses are multiples of a twelfth.
CERTAIN = (0, 0, 1, 1, 0)


def path(parents, tokens, node):
    return () if node == 0 else (*path(parents, tokens, parents[node]), tokens[node])


def drafts_of(parents, siblings, weights):
    """Every assignment of tokens to the nodes, with its probability. Of two tokens a second child is the other one, or
    drawn anew."""
    distribution = probs_of(weights)
    for tokens in product(range(2), repeat=len(parents) - 1):
        mass = F(1)
        for node, token in enumerate(tokens, 1):
            if node == 2 and siblings == "without_replacement":
                mass *= int(token != tokens[0])
            else:
                mass *= distribution[token]
        if mass:
            yield (0, *tokens), mass


@cache
def cells(rule, parents, certain=False):
    """Seeds for every combination of the numbers that decide. Of two tokens a rejected one leaves the other: where
    nodes are tested, races are held at the leaves alone, and one of them at most; none under ``FLAT``, which ends as
    ``ENDING`` does."""
    levels = ((0,), (1, 2), (3, 4))[: 1 + len(parents) // 2]
    races = [[(Purpose.TARGET, POSITION, node) for node in level] for level in levels]
    if rule == "coupled":
        races = [[(Purpose.COUPLED, POSITION + depth, 0)] for depth in range(len(levels))]
    nodes = {0: 4, 2: 3, 3: 3} if certain else dict.fromkeys(range(len(parents) - 1), 4)
    streams = [([(Purpose.ACCEPT, POSITION, node)], count) for node, count in nodes.items()]
    by_races = [(numbers, RACE_CELLS) for numbers in races]
    if rule in ("walk", "coupled"):
        return seeds_by_cell(by_races)
    return seeds_by_cell(streams if parents == FLAT else [*streams, by_races[-1]])


def distance_by_counting(verify, rule, siblings, kind, parents=DEEP, drawn=(2, 2)):
    """How far the distribution of sequences as deep as the tree and one further is from the target's: every tree of
    drafts, every cell, continued by the target."""
    certain = (kind, rule) == ("point mass", "traversal") and parents == DEEP
    weights, seeds = TWELFTHS if certain else QUARTERS, cells(rule, parents, certain)
    if parents == FLAT and rule in ("recursive", "traversal"):
        weights = ENDING
    masses, tokens, rows = [], [], []
    for drafts, mass in [(CERTAIN, F(1))] if certain else drafts_of(parents, siblings, drawn):
        rows.append(torch.stack([logits_of(weights[path(parents, drafts, n)], False) for n in range(len(parents))]))
        tokens.append(drafts)
        masses.append(mass / len(seeds))
    count, batch, nodes = len(seeds), len(masses), len(parents)
    length = 1 + len(path(parents, parents, nodes - 1))
    dense = torch.full((batch * count, nodes, 2), 0.5).log()
    stats = torch.tensor([1.0, -torch.inf, 0.0]).expand(batch * count, nodes, 3)
    verified = verify(
        torch.stack(rows).repeat_interleave(count, 0),
        torch.tensor(tokens).repeat_interleave(count, 0),
        torch.tensor([parents]).expand(batch * count, nodes),
        None if kind == "point mass" else dense,
        stats if kind == "statistics" else None,
        draft_temperature=1.0 if kind == "dense" else None,
        seed=torch.tensor(seeds).repeat(batch),
        position=POSITION,
        rule=rule,
        siblings=siblings,
    )
    return distance_from_target(verified.tokens, [mass for mass in masses for _ in range(count)], weights, length)


@pytest.fixture
def parents(backend):
    """The Triton interpreter takes minutes for the deeper tree."""
    return FLAT if backend == "triton" and BACKENDS[backend].device == "cpu" else DEEP


#: The rules walk and coupled do not read what drafts were drawn from.
RULES_AND_DRAFTS = [
    *product(("recursive", "traversal"), ("dense", "statistics", "point mass"), ("iid", "without_replacement")),
    *product(("walk", "coupled"), ["point mass"], ("iid", "without_replacement")),
]


#: Triton draws the oracle's tokens, decision by decision (test_backends.py); with these the distribution is counted.
COUNTED = {("recursive", "dense"), ("traversal", "statistics"), ("walk", "point mass")}


def one_of_each(parameters):
    return parameters["siblings"] == "without_replacement" and (parameters["rule"], parameters["kind"]) in COUNTED


@pytest.mark.interpreted(kept=one_of_each)
@pytest.mark.parametrize(("rule", "kind", "siblings"), RULES_AND_DRAFTS)
def test_the_distribution_is_exact(verify, parents, rule, kind, siblings):
    assert distance_by_counting(verify, rule, siblings, kind, parents) == 0


@pytest.mark.interpreted(kept=lambda parameters: False)
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("siblings", ["iid", "without_replacement"])
def test_a_wrong_draft_distribution_is_seen(verify, parents, rule, siblings):
    """Case 3: children from another distribution than the declared one change the text."""
    assert distance_by_counting(verify, rule, siblings, "dense", parents, drawn=(1, 3)) > F(1, 50)


# --- a chain is a tree ------------------------------------------------------------------------------------------------


@cache
def chains():
    return list(selftest.chains.cases(120, (2, 129, 1000)))


AS_TREES = {("recursive", "statistics"), ("traversal", "dense"), ("coupled", "point mass")}


@pytest.mark.interpreted(kept=lambda parameters: (parameters["tree_rule"], parameters["kind"]) in AS_TREES)
@pytest.mark.parametrize(
    ("tree_rule", "rule"), [("recursive", "token"), ("traversal", "block"), ("coupled", "coupled")]
)
@pytest.mark.parametrize("kind", selftest.DRAFT_KINDS)
def test_a_chain_as_a_tree_gives_the_chains_tokens(backend, device, tree_rule, rule, kind):
    """Bit for bit, whatever is in the rows; log-probabilities as well."""
    compared = 0
    for case in chains():
        if case.options["rule"] != rule or case.options["cu_rows"] is not None or case.options["num_draft"] is not None:
            continue
        if (case.stats is not None, case.draft is not None) != (kind == "statistics", kind != "point mass"):
            continue
        (target, tokens, draft, stats), options = case.arguments(device)
        batch, longest = tokens.shape
        live = (tokens >= 0).long().cumprod(1).bool()
        pad = torch.nn.functional.pad
        tree_tokens = pad(tokens.long().masked_fill(~live, 0), (1, 0))
        parents = pad(torch.where(live, torch.arange(longest, device=device), -1), (1, 0), value=-1)
        for name in ("cu_rows", "num_draft", "count_independent", "rule"):
            options.pop(name)
        chain = verify_chain(target, tokens, draft, stats, rule=rule, backend=backend, **options)
        tree = verify_tree(
            target,
            tree_tokens,
            parents,
            None if draft is None else pad(draft, (0, 0, 0, 1)),
            None if stats is None else pad(stats, (0, 0, 0, 1)),
            rule=tree_rule,
            siblings="iid" if batch + longest & 1 else "without_replacement",
            backend=backend,
            **options,
        )
        for name in ("tokens", "num_accepted", "valid", "logprobs", "raw_logprobs"):
            torch.testing.assert_close(getattr(tree, name), getattr(chain, name), rtol=0, atol=0, equal_nan=True)
        compared += 1
        if compared == 2 and backend == "triton":
            break  # the interpreter takes a second for each
    assert compared >= 2


# --- drawing children -------------------------------------------------------------------------------------------------


def test_without_replacement_the_children_have_the_distribution_of_sequential_draws(children, backend):
    """First children over many seeds, by a test of their counts; no token twice."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 100 if backend == "triton" else 2000
    drawn = children(probs.log().expand(count, 4), 3, "without_replacement", seed=torch.arange(count), position=3)
    assert all(len(set(row)) == 3 for row in drawn.tokens.tolist())
    for first in range(4):
        rows = drawn.tokens[drawn.tokens[:, 0] == first]
        assert abs(len(rows) / count - probs[first]) < 5 * (probs[first] / count) ** 0.5
        for second in set(range(4)) - {first}:
            want = probs[second] / (1 - probs[first])
            share = float((rows[:, 1] == second).float().mean())
            assert abs(share - want) < 5 * (want / len(rows)) ** 0.5


def test_children_end_where_their_distribution_does(children):
    row = torch.tensor([[1.0, -torch.inf, 3.0, -torch.inf]])
    for how in ("top", "without_replacement", "race"):
        drawn = children(row, 4, how, seed=5, position=1)
        assert sorted(drawn.tokens[0, :2].tolist()) == [0, 2]
        assert drawn.tokens[0, 2:].tolist() == [-1, -1]
        assert torch.isnan(drawn.logprobs[0, 2:]).all()
    assert (children(row, 4, "iid", seed=5, position=1).tokens >= 0).all()
    assert children(row, 3, "top", seed=5, position=1, temperature=0.0).tokens.tolist() == [[2, -1, -1]]


def test_top_is_torchs_topk_and_the_first_race_is_the_coupled_draw(children, backend, device):
    logits = torch.randn(4, 3 * TILE + 5, generator=torch.Generator().manual_seed(1))
    top = children(logits, 7, "top", seed=1, position=1)
    assert torch.equal(top.tokens, logits.topk(7).indices)
    torch.testing.assert_close(top.logprobs, logits.log_softmax(-1).topk(7).values)
    from specdec_kernels import sample

    raced = children(logits, 7, "race", seed=3, position=20, row=2)
    target = sample(logits.to(device), seed=3, position=20, row=2, coupled=True, backend=backend).tokens.cpu()
    assert torch.equal(raced.tokens[:, 0], target)
    assert all(len(set(row)) == 7 for row in raced.tokens.tolist())


def test_the_first_child_is_what_sample_draws(children, backend, device):
    from specdec_kernels import sample

    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    for how in ("iid", "without_replacement"):
        drawn = children(logits, 3, how, seed=3, position=20, row=6)
        one = sample(logits.to(device), seed=3, position=20, row=6, backend=backend)
        assert torch.equal(drawn.tokens[:, 0], one.tokens.cpu())
        torch.testing.assert_close(drawn.stats, one.stats.cpu())


# --- what engines get wrong -------------------------------------------------------------------------------------------


def test_coupled_gives_the_same_text_with_any_tree(verify):
    """Case 25: whatever is drafted, the first token is the same."""
    logits = torch.randn(1, 6, 200, generator=torch.Generator().manual_seed(2))
    none = torch.tensor([[-1, -1, -1, -1, -1, -1]])
    for seed in range(6):
        alone = verify(logits, torch.zeros(1, 6, dtype=torch.int64), none, seed=seed, position=9, rule="coupled")
        first = int(alone.tokens[0, 0])
        tokens = torch.tensor([[0, 5, first, 7, 8, 9]])
        tree = verify(logits, tokens, torch.tensor([[-1, 0, 0, 1, 2, 2]]), seed=seed, position=9, rule="coupled")
        assert tree.tokens[0, 0] == first
        assert tree.nodes[0, :2].tolist() == [0, 2]


@pytest.mark.parametrize("rule", [*RULES, "coupled"])
def test_thirty_three_siblings(verify, rule):
    """Case 29: as many siblings as a word has bits, and one more; the last one is the target's."""
    nodes, vocab = 34, 50
    target = torch.zeros(1, nodes, vocab)
    target[0, 0, 40] = target[0, 33, 2] = 90.0
    tokens = torch.tensor([[0, *range(32), 40]])
    result = verify(target, tokens, torch.tensor([[-1] + [0] * 33]), seed=1, position=4, rule=rule)
    assert result.tokens[0, :3].tolist() == [40, 2, -1]
    assert result.nodes[0, :3].tolist() == [0, 33, -1]


def test_siblings_that_take_nearly_all_of_their_draft(verify):
    """What two of them leave is 4e-8 of it: one minus what they took would have no digits of that left."""
    batch = 16
    draft = torch.full((batch, 4, 200), -torch.inf)
    draft[..., :4] = torch.tensor([0.0, -0.4, -17.0, -17.5])
    target = torch.full((batch, 4, 200), -torch.inf)
    target[..., 2:4] = 0.0
    tree = torch.tensor([[0, 0, 1, 2]]).expand(batch, 4), torch.tensor([[-1, 0, 0, 0]]).expand(batch, 4)
    keys = {"seed": torch.arange(batch), "position": torch.arange(batch) * 3}
    drafts = {"draft_logits": draft, "draft_temperature": 1.0, "siblings": "without_replacement"}
    result = verify(target, *tree, **keys, **drafts, rule="recursive")
    # The third child is what is left of the draft by 0.62 and of the target by 0.5: it is accepted by 0.8.
    passed = [oracle.Noise(seed, 3 * seed).uniform(2) < 0.5 * (1 + np.exp(-0.5)) for seed in range(batch)]
    assert 0 < sum(passed) < batch
    assert result.num_accepted.tolist() == passed


@pytest.mark.parametrize("rule", [*RULES, "coupled"])
def test_a_row_that_is_not_usable_ends_its_path_alone(verify, rule):
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(2, 4, 130, generator=generator)
    target[:, 0, 7] = 60.0  # the first child is accepted
    parents = torch.tensor([[-1, 0, 1, 1]]).expand(2, 4)
    tokens = torch.tensor([[0, 7, 1, 2]]).expand(2, 4)
    clean = verify(target, tokens, parents, seed=3, position=8, rule=rule)
    broken = target.clone()
    broken[0, 1, 3] = torch.nan
    broken[0, 1, 90] = 30.0
    result = verify(broken, tokens, parents, seed=3, position=8, rule=rule)
    assert result.tokens[0].tolist() == [7, 90, -1, -1]
    assert result.valid.tolist() == [False, True]
    assert torch.equal(result.tokens[1], clean.tokens[1])


def test_requests_do_not_see_each_other(verify):
    """Case 22: alone, in a batch, permuted: the same."""
    cases = list(selftest.trees.cases(12, (300,)))[:12]
    for case in cases[2:12:3]:
        positional, named = case.arguments()
        for name in ("penalties", "logit_bias"):
            named[name] = None
        together = verify(*positional, **named)
        for request in range(3):
            one = [None if x is None else x[request : request + 1] for x in positional]
            own = {k: v[request : request + 1] if isinstance(v, torch.Tensor) else v for k, v in named.items()}
            alone = verify(*one, **own)
            assert torch.equal(alone.tokens[0], together.tokens[request])


@pytest.mark.parametrize("rule", [*RULES, "coupled"])
def test_a_padded_vocabulary_changes_nothing(backend, verify, children, rule):
    """Case 23, on one device: padding of -inf never wins, and ties go to the lowest id."""
    widths = (300, 384) if backend == "triton" else (300, 384, 1000)
    generator = torch.Generator().manual_seed(3)
    target, draft = torch.randn(2, 4, 6, 300, generator=generator) * 2
    tokens, parents = (
        torch.randint(0, 300, (4, 6), generator=generator),
        torch.tensor([[-1, 0, 0, 1, 1, 2]]).expand(4, 6),
    )
    target.scatter_(2, tokens[..., None], 6.0)
    results = []
    for width in widths:
        wide = [torch.nn.functional.pad(x, (0, width - 300), value=-torch.inf) for x in (target, draft)]
        results.append(
            verify(
                wide[0],
                tokens,
                parents,
                wide[1],
                draft_temperature=1.0,
                siblings="iid",
                seed=torch.arange(4),
                position=7,
                rule=rule,
            ).tokens
        )
        for how in ("top", "without_replacement", "race"):
            results[-1] = torch.cat([results[-1], children(wide[0][:, 0], 4, how, seed=5, position=7).tokens], 1)
    assert all(torch.equal(result, results[0]) for result in results[1:])
    flat = torch.zeros(1, 300)
    assert children(flat, 5, "top", seed=1, position=1).tokens.tolist() == [[0, 1, 2, 3, 4]]


def test_inputs_are_not_changed(verify):
    for case in selftest.trees.cases(4, (130,)):
        positional, named = case.arguments()
        kept = [None if x is None else x.clone() for x in positional]
        verify(*positional, **named)
        for before, after in zip(kept, positional, strict=True):
            assert before is None or torch.equal(before.nan_to_num(0), after.nan_to_num(0))


def test_the_suite_notices_a_wrong_tree(monkeypatch):
    """The comparison with the oracle can fail: siblings taken for drawn the other way."""
    real = tree_rules.verify_tree

    def wrong(*positional, siblings, **named):
        other = {"iid": "without_replacement", "without_replacement": "iid"}[siblings]
        return real(*positional, siblings=other, **named)

    monkeypatch.setattr(selftest.trees, "verify_tree", wrong)
    report = selftest.Report()
    for index, case in enumerate(selftest.trees.cases(300)):
        selftest.trees.check_verified(report, case, index, "cpu", "cpu")
    assert report.wrong


def test_opcheck():
    """Case 33."""
    for index, case in enumerate(selftest.trees.cases(8, (40,))):
        positional, named = case.arguments()
        if torch.isnan(positional[0]).any():
            continue
        captured = {}

        def capture(result, backend, arguments, captured=captured):
            captured["given"] = arguments
            return result(*torch.ops.specdec.verify_tree.default(*arguments))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tree_rules, "try_fast_path", lambda *_: None)
            patch.setattr(tree_rules, "call", capture)
            named["logprobs"] = False  # opcheck takes nan for a difference
            verify_tree(*positional, **named)
        torch.library.opcheck(torch.ops.specdec.verify_tree.default, captured["given"])
        two = torch.tensor([1, 2])
        given = (torch.randn(2, 9), None, two, two, two, None, 0.7, 0, 1.0, 0.0, *(None,) * 5, 3, index % 4)
        torch.library.opcheck(torch.ops.specdec.sample_children.default, given)


def test_compiled_without_a_break():
    def step(target, draft, parents, seed):
        drawn = sample_children(draft[:, 0], 2, seed=seed, position=9)
        tokens = torch.cat([drawn.tokens[:, :1] * 0, drawn.tokens], 1)
        return verify_tree(
            target,
            tokens,
            parents,
            draft,
            draft_temperature=1.0,
            siblings="without_replacement",
            seed=seed,
            position=9,
            rule="traversal",
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    parents = torch.tensor([[-1, 0, 0]] * 2)
    for index in range(3):
        target, draft = torch.randn(2, 2, 3, 50, generator=torch.Generator().manual_seed(index))
        given = (target, draft, parents, torch.tensor([index, 7]))
        for got, want in zip(compiled(*given), step(*given), strict=True):
            assert torch.equal(got, want)


def test_the_margin_of_the_oracle_is_not_a_way_out():
    """Few decisions are too close to call, and trees are long enough to decide anything."""
    report, accepted = selftest.Report(), []
    for index, case in enumerate(selftest.trees.cases(60)):
        selftest.trees.check_verified(report, case, index, "reference", "cpu")
        accepted += [selftest.trees.expected(case, request).num_accepted for request in range(3)]
    assert report.too_close <= report.requests // 50
    assert np.mean(accepted) > 0.5
    assert max(accepted) >= 3
