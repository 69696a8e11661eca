"""Single decisions that a small change would get wrong, each on every backend; beside the oracle, whose random cases
seldom meet them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from processes import run_python

from specdec_kernels import LogitBias, compact_kv, oracle, sample, verify_chain, verify_tree
from specdec_kernels.contract import Children, Purpose, Rule, TreeRule
from specdec_kernels.ops import BACKENDS
from specdec_kernels.oracle.distributions import race, two_level_race

INF, NAN = math.inf, math.nan
KEYS = pytest.mark.parametrize("key", [1, torch.ones(2, dtype=torch.int64)], ids=["number", "tensor"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [1, torch.ones(1, dtype=torch.int64)], ids=["number", "tensor"])
def test_as_many_rows_as_the_counter_has(key):
    """A row has 16 bits: 65,535 drafts and the bonus, and no more."""
    verify_chain(torch.zeros(1, 65_536, 1), torch.full((1, 65_535), -1), seed=key, position=key)
    with pytest.raises(ValueError, match=r"draft_tokens must have fewer than 65536 drafts, got int64 \[1, 65536\]"):
        verify_chain(torch.zeros(1, 65_537, 1), torch.full((1, 65_536), -1), seed=key, position=key)


@KEYS
@pytest.mark.parametrize(("offsets", "rows"), [([0, 4, 8], 7), ([0, 5, 8], 8), ([0, 3, 8], 8), ([1, 4, 8], 8)])
def test_rows_that_are_not_there(key, offsets, rows):
    """Nor more rows of a request than drafts and one."""
    given = {"seed": key, "position": key, "cu_rows": torch.tensor(offsets)}
    with pytest.raises(ValueError, match=r"cu_rows must ascend from 0 to at most \d in steps of 1 to 4, got"):
        verify_chain(torch.zeros(rows, 5), torch.zeros(2, 3, dtype=torch.int64), **given)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("seed", 1 << 63, ValueError, r"seed must be in \[-2\^63, 2\^63\), got 9223372036854775808"),
        ("seed", -(1 << 63) - 1, ValueError, r"seed must be in \[-2\^63, 2\^63\), got -9223372036854775809"),
        ("seed", 1.0, TypeError, r"seed must be int64 \[B\], got 1.0"),
        ("seed", None, TypeError, r"seed must be int64 \[B\], got None"),
        ("seed", True, TypeError, r"seed must be int64 \[B\], got True"),
        ("position", 1 << 64, ValueError, r"position must be in \[0, 2\^63\), got 18446744073709551616"),
        ("position", -1, ValueError, r"position must be in \[0, 2\^63\), got -1"),
        ("draft_tokens", torch.tensor([[0, 5]]), ValueError, r"draft_tokens must be -1 or in \[0, 5\), got 5 at"),
        (
            "draft_tokens",
            torch.tensor([[0, 1 << 40]]),
            ValueError,
            r"draft_tokens must be -1 or in .* got 1099511627776",
        ),
        ("draft_tokens", [[0, None]], TypeError, r"draft_tokens must be int64 or int32 \[B, K\], got \[\[0, None\]\]"),
        ("draft_tokens", torch.tensor([[True, False]]), TypeError, r"draft_tokens must be int64 or int32 .* got bool"),
        ("num_draft", 1, TypeError, r"num_draft must be int64 or int32 \[B\], got 1"),
        ("logprobs", 1.5, TypeError, r"logprobs must be True or False, got 1.5"),
        ("count_independent", None, TypeError, r"count_independent must be True or False, got None"),
        ("top_k", True, TypeError, r"top_k must be an int or int64 \[B\], got True"),
        ("temperature", True, TypeError, r"temperature must be a float or float32 \[B\], got True"),
        ("temperature", 1e39, ValueError, "temperature must be finite and not negative, got 1e[+]39"),
        ("draft_temperature", 1.0, ValueError, "draft_temperature needs the draft_logits that it describes"),
    ],
)
def test_one_line_says_what_is_wrong(name, value, error, message):
    for key in (1, torch.ones(1, dtype=torch.int64)):
        given = {"draft_tokens": torch.tensor([[0, 1]]), "seed": key, "position": key, name: value}
        with pytest.raises(error, match=message) as raised:
            verify_chain(torch.zeros(1, 3, 5), **given)
        assert "\n" not in str(raised.value)


def test_rows_of_a_drafters_step():
    """Beyond 16 bits they would meet each other's noise."""
    for keys in (1, torch.tensor([1, 2])):
        for row in (torch.tensor([0, 1 << 16]), torch.tensor([-1, 0])):
            with pytest.raises(ValueError, match=r"row must be in \[0, 65536\), got"):
                sample(torch.zeros(2, 5), seed=keys, position=keys, row=row)


TARGET, DRAFT, TOKENS = torch.zeros(2, 3, 5), torch.zeros(2, 2, 5), torch.zeros(2, 2, dtype=torch.int64)


@KEYS
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_drafts_own_temperature_is_not_guessed(key, rule):
    given = {"seed": key, "position": key, "rule": rule}
    stats = torch.zeros(2, 2, 3)
    with pytest.raises(
        ValueError, match=r"draft_temperature must be given with draft_logits .* got None: .*stats of sample"
    ):
        verify_chain(TARGET, TOKENS, DRAFT, **given)
    with pytest.raises(ValueError, match=r"draft_temperature must be None with draft_stats, .* got 0.5"):
        verify_chain(TARGET, TOKENS, DRAFT, stats, **given, draft_temperature=0.5)
    for wrong in (-1.0, NAN, INF, torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="draft_temperature must be finite and not negative"):
            verify_chain(TARGET, TOKENS, DRAFT, **given, draft_temperature=wrong)
    with pytest.raises(ValueError, match=r"draft_temperature must have shape \[B\] = \[2\], got float32 \[3\]"):
        verify_chain(TARGET, TOKENS, DRAFT, **given, draft_temperature=torch.ones(3))
    with pytest.raises(TypeError, match=r"draft_temperature must be a float or float32 \[B\], got 'warm'"):
        verify_chain(TARGET, TOKENS, DRAFT, **given, draft_temperature="warm")
    verify_chain(TARGET, TOKENS, DRAFT, **(given | {"rule": "coupled"}))  # which does not read them


@KEYS
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_how_siblings_were_drawn_is_not_guessed(key, rule):
    tokens, parents = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[-1, 0, 0]] * 2)
    given = {"seed": key, "position": key, "rule": rule}
    with pytest.raises(
        ValueError, match=r"siblings must be one of .* got None: .* top-k children handed over as drawn"
    ):
        verify_tree(TARGET, tokens, parents, TARGET, draft_temperature=1.0, **given)
    with pytest.raises(ValueError, match=r"draft_temperature must be given with draft_logits"):
        verify_tree(TARGET, tokens, parents, TARGET, siblings="iid", **given)
    verify_tree(TARGET, tokens, parents, **given)  # point masses
    for walk in ("walk", "coupled"):
        verify_tree(TARGET, tokens, parents, TARGET, **(given | {"rule": walk}))


@pytest.mark.parametrize(
    ("nodes", "table", "message"),
    [
        ([[1, 2], [1, 2]], None, "nodes must ascend from 0, the root"),
        ([[0, 1], [0, 2]], [[0], [-1]], r"page_table must be in \[0, 2\), got -1 at \[1, 0\]"),
        ([[0, 1], [0, 2]], [[0], [2]], r"page_table must be in \[0, 2\), got 2 at \[1, 0\]"),
    ],
)
def test_paths_and_pages_that_are_none(nodes, table, message):
    cache = torch.zeros(2, 8, 1, 4) if table else torch.zeros(2, 1, 8, 4)
    with pytest.raises(ValueError, match=message):
        compact_kv([cache], torch.tensor(nodes), 0, page_table=None if table is None else torch.tensor(table))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize(
    ("nodes", "start", "table"),
    [
        ([[0, 2], [0, 1]], [7, 0], None),  # the second row of the first request is not there
        ([[0, 6], [0, 1]], [-3, 0], None),
        ([[0, 2], [0, 1]], [3, 0], [[0, -2], [1, 2]]),
        ([[0, 2], [0, 1]], [3, 0], [[0, 5], [1, 2]]),
        ([[0, 2], [0, 1]], [7, 0], [[0, 3], [1, 2]]),
        ([[0, 2], [0, 1]], [6, 0], None),  # where it would go to is there
        ([[0, 2], [0, 1]], [2, 0], [[0, -2], [1, 2]]),
        ([[0, 2], [0, 1]], [2, 0], [[0, 5], [1, 2]]),
    ],
)
def test_launchers_move_no_row_that_is_not_there(name, nodes, start, table):
    """Called past Python's checks, as on a GPU, where looking would synchronise."""
    if torch.cuda.is_available():
        pytest.skip("guards lie around memory of the CPU")
    shape = (4, 4, 1, 2) if table else (2, 1, 8, 2)
    memory = torch.arange(3 * 32, dtype=torch.float32)
    before, cache = memory.clone(), memory[32:64].view(shape)
    pages = None if table is None else torch.tensor(table)
    BACKENDS[name].functions["compact_kv"]([cache], torch.tensor(nodes), torch.tensor(start), pages)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("bad", [7, 300, 1 << 40, -5])
def test_launchers_take_no_id_that_is_none(name, bad):
    """On a GPU an id out of range ends a draft, and a node with one is never accepted."""
    if torch.cuda.is_available():
        pytest.skip("ids are looked for in memory of the CPU")
    target, draft = torch.zeros(1, 3, 7), torch.zeros(1, 2, 7)
    target[..., 3] = 50.0
    key = torch.tensor([1])
    processing = (None, 1.0, 0, 1.0, 0.0, None, None, None, None, None)
    for logits in (None, draft):
        for rule in range(3):
            tokens, accepted, valid, counters, *_ = BACKENDS[name].functions["verify_chain"](
                target, torch.tensor([[3, bad]]), logits, None, None, None, 1.0, key, key, None, None, *processing,
                rule, False, False, None,
            )  # fmt: skip
            assert tokens.tolist() == [[3, 3, -1]]
            assert valid.all()
            assert accepted.tolist() == [1]
            assert counters[0, 0] == 1  # it is no draft that was rejected
        for rule in range(4 if name == "triton" else 0):  # the emulation looks, as a CPU does
            tokens, _, accepted, valid, *_ = BACKENDS[name].functions["verify_tree"](
                target, torch.tensor([[0, bad, 3]]), torch.tensor([[-1, 0, 0]]), None if logits is None else target * 0,
                None, None, None, 1.0, key, key, *processing, rule, True, False,
            )  # fmt: skip
            assert tokens.tolist() == [[3, 3, -1]]
            assert valid.all()
            assert accepted.tolist() == [1]


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
@pytest.mark.parametrize("bad", [6, 1 << 30, -5, -(1 << 31)])
def test_launchers_read_no_column_that_is_none(name, bad):
    """Beside a draft row of six logits lies what would make it invalid."""
    if torch.cuda.is_available():
        pytest.skip("columns are looked for in memory of the CPU")
    generator = torch.Generator().manual_seed(1)
    target, draft = torch.randn(1, 3, 150, generator=generator), torch.full((1, 3, 18), torch.nan)[..., 6:12]
    draft.copy_(torch.randn(1, 3, 6, generator=generator))
    table = torch.full((150,), -1, dtype=torch.int32)
    table[torch.tensor([3, 77, 140, 8, 149, 9])] = torch.arange(6, dtype=torch.int32)
    wrong = table.where(table >= 0, bad)
    functions, key, row = BACKENDS[name].functions, torch.tensor([1]), torch.arange(3)
    processing = (None, 1.0, 0, 1.0, 0.0, None, None, None, None, None)
    tokens, parents = torch.tensor([[0, 3, 77]]), torch.tensor([[-1, 0, 0]])

    def results(columns):
        drafts = (draft, None, columns, None, 1.0, key, key)
        for rule in (Rule.TOKEN, Rule.BLOCK):
            rest = (None, None, *processing, rule, True, False, None)
            yield from functions["verify_chain"](target, tokens[:, 1:], draft[:, :2], *drafts[1:], *rest)
        for rule in (TreeRule.RECURSIVE, TreeRule.TRAVERSAL):
            yield from functions["verify_tree"](target, tokens, parents, *drafts, *processing, rule, False, True)
        yield from functions["sample"](draft[0], columns, row, row, row, *processing, False)
        yield from functions["sample_children"](draft[0], columns, row, row, row, *processing, 2, Children.TOP)

    expected = list(results(table))
    assert all(result.all() for result in expected if result.dtype == torch.bool), "rows are valid"
    for one, other in zip(expected, results(wrong), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


# --- what is decided --------------------------------------------------------------------------------------------------


def test_biases_of_one_id_add_up(backend):
    """Each alone would not do."""
    row = torch.zeros(1, 1, 9)
    row[..., 3] = 7.0
    bias = LogitBias(torch.tensor([[8, 8, -1]]), torch.tensor([[5.0, 5.0, 9.0]]))
    nothing = torch.empty(1, 0, dtype=torch.int64)
    for temperature in (0.0, 0.01):
        made = verify_chain(row, nothing, seed=1, position=1, temperature=temperature, logit_bias=bias, backend=backend)
        assert made.tokens.tolist() == [[8]]


def test_fewer_than_no_drafts(verify_chain):
    target = torch.zeros(2, 2, 7)
    target[..., 3] = 50.0
    made = verify_chain(target, torch.tensor([[3], [3]]), seed=1, position=1, num_draft=torch.tensor([-1, 1]))
    assert made.num_proposed.tolist() == [0, 1]
    assert made.num_accepted.tolist() == [0, 1]


#: Its first word for row 0 at position 5 is 0, so that what is left of the uniform is in the second.
SEED_OF_A_SMALL_UNIFORM = 3_635_371_279


def test_all_of_a_uniform_counts(backend):
    """Less than 2^-32, and more than what the target gives the draft."""
    uniform = oracle.Noise(SEED_OF_A_SMALL_UNIFORM, 5).uniform(0)
    assert 1e-11 < uniform < 2.0**-32
    target = torch.zeros(1, 2, 2)
    for times, accepted in ((0.1, 0), (10.0, 1)):
        target[..., 1] = math.log(uniform * times)
        for rule in ("token", "block"):
            made = verify_chain(
                target, torch.tensor([[1]]), seed=SEED_OF_A_SMALL_UNIFORM, position=5, rule=rule, backend=backend
            )
            assert int(made.num_accepted) == accepted, (times, rule)


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("kind", ["point mass", "dense"])
def test_nothing_is_read_behind_a_draft_that_the_target_excludes(verify_chain, rule, kind):
    target, draft = torch.zeros(1, 4, 300), torch.zeros(1, 3, 300)
    target[0, 0, 5] = -INF
    target[0, 1:], draft[0, 1:] = NAN, NAN
    drafts = () if kind == "point mass" else (draft,)
    heat = None if kind == "point mass" else 1.0
    made = verify_chain(
        target, torch.tensor([[5, 0, 0]]), *drafts, seed=1, position=1, rule=rule, draft_temperature=heat
    )
    assert made.valid.all()
    assert made.num_accepted.tolist() == [0]
    assert made.tokens[0, 0] != 5


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_the_row_of_a_bonus_token_is_read_where_it_is_drawn_alone(verify_chain, rule):
    target = torch.zeros(32, 3, 300)
    target[:, :2, 5] = math.log(299)  # as likely as all others
    target[:, 2] = NAN
    made = verify_chain(target, torch.full((32, 2), 5), seed=torch.arange(32), position=torch.full((32,), 1), rule=rule)
    assert sorted(set(made.num_accepted.tolist())) == [0, 1, 2]
    assert torch.equal(made.valid, made.num_accepted < 2)


def test_block_says_what_it_read_behind_the_end_of_the_path(verify_chain):
    """It reads on as long as the path may go on: a row that is not usable there is told, whatever was accepted."""
    target = torch.zeros(32, 4, 300)
    target[:, :2, 5] = math.log(299)  # as likely as all others
    target[:, 2] = NAN
    target[16:, 0, 5] = -INF  # nothing behind it is read
    made = verify_chain(
        target, torch.full((32, 3), 5), seed=torch.arange(32), position=torch.full((32,), 1), rule="block"
    )
    assert sorted(set(made.num_accepted[:16].tolist())) == [0, 1, 2]
    assert made.num_accepted[16:].tolist() == [0] * 16
    assert torch.equal(made.valid, torch.arange(32) >= 16)


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("drafted", [0, 2])
def test_a_row_of_nan_accepts_nothing(verify_chain, rule, drafted):
    """Not even id 0, nor its largest finite logit, which is what it emits."""
    target = torch.full((1, 2, 300), NAN)
    target[0, 0, drafted] = 3.0
    target[0, 1] = 0.0
    made = verify_chain(target, torch.tensor([[drafted]]), seed=1, position=1, rule=rule)
    assert made.num_accepted.tolist() == [0]
    assert made.tokens.tolist() == [[drafted, -1]]
    assert not made.valid.any()


@pytest.mark.parametrize("rule", ["token", "coupled"])
@pytest.mark.parametrize("drafted", [0, 4])
def test_a_row_that_is_not_usable_counts_for_no_draft(verify_chain, rule, drafted):
    target = torch.zeros(1, 4, 300)
    target[..., drafted] = 60.0
    target[0, 1, 7] = NAN
    made = verify_chain(target, torch.full((1, 3), drafted), seed=1, position=1, rule=rule, count_independent=True)
    assert made.num_independent.tolist() == [2]
    assert made.num_accepted.tolist() == [1]
    assert not made.valid.any()


@pytest.mark.interpreted(kept=lambda parameters: (parameters["kind"] == "dense") == (parameters["siblings"] == "iid"))
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("kind", ["statistics", "dense"])
@pytest.mark.parametrize("siblings", ["iid", "without_replacement"])
def test_a_sibling_whose_distribution_says_nothing(backend, rule, kind, siblings):
    """None is accepted then, not the first one either, which would be for sure."""
    target, draft = torch.zeros(1, 3, 300), torch.zeros(1, 3, 300)
    target[..., 5] = 60.0
    draft[0, 0, 9] = NAN
    stats = torch.tensor([1.0, -INF, math.log(300)]).expand(1, 3, 3).contiguous()
    given = {"draft_stats": stats} if kind == "statistics" else {"draft_temperature": 1.0}
    made = verify_tree(
        target, torch.tensor([[0, 5, 9]]), torch.tensor([[-1, 0, 0]]), draft, **given, siblings=siblings, seed=1,
        position=1, rule=rule, backend=backend,
    )  # fmt: skip
    assert made.num_accepted.tolist() == [0]
    assert made.tokens.tolist() == [[5, -1, -1]]  # a draw from the target
    assert not made.valid.any()


@pytest.mark.parametrize("shift", [0, 126, 500])
def test_ties_of_top_k_count_for_top_p(sample, shift):
    """Top-k keeps 3, 2, 2, 2 of these; top-p of .4 wants 3.6 of these 9, which 3 alone is not."""
    row = torch.full((1, 700), -INF)
    row[0, shift : shift + 6] = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0]).log()
    drawn = sample(row.expand(60, -1), seed=torch.arange(60), position=1, top_k=2, top_p=0.4)
    assert set((drawn.tokens - shift).tolist()) == {0, 2, 3, 4}
    want = torch.tensor([1.0, math.log(2.0), math.log(9.0)])
    torch.testing.assert_close(drawn.stats, want.expand(60, 3), rtol=0, atol=1e-5)
    few = sample(row, seed=1, position=1, top_k=2, top_p=0.33)
    torch.testing.assert_close(few.stats[0], torch.tensor([1.0, math.log(3.0), math.log(3.0)]), rtol=0, atol=1e-5)


# --- the oracle -------------------------------------------------------------------------------------------------------


def worst_moved(weights, error, winner):
    """The winner's weight less by a share, and all others more."""
    moved = weights * (1 + error)
    moved[winner] = weights[winner] * (1 - error)
    return moved


def test_a_margin_is_the_error_that_changes_the_winner():
    generator = np.random.default_rng(3)
    for _ in range(50):
        weights, times = generator.random(40) * (generator.random(40) < 0.7), generator.exponential(size=40)
        winner, margin = race(weights, weights, times)
        assert race(worst_moved(weights, margin * 0.999, winner), weights, times)[0] == winner
        assert race(worst_moved(weights, margin * 1.001, winner), weights, times)[0] != winner


def test_the_margin_of_a_draw_is_of_its_tiles_and_of_the_ids_inside():
    """Over two tiles: the smaller of what changes the tile and what changes the id."""
    generator, closer = np.random.default_rng(4), set()
    for seed in range(60):
        weights, noise = generator.random(256), oracle.Noise(seed, 1)
        token, margin = two_level_race(weights, weights, noise, Purpose.TARGET, 0)
        tiles = weights.reshape(2, 128)
        tile, by_tile = race(tiles.sum(1), tiles.sum(1), noise.exponentials(Purpose.TARGET, 0, 0, 2))
        inside, by_id = race(tiles[tile], tiles[tile], noise.exponentials(Purpose.TARGET, 1, 0, 128))
        assert token == tile * 128 + inside
        assert margin == min(by_tile, by_id)
        closer.add(by_tile < by_id)
    assert closer == {True, False}


def test_the_oracle_on_rows_with_nothing_and_with_ties():
    nothing = oracle.sample(np.full(300, -np.inf), oracle.Noise(1, 1))
    assert nothing.token == 0
    assert np.isnan([nothing.logprob, *nothing.stats]).all()
    assert nothing.margin == np.inf
    tied = np.zeros(300)
    tied[[40, 200]] = 5.0
    assert oracle.sample(tied, oracle.Noise(1, 1), sampling=oracle.Sampling(temperature=0.0)).token == 40
    cutoff, margin = oracle.filter_cutoff(tied, 1.0, oracle.Sampling(top_k=1))
    assert (cutoff, margin) == (5.0, np.inf)  # ties stay together, whatever the error
    cutoff, margin = oracle.filter_cutoff(tied, 1.0, oracle.Sampling(top_p=0.2))
    assert cutoff == 5.0
    goal = 0.2 * (2 + 298 * math.exp(-5))
    assert margin == pytest.approx((1 - goal) / (1 + goal))  # of the first of them alone: on the safe side


# --- processes --------------------------------------------------------------------------------------------------------

FORKED = """
import os, sys, torch
from specdec_kernels import sample, verify_chain
torch.set_num_threads(1)
def verified():
    target = torch.randn(4, 5, 60_000, generator=torch.Generator().manual_seed(1))
    keys = {"seed": torch.arange(4), "position": torch.arange(4)}
    return verify_chain(target, target[:, :4].argmax(-1), **keys).tokens
before = verified()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(before, verified()) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_of_one_thread_does_not_wait_for_threads_that_are_gone():
    assert run_python("-c", FORKED).returncode == 0
