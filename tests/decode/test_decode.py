"""The loop on small random models: its text, its distribution, its bookkeeping."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import Architecture, build
from decoding import (
    NAMES,
    PROMPTS,
    SHORTLIST,
    TREES,
    drafters,
    exact_distribution,
    feature_drafter,
    medusa_drafter,
    with_repeats,
)
from distributions import g_test, limit
from forms import some
from tiny import Altered, greedy, slow_greedy, tiny

from specdec_kernels.decode import Draft, Statistics, TransformersTarget, TreeDraft, generate, stream
from specdec_kernels.decode.drafters import (
    AdaptiveDrafter,
    CallableDrafter,
    DraftConfig,
    FeatureDrafter,
    FeatureModel,
    Growth,
    MergedDrafter,
    ModelDrafter,
    NGramDrafter,
    TreeDrafter,
    adaptive,  # its clock
)
from specdec_kernels.decode.drafters.autoregressive import _with_siblings
from specdec_kernels.decode.drafters.feature import FeatureSession
from specdec_kernels.decode.drafters.feature_model import REPEATS
from specdec_kernels.decode.drafters.histories import Histories
from specdec_kernels.decode.drafters.suffix_index import SuffixIndex


@pytest.fixture(scope="module")
def target_model():
    return tiny(1, layers=2)


@pytest.mark.brief(
    kept=lambda parameters: parameters["num_draft"] == 4 or parameters["name"] in ("lookup", "model", "tree")
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_draft", [0, 1, 4])
def test_greedy_text_is_the_targets(target_model, name, num_draft):
    """Ragged prompts and lengths in one batch, against a plain argmax loop."""
    lengths = [20, 7, 13, 30]
    drafter = drafters(target_model)[name]
    results = generate(
        TransformersTarget(target_model), PROMPTS, drafter=drafter, num_draft=num_draft, max_new_tokens=lengths,
        temperature=0.0,
    )  # fmt: skip
    for prompt, length, result in zip(PROMPTS, lengths, results, strict=True):
        assert result.tokens == greedy(target_model, tuple(prompt), length)
        assert result.finished == "length"


@pytest.mark.brief(
    kept=lambda parameters: parameters["rows"] == 3 or parameters["name"] in ("lookup", "model", "feature")
)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in TREES])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_windows_of_fixed_rows_give_the_same_text(target_model, name, rows):
    drafter = drafters(target_model)[name]
    for prompt in PROMPTS:
        options = {"max_new_tokens": 21, "temperature": 0.0}
        windows = generate(TransformersTarget(target_model, rows), [prompt], drafter=drafter, num_draft=5, **options)
        assert windows[0].tokens == greedy(target_model, tuple(prompt), 21)


@pytest.mark.parametrize("prompt", [PROMPTS[0], [1, 2, 3, 4, 5] * 6], ids=["in the text", "in the prompt"])
def test_a_row_has_as_many_columns_whatever_is_drafted(prompt):
    """In windows of fixed rows, also where more and more tokens are behind a sliding window, which are squeezed out."""
    model, columns, passes = build(Architecture("mistral", {"sliding_window": 8}), 1, "eager"), {}, []

    def note(_, arguments, named):
        passes.append(int(named["position_ids"][0, 0]))
        columns.setdefault(passes[-1], set()).add(named["attention_mask"].shape[-1])

    model.register_forward_pre_hook(note, with_kwargs=True)

    def decode(drafter):
        passes.clear()
        return generate(
            TransformersTarget(model, fixed_rows=4, check=False), [prompt], drafter=drafter, num_draft=3, seed=1,
            temperature=1.0, rule="coupled", max_new_tokens=40, logprobs=True,
        )[0]  # fmt: skip

    plain = decode(None)
    assert len(passes) == 41
    text = prompt + plain.tokens
    drafted = decode(CallableDrafter(lambda history, count: text[len(history) :][:count]))
    assert len(passes) == 11
    assert [counts for counts in columns.values() if len(counts) > 1] == []
    assert (drafted.tokens, drafted.logprobs) == (plain.tokens, plain.logprobs)


@pytest.mark.parametrize("name", [name for name in NAMES if "adaptive" not in name])  # which depends on the clock
def test_a_request_is_the_same_alone_and_in_a_batch(target_model, name):
    """Case 22 through the loop, at a temperature."""
    options = {"num_draft": 3, "max_new_tokens": 15, "temperature": 0.9}
    seeds = [3, 4, 5, 6]
    together = generate(
        TransformersTarget(target_model), PROMPTS, drafter=drafters(target_model)[name], seed=seeds, **options
    )
    for prompt, seed, result in zip(PROMPTS, seeds, together, strict=True):
        alone = generate(
            TransformersTarget(target_model), [prompt], drafter=drafters(target_model)[name], seed=seed, **options
        )
        assert alone[0].tokens == result.tokens


#: Kinds of drafters that no other one stands for, and each rule with what it reads.
BRIEF = {
    ("model", "token"), ("model", "block"), ("model", "coupled"), ("confident", "block"), ("lookup", "token"),
    ("feature", "token"), ("adaptive", "token"), ("tree", "token"), ("tree", "block"), ("siblings", "token"),
    ("adaptive siblings", "block"), ("medusa", "token"), ("merged tree", "token"),
}  # fmt: skip


@pytest.mark.brief(kept=lambda parameters: (parameters["kind"], parameters["rule"]) in BRIEF)
@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        *(("model", rule) for rule in ("token", "block", "coupled")),
        *((kind, "token") for kind in ("confident", "lookup", "feature", "adaptive")),
        *((kind, "block") for kind in ("confident", "adaptive")),
        ("feature", "coupled"),
        *(("tree", rule) for rule in ("token", "block", "coupled")),
        *(("siblings", rule) for rule in ("token", "block", "coupled")),
        *(("adaptive siblings", rule) for rule in ("token", "block")),
        ("medusa", "token"),
        *(("merged tree", rule) for rule in ("token", "coupled")),
    ],
)
def test_joint_distribution_over_three_steps(kind, rule, monkeypatch):
    """Four tokens, at least three steps with one draft each (two drafts under the block rule, which with one would be
    the token rule): the joint distribution of the text is the target's."""
    model = tiny(7, vocab=3, sharp=0.8)
    small, drafting = tiny(8, vocab=3, sharp=0.8), DraftConfig(min_confidence=0.4, temperature_scale=0.6)
    network = FeatureModel(model.config, torch.tensor([0, 2]))
    # What drafts and steps take is all the same to the distribution; here it lets the adaptive drafter change its mind.
    spans = random.Random(0)
    ticks = accumulate(iter(lambda: 10 ** spans.uniform(-2, 1), None))
    monkeypatch.setattr(adaptive, "time", SimpleNamespace(perf_counter=ticks.__next__))
    drafter = {
        "model": lambda: ModelDrafter(small),
        "confident": lambda: ModelDrafter(small, config=drafting),
        "lookup": lambda: NGramDrafter(1),
        "feature": lambda: FeatureDrafter(with_repeats(network.eval(), 1.0), model),
        "adaptive": lambda: AdaptiveDrafter(ModelDrafter(small)),
        "tree": lambda: TreeDrafter(ModelDrafter(small, config=DraftConfig(temperature_scale=0.8)), Growth(2, 2, 2)),
        "siblings": lambda: ModelDrafter(small, config=replace(drafting, siblings=1)),
        "adaptive siblings": lambda: AdaptiveDrafter(ModelDrafter(small, config=DraftConfig(siblings=1))),
        "medusa": lambda: medusa_drafter(model, (0, 2)),
        "merged tree": lambda: MergedDrafter(NGramDrafter(1), ModelDrafter(small)),
    }[kind]()
    count, batch, length = some(4_000, 12_000), 2_000, 4
    distribution = exact_distribution(model, [1, 2], 0.8, length)
    seen = Counter()
    steps = Statistics()
    num_draft = {"tree": 3, "merged tree": 3, "siblings": 4, "adaptive siblings": 4}.get(
        kind, 2 if rule == "block" else 1
    )
    for start in range(0, count, batch):
        results = generate(
            TransformersTarget(model), [[1, 2]] * batch, drafter=drafter, num_draft=num_draft, max_new_tokens=length,
            temperature=0.8, rule=rule, seed=list(range(start, start + batch)), statistics=steps,
        )  # fmt: skip
        seen.update(tuple(result.tokens) for result in results)
    assert steps.accepted > 500
    statistic, freedom = g_test(
        np.array([float(seen[sequence]) for sequence in distribution]), np.array(list(distribution.values()))
    )
    assert statistic < limit(freedom)


def test_a_tree_that_drops_an_unlikely_draw_gives_a_wrong_distribution():
    """The control for trees: children drawn at a temperature, and only the likelier ones proposed."""

    def dropping(draft, step):
        return (
            replace(draft, parents=draft.parents.masked_fill(draft.tokens == 0, -1))
            if draft.logits is not None
            else draft
        )

    model, count = tiny(7, vocab=3, sharp=0.8), 8_000
    distribution = exact_distribution(model, [1, 2], 0.8, 1)
    seen = {}
    drafter = TreeDrafter(ModelDrafter(tiny(8, vocab=3, sharp=0.8)))
    for kind in (drafter, Altered(drafter, dropping)):
        results = generate(
            TransformersTarget(model), [[1, 2]] * count, drafter=kind, num_draft=1, max_new_tokens=2, temperature=0.8,
            seed=list(range(count)),
        )  # fmt: skip
        counts = Counter(result.tokens[0] for result in results)
        seen[kind] = g_test(
            np.array([float(counts[t]) for t in range(3)]), np.array([distribution[(t,)] for t in range(3)])
        )
    exact, altered = seen.values()
    assert exact[0] < limit(exact[1])
    assert altered[0] > limit(altered[1])


def test_trees_have_branches_and_are_accepted(target_model):
    """The trees of the tests above are trees, and a drafter that knows the target is believed."""
    statistics = Statistics()
    options = {"num_draft": 6, "max_new_tokens": 24, "temperature": 0.8, "seed": 1, "statistics": statistics}
    generate(TransformersTarget(target_model), PROMPTS, drafter=drafters(target_model)["tree of self"], **options)
    assert statistics.accepted_at[0] == statistics.proposed_at[0]  # a draft of the target's own distribution
    assert statistics.proposed > 2 * sum(statistics.proposed_at)


def test_a_sibling_that_is_withheld_gives_a_wrong_distribution():
    """The control for siblings: one that was drawn and is not to somebody's liking is proposed all the same."""

    def withholding(draft, step):
        if not isinstance(draft, TreeDraft) or draft.parents.shape[1] < 3:
            return draft
        parents = draft.parents.clone()
        parents[:, 2] = parents[:, 2].masked_fill(draft.tokens[:, 2] == 0, -1)
        return replace(draft, parents=parents)

    model, count, seen = tiny(5, vocab=3, sharp=1.2), 8_000, {}
    distribution = exact_distribution(model, [1, 2], 0.8, 1)
    drafter = ModelDrafter(tiny(9, vocab=3, sharp=1.2), config=DraftConfig(siblings=1))
    for kind in (drafter, Altered(drafter, withholding)):
        results = generate(
            TransformersTarget(model), [[1, 2]] * count, drafter=kind, num_draft=2, max_new_tokens=3,
            temperature=0.8, seed=list(range(count)),
        )  # fmt: skip
        counts = Counter(result.tokens[0] for result in results)
        seen[kind] = g_test(
            np.array([float(counts[t]) for t in range(3)]), np.array([distribution[(t,)] for t in range(3)])
        )
    exact, altered = seen.values()
    assert exact[0] < limit(exact[1])
    assert altered[0] > limit(altered[1])


def test_siblings_are_met_where_the_chain_is_not():
    """Beside each draft lies another one: more is accepted than by the chain, of as many levels."""
    model, means = tiny(7, vocab=9, sharp=0.8), {}
    for siblings in (0, 1, 2):
        drafter = ModelDrafter(tiny(8, vocab=9, sharp=0.8), config=DraftConfig(siblings=siblings))
        statistics = Statistics()
        generate(
            TransformersTarget(model), [[1, 2]] * 400, drafter=drafter, num_draft=2 * (1 + siblings),
            max_new_tokens=12, temperature=0.8, seed=list(range(400)), statistics=statistics,
        )  # fmt: skip
        means[siblings] = statistics.tokens_per_step
        assert len(statistics.proposed_at) == 2
    assert means[0] + 0.05 < means[1] < means[2]


def test_a_chain_with_siblings_is_cut_to_the_nodes_that_are_wanted():
    wanted, most = [3, 1, 0, 2], [5, 1, 0, 9]
    chains, beside = [[5, 6, 7]] * 4, [[[8, -1], [9, 1], [2, 3]]] * 4
    tokens, parents = _with_siblings(chains, beside, wanted, most)
    assert tokens.tolist() == [[0, 5, 6, 7, 8, 9], [0, 5, 0, 0, 0, 0], [0] * 6, [0, 5, 6, 8, 9, 1]]
    assert parents.tolist() == [[-1, 0, 1, 2, 0, 1], [-1, 0, -1, -1, -1, -1], [-1] * 6, [-1, 0, 1, 0, 1, 1]]
    assert TreeDraft(tokens, parents).chains() == [[5, 6, 7], [5], [], [5, 6]]


def test_windows_take_chains_alone(target_model):
    with pytest.raises(ValueError, match="fixed_rows takes chains of drafts, not trees; got fixed_rows=8"):
        generate(
            TransformersTarget(target_model, 8), [[1, 2]], drafter=drafters(target_model)["tree"], max_new_tokens=9
        )


def test_a_stop_that_looks_at_a_withheld_token_gives_a_wrong_distribution():
    """The control of the test above: a drafter that hides a drawn token it does not like changes the distribution."""

    def hiding(draft, step):
        return Draft(draft.tokens.masked_fill(draft.tokens == 0, -1), draft.logits, draft.stats)

    model, count = tiny(7, vocab=3, sharp=0.8), 8_000
    distribution = exact_distribution(model, [1, 2], 0.8, 1)
    results = generate(
        TransformersTarget(model), [[1, 2]] * count, drafter=Altered(ModelDrafter(tiny(8, vocab=3, sharp=0.8)), hiding),
        num_draft=1, max_new_tokens=2, temperature=0.8, seed=list(range(count)),
    )  # fmt: skip
    seen = Counter(result.tokens[0] for result in results)
    statistic, freedom = g_test(
        np.array([float(seen[t]) for t in range(3)]), np.array([distribution[(t,)] for t in range(3)])
    )
    assert statistic > limit(freedom)


def test_stop_tokens_end_a_text_inside_an_accepted_run(target_model):
    plain = slow_greedy(target_model, PROMPTS[0], 20)
    stop = plain[5]
    expected = plain[: plain.index(stop) + 1]
    statistics = Statistics()
    result = generate(
        TransformersTarget(target_model), [PROMPTS[0], PROMPTS[2]], drafter=ModelDrafter(target_model), num_draft=7,
        max_new_tokens=20, temperature=0.0, stop_tokens={stop}, statistics=statistics,
    )[0]  # fmt: skip
    assert result.tokens == expected
    assert result.finished == "stop"
    assert 0 <= statistics.accepted <= statistics.proposed


def test_streaming_says_who_wrote_what(target_model):
    tokens = list(
        stream(
            TransformersTarget(target_model),
            [PROMPTS[0]],
            drafter=ModelDrafter(target_model),
            num_draft=4,
            max_new_tokens=10,
            temperature=0.0,
        )
    )
    assert [t.drafted for t in tokens] == [True] * 4 + [False] + [True] * 4 + [False]
    assert [t.finished for t in tokens] == [""] * 9 + ["length"]


def test_statistics(target_model):
    statistics = Statistics()
    options = {"num_draft": 3, "max_new_tokens": 12, "seed": 1, "temperature": 1.0}
    generate(TransformersTarget(target_model), PROMPTS, drafter=ModelDrafter(tiny(2)), statistics=statistics, **options)
    assert statistics.emitted == 48
    assert statistics.accepted == sum(statistics.accepted_at) <= statistics.proposed == sum(statistics.proposed_at)
    assert all(a >= b for a, b in pairwise(statistics.accepted_at))
    assert statistics.emitted == statistics.accepted + statistics.request_steps
    assert statistics.steps <= statistics.request_steps <= 4 * statistics.steps
    assert statistics.tokens_per_step == 48 / statistics.request_steps
    assert all(seconds > 0 for seconds in statistics.seconds.values())


def test_unseeded_requests_differ(target_model):
    """Case 22: and the same seed gives the same text."""
    options = {"max_new_tokens": 30, "temperature": 1.5}
    free = generate(TransformersTarget(target_model), [PROMPTS[0]] * 2, **options)
    assert free[0].tokens != free[1].tokens
    seeded = generate(TransformersTarget(target_model), [PROMPTS[0]] * 2, seed=5, **options)
    assert seeded[0].tokens == seeded[1].tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft": -1}, "num_draft must be at least 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": float("inf")}, "temperature must be finite and not negative, got inf"),
        ({"seed": [1]}, "seed must have one entry for each of the 2 prompts, got 1"),
        ({"seed": "x"}, "seed must be an int, a list of int, or None, got 'x'"),
    ],
)
def test_bad_options(target_model, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        generate(TransformersTarget(target_model), [[1], [2]], **options)


def test_bad_constructions(target_model):
    with pytest.raises(ValueError, match="prompts must not be empty, got an empty prompt at index 1"):
        generate(TransformersTarget(target_model), [[1], []])
    with pytest.raises(ValueError, match="fixed_rows must be at least 1, got 0"):
        TransformersTarget(target_model, 0)
    with pytest.raises(ValueError, match="fixed_rows needs a batch of one prompt, got 2"):
        generate(TransformersTarget(target_model, 3), [[1, 2], [3]], max_new_tokens=9)
    with pytest.raises(ValueError, match="min_match must be at least 1, got 0"):
        NGramDrafter(0)
    with pytest.raises(ValueError, match="vocab_size must be at least the drafter's own 11, got 5"):
        ModelDrafter(target_model, vocab_size=5)
    with pytest.raises(ValueError, match=r"min_confidence must be in \[0, 1\], got 2"):
        DraftConfig(min_confidence=2)
    with pytest.raises(ValueError, match="temperature_scale must be finite and not negative, got -1"):
        DraftConfig(temperature_scale=-1)
    for name, value in (("min_confidence", "0.5"), ("temperature_scale", torch.tensor([0.5, 1.0]))):
        with pytest.raises(TypeError, match=f"{name} must be a float, got"):
            DraftConfig(**{name: value})
    assert generate(TransformersTarget(target_model), []) == []


def test_suffix_index_against_a_slow_search():
    rng = np.random.default_rng(0)
    for alphabet in (2, 3, 20):
        index, history = SuffixIndex(), []
        for token in rng.integers(0, alphabet, 120).tolist():
            index.append(token)
            history.append(token)
            lengths = [
                n
                for n in range(1, len(history))
                if any(history[i : i + n] == history[-n:] for i in range(len(history) - n))
            ]
            longest = max(lengths, default=0)
            length, after = index.match()
            assert length == longest
            if longest:
                assert history[after - longest : after] == history[-longest:]
                assert after < len(history)


def followers(history, ahead):
    """What followed a suffix of the history and the tokens ahead, with the longest such suffix: by trying all."""
    whole, longest = [*history, *ahead], {}
    for n in range(1, len(whole) + 1):
        for i in range(len(history) - n):
            if history[i : i + n] == whole[-n:]:
                longest[history[i + n]] = n
    return longest


def test_followers_against_a_slow_search():
    rng = np.random.default_rng(1)
    for alphabet in (2, 3, 20):
        index, history = SuffixIndex(), []
        for token in rng.integers(0, alphabet, 40).tolist():
            for count in range(4):
                ahead = rng.integers(0, alphabet, count).tolist()
                tokens, lengths = index.followers(ahead)
                assert dict(zip(tokens, lengths, strict=True)) == followers(history, ahead)
                assert len(set(tokens)) == len(tokens)
                assert lengths == sorted(lengths, reverse=True)
            index.append(token)
            history.append(token)


@pytest.mark.parametrize("tree", [False, True])
def test_what_followed_the_longest_repetition_is_drafted(target_model, tree, monkeypatch):
    """By a drafter that favours repetitions above all that its network says, of every request of a batch."""
    checked, plain, extend = 0, FeatureSession.with_repetitions, Histories.extend

    def extended(histories, tokens):
        extend(histories, tokens)
        own = getattr(histories, "tokens", [[] for _ in tokens])
        histories.tokens = [[*before, *new] for before, new in zip(own, tokens, strict=True)]

    def selected(histories, slots):
        histories.indices = [histories.indices[slot] for slot in slots]
        histories.tokens = [histories.tokens[slot] for slot in slots]

    def watched(session, logits, paths):
        nonlocal checked
        favoured, known = plain(session, logits, paths), session._histories.tokens
        rows = len(logits) // len(known)
        for row, best in enumerate(favoured.argmax(1).tolist()):
            found = followers(known[row // rows], [int(tokens[row]) for tokens in paths])
            lengths = {token: min(n, REPEATS) for token, n in found.items() if token in SHORTLIST}
            expected = [token for token, n in lengths.items() if n == max(lengths.values())]
            if expected:
                assert SHORTLIST[best] in expected
                checked += 1
            else:
                assert torch.equal(favoured[row], logits[row])
        return favoured

    monkeypatch.setattr(FeatureSession, "with_repetitions", watched)
    monkeypatch.setattr(Histories, "extend", extended)
    monkeypatch.setattr(Histories, "select", selected)
    drafter = feature_drafter(target_model, repeats=1e4)
    generate(
        TransformersTarget(target_model), PROMPTS, num_draft=5, max_new_tokens=[12, 20, 9, 16], seed=1, temperature=0.9,
        drafter=TreeDrafter(drafter, Growth(depth=3, width=2, children=2)) if tree else drafter,
    )  # fmt: skip
    assert checked > 50


def test_lookup_continues_a_repetition():
    index = SuffixIndex()
    for token in [7, 1, 2, 3, 1, 2, 3, 1]:
        index.append(token)
    assert index.continuation(7) == [2, 3, 1, 2, 3, 1, 2]
