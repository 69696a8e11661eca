"""The loop's sampling parameters, rules and adaptive draft lengths, on small random models."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from decoding import NAMES, OPTIONS, PROMPTS, drafters, only_even
from tiny import Altered, tiny

from specdec_kernels.decode import Draft, Sampling, Scheduler, TransformersTarget, generate
from specdec_kernels.decode.drafters import AdaptiveDrafter, CallableDrafter, NGramDrafter
from specdec_kernels.decode.drafters import adaptive as adaptive_module
from specdec_kernels.decode.drafters.adaptive import ExpectedAcceptance
from specdec_kernels.decode.drafters.costs import BentCost, Costs, LinearCost, RowCosts
from specdec_kernels.decode.drafts import Step


@pytest.fixture(scope="module")
def target_model():
    return tiny(1, layers=2)


def decode(model, name=None, prompts=PROMPTS, **options):
    drafter = None if name is None else drafters(model)[name]
    options = {"num_draft": 4, "max_new_tokens": 16, "seed": 3, "temperature": 0.0, **options}
    return [r.tokens for r in generate(TransformersTarget(model), prompts, drafter=drafter, **options)]


@pytest.mark.brief(
    kept=lambda parameters: (
        parameters["options"] == "filters" or parameters["name"] in ("lookup", "model", "feature tree")
    )
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_coupled_text_is_the_same_with_any_drafter(target_model, name, options):
    """Case 25, with everything that can be done to a distribution; and each request alone gives what it gave in the
    batch."""
    named = {"rule": "coupled", **OPTIONS[options]}
    plain = decode(target_model, **named)
    assert decode(target_model, name, **named) == plain
    first = {key: value[0] if isinstance(value, list) else value for key, value in named.items()}
    assert decode(target_model, name, PROMPTS[:1], **first) == plain[:1]


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("name", ["self", "lookup", "adaptive", "tree", "medusa"])
def test_a_grammar_holds_for_every_token(target_model, name, rule):
    for tokens in decode(
        target_model, name, rule=rule, temperature=1.5, grammar=[only_even, None, only_even, only_even]
    )[::2]:
        assert all(token % 2 == 0 for token in tokens)
        assert all(token != 0 for token in tokens[::2])


def test_a_grammar_gets_the_accepted_and_drafted_prefix(target_model):
    """Never a text that it did not allow, which could break it."""
    asked = []

    def grammar(tokens):
        asked.append(list(tokens))
        return only_even(tokens)

    drafter = CallableDrafter(lambda history, count: [2, 4, 5, 6][:count])  # the third is not allowed
    target = TransformersTarget(target_model)
    (result,) = generate(
        target, [[1]], drafter=drafter, num_draft=4, max_new_tokens=9, temperature=0.0, grammar=grammar
    )
    assert all(token % 2 == 0 for prefix in asked for token in prefix)
    assert [] in asked
    assert [2, 4] in asked
    assert all(result.tokens[: len(prefix)] == prefix or prefix[-1] in (2, 4) for prefix in asked)


def test_greedy_penalties_against_a_plain_loop(target_model):
    prompt, tokens = PROMPTS[0], []
    for _ in range(16):
        logits = target_model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].detach()
        for token in {*prompt, *tokens}:
            logits[token] = logits[token] / 1.2 if logits[token] > 0 else logits[token] * 1.2
        for token in set(tokens):
            logits[token] -= 0.4 * tokens.count(token) + 0.1
        tokens.append(int(logits.argmax()))
    for name in ("self", "lookup", "model", "tree", "tree of self"):
        penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.1}
        assert decode(target_model, name, [prompt], **penalties) == [tokens]


@torch.no_grad()
def test_logprobs_are_the_targets(target_model):
    results = generate(
        TransformersTarget(target_model), PROMPTS, drafter=drafters(target_model)["model"], max_new_tokens=12,
        temperature=0.7, top_k=5, seed=1, logprobs=True,
    )  # fmt: skip
    for prompt, result in zip(PROMPTS, results, strict=True):
        logits = target_model(torch.tensor([prompt + result.tokens])).logits[0, len(prompt) - 1 : -1].double() / 0.7
        kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf).log_softmax(-1)
        want = kept.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs, dtype=torch.float64), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heat": 1}, TypeError, "has no argument 'heat': its arguments are target, prompts, .*temperature"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\] \(1: off\), got 0.0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be finite and positive"),
        ({"min_p": torch.tensor([0.1])}, TypeError, "min_p must be a number, got float32"),
        ({"logit_bias": 3}, TypeError, "logit_bias must map token ids to numbers, got 3"),
        (
            {"logit_bias": {5: 1e39}},
            ValueError,
            r"logit_bias must be finite in float32, or -inf \(never\), got 1e\+39 for 5",
        ),
        (
            {"logit_bias": [{5: -(10**400)}, {}, {}, {}]},
            ValueError,
            "logit_bias must be finite in .*, got -1000.* for 5",
        ),
        ({"logit_bias": {99: 1.0}}, ValueError, r"logit_bias must hold token ids in \[0, 11\), got 99"),
        ({"grammar": "even"}, TypeError, "grammar must be a function of the tokens generated, got 'even'"),
        ({"rule": "all"}, ValueError, "rule must be one of"),
    ],
)
def test_bad_sampling_parameters(target_model, options, error, message):
    with pytest.raises(error, match=message):
        decode(target_model, **options)


@pytest.mark.parametrize(
    ("odd", "same"),
    [
        ({"top_k": 1 << 63}, {}),
        ({"top_k": 10**400}, {}),
        ({"top_p": 1e-50}, {"top_k": 1}),
        ({"top_p": 1e-40}, {"top_k": 1}),
        ({"min_p": 1e-50}, {}),
        ({"temperature": 1e-50}, {"temperature": 0.0}),
        ({"presence_penalty": 1e-50}, {}),
        ({"logit_bias": {5: 10**30}}, {"logit_bias": {5: 1e30}}),
        ({"logit_bias": {5: -(10**30)}}, {"logit_bias": {5: -math.inf}}),
    ],
)
def test_numbers_that_float32_rounds_mean_the_same(target_model, odd, same):
    """Alone, in lists, and beside a request that is decoded already, whose text stays the same."""
    usual = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "logit_bias": {}}
    one, other = ({"prompts": [prompt], "rule": "coupled"} for prompt in PROMPTS[:2])
    want = decode(target_model, **one, **{**usual, **same})
    assert decode(target_model, **one, **{**usual, **odd}) == want
    lists = {name: [odd.get(name, value), value] for name, value in usual.items()}
    together = decode(target_model, prompts=PROMPTS[:2], rule="coupled", **lists)
    assert together == want + decode(target_model, **other, **usual)
    scheduler = Scheduler(TransformersTarget(target_model), NGramDrafter(1), rule="coupled")
    options = {"max_new_tokens": 16, "seed": 3}
    good = scheduler.submit(PROMPTS[1], sampling=Sampling(**usual), **options)
    scheduler.step()
    late = scheduler.submit(PROMPTS[0], sampling=Sampling(**{**usual, **odd}), **options)
    assert [late.result().tokens, good.result().tokens] == together


def test_a_biased_row_that_is_no_distribution_ends_its_request(target_model):
    """Also where the bias is an int of more than 64 bits."""
    never = dict.fromkeys(range(11), -math.inf)
    (result,) = generate(TransformersTarget(target_model), [[1]], logit_bias={**never, 3: -(10**38), 4: 10**38},
                         grammar=lambda history: torch.tensor([1], dtype=torch.int32))  # fmt: skip
    assert (result.tokens, result.finished) == ([], "invalid")


def test_numbers_that_float32_cannot_hold_are_refused_as_they_come():
    for name in ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        for value in (1e39, 10**400):
            with pytest.raises(ValueError, match=f"{name} must be finite"):
                Sampling(**{name: value})
    for value in (1e39, -1e39, 10**400):
        with pytest.raises(ValueError, match=r"logit_bias must be finite in float32, or -inf \(never\), got"):
            Sampling(logit_bias={5: value})


# --- adaptive draft lengths -------------------------------------------------------------------------------------------


def test_costs_are_a_line_through_the_measurements():
    cost = LinearCost(slope=0.0, origin=1.0)
    assert not cost.known
    cost.add(1, 0.030)
    assert cost.at(1) == cost.at(5) == pytest.approx(0.030)
    for _ in range(40):
        for rows in (1, 3, 5):
            cost.add(rows, 0.028 + 0.002 * rows)
    assert cost.at(1) == pytest.approx(0.030, rel=0.01)
    assert cost.at(7) == pytest.approx(0.042, rel=0.02)
    cost.add(3, 9.0)  # something else ran
    assert cost.at(3) < 0.036


def test_a_bent_cost_learns_what_is_no_line():
    """As measured in float32 on two cores; a place where nothing was measured is on the line."""
    seconds = {1: 0.070, 2: 0.115, 3: 0.145, 5: 0.105, 7: 0.110}
    cost, line = BentCost(slope=0.02, origin=1.0), LinearCost(slope=0.02, origin=1.0)
    for i in range(200):
        rows = list(seconds)[i % 5]
        for each in (cost, line):
            each.add(rows, seconds[rows])
    assert {rows: cost.at(rows) for rows in seconds} == pytest.approx(seconds, rel=0.1)
    assert line.at(1) > 0.08  # the control
    assert cost.at(4) == pytest.approx(line.at(4))
    for _ in range(200):  # the machine is twice as slow, and only two places are seen to be
        cost.add(5, 2 * seconds[5])
        cost.add(7, 2 * seconds[7])
    assert cost.at(1) == pytest.approx(2 * seconds[1], rel=0.25)


def test_steps_without_drafts_are_timed_now_and_then(monkeypatch):
    """Else nothing tells whether drafting pays."""
    monkeypatch.setattr(adaptive_module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    drafter = AdaptiveDrafter(CallableDrafter(lambda history, count: [1] * count))
    session = drafter.begin([[1]], None)
    asked = []
    every = Costs.PLAIN_EVERY + 1
    for position in range(2 * every + 10):
        asked.append(session.propose(step_of([4], position)).tokens.shape[1])
        drafter.costs._since -= 1.0  # every pass takes a second, so drafts that are all right pay
        session.commit([[1] * (asked[-1] + 1)], None)
    assert [i for i, count in enumerate(asked) if count == 0] == [0, every, 2 * every]


def test_gains_follow_what_was_accepted():
    acceptance = ExpectedAcceptance()
    hopes = [gain for gain, _ in acceptance.gains(3)]
    assert hopes == pytest.approx([ExpectedAcceptance.HOPE**depth for depth in (1, 2, 3)])
    for time in range(60):
        # The first two always, the third never, what lies beside it every other time; of the fourth nothing is known.
        acceptance.add(4, 2, siblings=3, beside=time % 2 == 0)
    gains, beside = zip(*acceptance.gains(4), strict=True)
    assert beside[0] < 0.05
    assert beside[2] == pytest.approx(0.5, abs=0.1)
    assert gains[0] > 0.95
    assert gains[1] > 0.9
    assert gains[2] < 0.1
    assert all(a >= b for a, b in pairwise(gains))


def test_what_lies_behind_a_rejected_draft_says_nothing():
    told, silent = ExpectedAcceptance(), ExpectedAcceptance()
    for accepted in (0, 1, 0, 2):
        told.add(4, accepted)
        silent.add(accepted + 1, accepted)
    assert told.gains(4) == silent.gains(4)


def step_of(num_draft, position=0):
    one = torch.ones(len(num_draft), dtype=torch.int64)
    return Step(num_draft, one, one * position, 1.0)


def adaptive(batch=1, drafting=(0.001, 0.001), scoring=(0.03, 0.001), siblings=0):
    """A drafter that knows what K drafts and R rows cost, (first, every further one), and a stream of it."""
    drafter = AdaptiveDrafter(CallableDrafter(lambda history, count: [1] * count))
    drafter.siblings = siblings
    for _ in range(50):
        for count in (1, 2, 4):
            drafter.drafting.add(count, drafting[0] + drafting[1] * (count - 1))
            drafter.costs.step(batch).add(count, scoring[0] + scoring[1] * (count - 1))
    drafter.costs._steps = dict.fromkeys(range(1, batch + 1), 0)
    return drafter, drafter.begin([[1]] * batch, None)


def teach(session, request, accepted, proposed=8):
    for _ in range(60):
        session.acceptance[request].add(proposed, accepted)


def best(made, most):
    drafter, session = made
    return drafter.best(most, session.acceptance)


def test_the_choice_follows_gain_and_cost():
    eager, wary, dear = adaptive(), adaptive(), adaptive(drafting=(0.05, 0.05))
    teach(eager[1], 0, accepted=8)
    assert best(eager, [8]) == [(8, 0)]
    teach(wary[1], 0, accepted=0)
    assert best(wary, [8]) == [(0, 0)]
    teach(dear[1], 0, accepted=1)
    assert best(dear, [8]) == [(0, 0)]
    two = adaptive(batch=2, scoring=(0.03, 0.003))
    teach(two[1], 0, accepted=0)
    teach(two[1], 1, accepted=3)
    assert best(two, [8, 8]) == [(3, 0), (3, 0)]
    assert best(two, [8, 1]) == [(1, 0), (1, 0)]
    assert best(two, [0, 8]) == [(0, 0), (3, 0)]
    two[1].select([1])
    for _ in range(50):
        for rows in (1, 2, 4):
            two[0].costs.step(1).add(rows, 0.03 + 0.003 * (rows - 1))
    assert best(two, [8]) == [(3, 0)]


def test_rows_that_another_request_wants_cost_nothing():
    """The pass is as wide as its longest chain: one that gains little comes along, which alone would not pay."""
    alone, beside = adaptive(scoring=(0.03, 0.01)), adaptive(batch=2, scoring=(0.03, 0.01))
    for made, request in ((alone, 0), (beside, 1)):
        for time in range(60):
            made[1].acceptance[request].add(1, time % 4 == 0)
    teach(beside[1], 0, accepted=8)
    assert best(alone, [1]) == [(0, 0)]
    assert best(beside, [8, 1]) == [(8, 0), (1, 0)]


def test_costs_are_those_of_batches_of_a_size():
    """Rows are worth less the more requests there are: what pays for one does not for four."""
    made = adaptive(scoring=(0.03, 0.001))
    for rows in (1, 2, 4):
        for _ in range(50):
            made[0].costs.step(4).add(rows, 0.03 * rows)
    session = made[0].begin([[1]] * 4, None)
    for slot in range(4):
        teach(session, slot, accepted=1, proposed=2)
    teach(made[1], 0, accepted=1, proposed=2)
    assert best(made, [2]) == [(1, 0)]
    assert made[0].best([2] * 4, session.acceptance) == [(0, 0)] * 4
    # One that drafts beside others without a drafter, whose tokens wait for its drafts too.
    for rows in (1, 2, 4):
        made[0].costs.step(3).add(rows, 0.03 + 0.001 * (rows - 1))
    assert made[0].best([2], made[1].acceptance, 4) == [(0, 0)]
    assert made[0].best([2], made[1].acceptance, 3) == [(1, 0)]
    assert made[0].costs.plain_is_due(3)
    assert not made[0].costs.plain_is_due(1)


def test_siblings_lie_where_they_pay():
    """Those of the first draft, which is rejected half the time for what lies beside it, and of no other."""
    made = adaptive(scoring=(0.03, 0.001), siblings=1)
    for time in range(60):
        rejected = time % 2 == 0
        made[1].acceptance[0].add(2, 0 if rejected else 2, siblings=2, beside=rejected)
    assert best(made, [8]) == [(7, 1)]
    assert best(made, [2]) == [(2, 0)]
    assert best(made, [1]) == [(1, 0)]


def test_no_more_is_drafted_than_is_wanted():
    """Not even in the first step, of which nothing is known."""
    asked = []

    def noted(draft, step):
        asked.append((list(step.num_draft), list(step.length)))
        return draft

    inner = Altered(CallableDrafter(lambda history, count: [1] * count), noted)
    inner.siblings = 1
    drafter = AdaptiveDrafter(inner)
    drafter.costs._steps = {4: 0}
    drafter.begin([[1]] * 4, None).propose(step_of([0, 1, 4, 5]))
    assert asked == [([0, 1, 4, 5], [0, 1, 2, 3])]


def test_no_drafts_are_tried_again_now_and_then():
    drafter, session = adaptive()
    teach(session, 0, accepted=0, proposed=1)
    asked = []
    for position in range(300):
        draft = session.propose(step_of([4], position))
        asked.append(draft.tokens.shape[1])
        drafter.costs._pass = (0, 0)  # no clock in a test
        session.commit([[0]], None)
    assert set(asked) == {0, 1}
    tried = [i for i, count in enumerate(asked) if count]
    gaps = [b - a for a, b in pairwise(tried)]
    assert tried[0] == AdaptiveDrafter.PATIENCE[0]
    assert gaps[:3] == [17, 33, 65]
    assert max(gaps) == 1 + AdaptiveDrafter.PATIENCE[1]


def test_assumed_costs_choose_by_the_text_alone(monkeypatch):
    """The same at every time of every clock; a row costs as much as it is said to, for each request."""
    clock = itertools.count(step=1000.0)
    monkeypatch.setattr(adaptive_module, "time", SimpleNamespace(perf_counter=clock.__next__))
    found = []
    for row, batch in ((0.0, 1), (0.02, 1), (0.02, 4), (0.3, 4), (0.8, 1)):

        def rate(drafts, row=row, batch=batch):
            tokens = batch * sum(ExpectedAcceptance.HOPE**depth for depth in range(drafts + 1))
            return tokens / (1 + row * (batch * (1 + drafts) - 1))

        wanted = max(range(9), key=rate)
        found.append(wanted)
        drafter = AdaptiveDrafter(CallableDrafter(lambda history, count: [1] * count), RowCosts(row))
        session = drafter.begin([[1]] * batch, None)
        for _ in range(3):
            draft = session.propose(step_of([8] * batch))
            assert draft.tokens.shape[1] == wanted
            drafter.costs.scored()  # teaches nothing
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (8, 0)


def test_requests_that_have_no_drafts_gain_by_none():
    """A batch that ends with its slowest request is drafted for where all of them gain; one whose requests are replaced
    as soon as a row pays by what it brings one of them."""
    histories, limits = [[1, 2, 3, 1, 2], [1], [2], [3]], [8] * 4
    assert NGramDrafter().begin(histories, None).available([8, 8, 0, 8]) == [8, 0, 0, 0]

    def drafted(drafter, prompts):
        return drafter.begin(prompts, None).propose(step_of(limits[: len(prompts)])).counts

    ends = AdaptiveDrafter(NGramDrafter(), RowCosts(0.05))
    assert drafted(ends, histories) == [0, 0, 0, 0]
    every, alone = drafted(ends, [histories[0]] * 4), drafted(ends, histories[:1])
    assert 0 < every[0] == every[3] < alone[0]
    goes_on = AdaptiveDrafter(NGramDrafter())
    goes_on.drafting.add(1, 1e-6)
    goes_on.costs._steps = {4: 0}
    for rows in (1, 2, 4, 8):
        goes_on.costs.step(4).add(rows, 0.03 + 0.002 * rows)
    assert drafted(goes_on, histories)[0] > 0


def test_a_drafter_that_is_not_asked_learns_nothing():
    """Under another drafter that speaks first, commits go by without a proposal."""
    _, session = adaptive()
    before = session.acceptance[0].gains(2)
    session.commit([[1, 2, 3]], None)
    assert session.acceptance[0].gains(2) == before
    assert isinstance(session.propose(step_of([2])), Draft)


def test_sampling_defaults_change_nothing():
    assert Sampling() == Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    assert not Sampling().penalised
    assert Sampling(presence_penalty=0.1).penalised
