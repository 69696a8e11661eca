"""What people do to a decoding loop that used to give wrong text, or an error far away: cases.md, second list."""

from __future__ import annotations

import copy
import inspect
import math
import re
from dataclasses import replace
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch
from decoding import NAMES, PROMPTS, drafters
from forms import some
from tiny import VOCAB, Altered, slow_greedy, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from specdec_kernels.decode import (
    Draft,
    Sampling,
    Scheduler,
    Statistics,
    TransformersTarget,
    TreeDraft,
    columns,
    generate,
    model_facts,
    stream,
)
from specdec_kernels.decode.cache import RaggedCache
from specdec_kernels.decode.drafters import (
    AdaptiveDrafter,
    AsyncDrafter,
    CallableDrafter,
    DraftConfig,
    FallbackDrafter,
    Growth,
    MergedDrafter,
    ModelDrafter,
    NGramDrafter,
    TreeDrafter,
)
from specdec_kernels.decode.drafts import Step
from specdec_kernels.decode.loop import Loop, Options
from specdec_kernels.decode.requests import make_requests


@pytest.fixture(scope="module")
def model():
    return tiny(1, layers=2)


def greedy(model, prompts, **options):
    return generate(TransformersTarget(model), prompts, temperature=0.0, **{"max_new_tokens": 12, **options})


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_request_that_is_left_alone_does_not_see_holes(model):
    """Case 35, as it was found."""
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 4]]
    result = greedy(model, prompts, max_new_tokens=[20, 1])
    assert result[0].tokens == slow_greedy(model, [5], 20)


def test_a_request_that_is_left_alone_has_no_holes(model):
    """Not even a few: its columns need no mask."""
    session = TransformersTarget(model).begin([[1, 2, 3], [4, 5, 6]], [9, 9])
    session.score(torch.ones(2, 4, dtype=torch.int64), [4, 4])
    session.commit([3, 4])
    session.select([0])
    assert session.lengths == [session._cache.columns] == [5]


def test_holes_are_squeezed_out(model, monkeypatch):
    """A batch keeps no more holes than a quarter of its columns, and a request that is alone none."""
    worst, alone = 0.0, 0
    commit = RaggedCache.commit

    def watched(cache, counts):
        nonlocal worst, alone
        commit(cache, counts)
        holes = 1 - max(cache.lengths) / cache.columns
        worst = max(worst, holes)
        if len(cache.lengths) == 1:
            alone += 1
            assert cache.columns == cache.lengths[0]

    known = [[*prompt, *slow_greedy(model, prompt, 60)] for prompt in PROMPTS[:2]]
    turns = {0: 0, 1: 0}

    def propose(history, count):
        """All right for one request and wrong for the other, in turns: each holds holes for the other's drafts."""
        own = 0 if history == known[0][: len(history)] else 1
        turns[own] += 1
        right = known[own][len(history) :][:count]
        return right if (turns[own] + own) % 2 else [(token + 1) % VOCAB for token in right]

    monkeypatch.setattr(RaggedCache, "commit", watched)
    greedy(model, PROMPTS[:2], drafter=CallableDrafter(propose), max_new_tokens=[30, 60], num_draft=5)
    assert 0.1 < worst <= 0.25
    assert alone > 5


def test_more_rows_than_a_cache_begins_with(model, monkeypatch):
    """It grows, with what it has."""
    monkeypatch.setattr(columns, "CAPACITY", 4)
    results = greedy(model, PROMPTS, drafter=drafters(model)["lookup"], max_new_tokens=30)
    assert [r.tokens for r in results] == [slow_greedy(model, prompt, 30) for prompt in PROMPTS]


#: Drafters of each kind that keeps something of its streams.
KEEPING = ["model", "static", "feature with repeats", "lookup", "nested", "tree", "medusa", "merged tree", "ahead"]


def test_two_streams_over_one_target_are_read_in_turns(model):
    """Case 40, with a drafter that both share."""
    target, alone = TransformersTarget(model), {}
    for name in some(KEEPING, [name for name in NAMES if "adaptive" not in name]):
        drafter = drafters(model)[name]
        options = {"drafter": drafter, "num_draft": 3, "max_new_tokens": 14, "temperature": 0.8}
        for seed in (1, 2):
            alone[seed] = [
                list(stream(target, prompts, seed=seed, **options)) for prompts in (PROMPTS[:2], PROMPTS[2:])
            ]
        streams = [stream(target, prompts, seed=1, **options) for prompts in (PROMPTS[:2], PROMPTS[2:])]
        turns = [[], []]
        for pair in zip_longest(*streams):
            for seen, token in zip(turns, pair, strict=True):
                seen += [token] if token is not None else []
        assert [[token[:4] for token in seen] for seen in turns] == [[t[:4] for t in seen] for seen in alone[1]], name
        assert alone[1] != alone[2]


# --- trees with eager attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["tree", "tree of self", "medusa", "siblings", "feature tree"])
def test_trees_are_masked_as_the_attention_takes_it(attention, name):
    """Case 37: a mask of bool is added by eager attention."""
    model = tiny(1, layers=2, attn_implementation=attention)
    results = greedy(model, PROMPTS, drafter=drafters(model)[name], num_draft=6, max_new_tokens=20)
    assert [r.tokens for r in results] == [slow_greedy(model, prompt, 20) for prompt in PROMPTS]


# --- models that cannot be right --------------------------------------------------------------------------------------


def test_models_that_are_refused():
    with pytest.raises(ValueError, match=r"model must be in evaluation mode \(model.eval\(\)\), got LlamaForCausalLM"):
        TransformersTarget(tiny(1).train())
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        TransformersTarget(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must have a language-modelling head, got LlamaModel"):
        TransformersTarget(tiny(1).model)
    windowed = tiny(1)  # that does not do what its configuration says
    windowed.config.sliding_window, windowed.config.layer_types = 4, ["sliding_attention"]
    with pytest.raises(ValueError, match="rows of chains as a plain pass"):
        greedy(windowed, [[1, 2]])
    two = tiny(1, layers=2)
    two.config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(ValueError, match=r"of keys and values, or of states, got .*LinearAttentionAndFullAttentionLa"):
        TransformersTarget(two)


def test_a_model_that_leaves_the_cache_alone_is_refused():
    model = tiny(1)
    target = TransformersTarget(model, check=False)
    model.model.layers[0].self_attn.layer_idx = 0
    forward = model.model.forward
    model.model.forward = lambda *args, past_key_values=None, **named: forward(*args, **named)
    with pytest.raises(ValueError, match="model must write its keys and values, or states, to the cache that"):
        generate(target, [[1, 2, 3]], max_new_tokens=3)
    with pytest.raises(ValueError, match="cannot score chains: model must write its keys"):
        generate(TransformersTarget(model), [[1, 2, 3]], max_new_tokens=3)


class Columned(torch.nn.Module):
    """Rotary positions by the column of the cache, whatever position is meant."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary, self.columns = rotary, 0

    def forward(self, x, position_ids):
        rows = x.shape[1]
        return self.rotary(x, position_ids=torch.arange(self.columns, self.columns + rows)[None].expand(len(x), -1))


def by_column():
    """A model that does not look at the positions it is given."""
    model = tiny(1, layers=2)
    model.model.rotary_emb = Columned(model.model.rotary_emb).eval()
    forward = model.forward

    def watched(*args, past_key_values=None, **named):
        model.model.rotary_emb.columns = past_key_values.get_seq_length() if past_key_values is not None else 0
        return forward(*args, past_key_values=past_key_values, **named)

    model.forward = watched
    return model


def test_the_probe_tells_what_a_model_cannot_do():
    """Positions by column are right for a request alone, and wrong for batches and trees."""
    model = by_column()
    tree = TreeDrafter(ModelDrafter(tiny(2)), Growth(depth=2, width=2, children=2))
    assert greedy(model, PROMPTS[:1])[0].tokens == slow_greedy(model, PROMPTS[0], 12)
    with pytest.raises(ValueError, match=r"must score rows of batches .* they differ by .*: decode its prompts one at"):
        greedy(model, PROMPTS)
    with pytest.raises(ValueError, match=r"must score rows of trees .* they differ by .*: draft chains"):
        greedy(model, PROMPTS[:1], drafter=tree)
    unchecked = generate(TransformersTarget(model, check=False), PROMPTS, temperature=0.0, max_new_tokens=12)
    assert [r.tokens for r in unchecked] != [slow_greedy(model, prompt, 12) for prompt in PROMPTS]  # the control


# --- the end of the context -------------------------------------------------------------------------------------------


def gpt2(positions, seed=3):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=positions, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("name", [None, "lookup", "model", "tree", "siblings", "tree of self"])
@pytest.mark.parametrize("length", [28, 32])
def test_requests_of_a_batch_go_to_the_end_of_the_context(name, length):
    """Case 43: learned positions, of which there is none behind the last; a full context beside another request."""
    model = gpt2(32)
    prompts, limits = [[i % VOCAB for i in range(length)], [4]], [33 - length, 20]
    drafter = None if name is None else drafters(model)[name]
    results = greedy(model, prompts, max_new_tokens=limits, drafter=drafter, num_draft=4)
    assert [r.tokens for r in results] == [slow_greedy(model, p, n) for p, n in zip(prompts, limits, strict=True)]


def test_a_text_that_does_not_fit_is_refused_before_it_is_read():
    model = gpt2(32)
    with pytest.raises(
        ValueError, match="max_new_tokens must leave prompt and new tokens within the 32 positions of GP"
    ):
        stream(TransformersTarget(model), [[1] * 28, [1]], max_new_tokens=6)
    with pytest.raises(ValueError, match=r"within the 32 positions .*, the last token not counted, got 40 for prompt"):
        greedy(model, [[1] * 40], max_new_tokens=1)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("siblings", [0, 1])
def test_a_drafter_stops_at_the_end_of_its_context(model, tree, siblings):
    """What it drafts until then is as long as it has positions for; the text goes on."""
    depths = []

    def noted(draft, step):
        tokens = draft.chains()[0] if isinstance(draft, TreeDraft) else [t for t in draft.tokens[0].tolist() if t >= 0]
        depths.append((int(step.position[0]), len(tokens)))
        return draft

    drafter = ModelDrafter(gpt2(24), config=DraftConfig(siblings=siblings))
    if tree:
        drafter = TreeDrafter(drafter, Growth(depth=3, width=2, children=2))
    prompts = [PROMPTS[0], [3] * 30, [4]]
    results = greedy(model, prompts, max_new_tokens=40, drafter=Altered(drafter, noted), num_draft=4)
    assert [r.tokens for r in results] == [slow_greedy(model, prompt, 40) for prompt in prompts]
    assert all(position + length - 1 <= 24 for position, length in depths if length)
    assert any(length for position, length in depths if position > 18)
    assert any(position > 24 for position, _ in depths)


# --- grammars ---------------------------------------------------------------------------------------------------------


def mask_of(*ids, words=1):
    mask = torch.zeros(words, dtype=torch.int32)
    for token in ids:
        mask[token // 32] |= 1 << token % 32
    return mask


RULES = pytest.mark.parametrize("rule", ["token", "block", "coupled"])


@RULES
@pytest.mark.parametrize("name", [None, "lookup", "self", "tree", "siblings", "medusa"])
def test_a_grammar_in_a_dead_end_ends_its_request(model, rule, name):
    """Case 42; the others of the batch go on."""

    def grammar(history):
        return mask_of(2, 3, 4) if len(history) < 3 else mask_of()

    drafter = None if name is None else drafters(model)[name]
    options = {"rule": rule, "temperature": 0.9, "seed": [1, 2], "max_new_tokens": 8, "drafter": drafter}
    events = list(stream(TransformersTarget(model), [[1], [2, 2]], grammar=[grammar, None], **options))
    first, second = ([t for t in events if t.request == index] for index in (0, 1))
    assert [t.token in (2, 3, 4) for t in first] == [True] * 3 + [False]
    assert (first[-1].token, first[-1].finished) == (-1, "dead_end")
    alone = generate(TransformersTarget(model), [[2, 2]], **{**options, "seed": 2})
    assert [t.token for t in second] == alone[0].tokens
    result = generate(TransformersTarget(model), [[1]], grammar=grammar, **{**options, "seed": 1})[0]
    assert (len(result.tokens), len(result.drafted), result.finished) == (3, 3, "dead_end")


@RULES
def test_a_dead_end_that_the_text_does_not_enter_ends_nothing(model, rule):
    """Drafted into, read by the block rule, and rejected."""
    plain = generate(TransformersTarget(model), [[1]], temperature=0.0, max_new_tokens=9)[0].tokens

    def grammar(history):
        return mask_of() if history != plain[: len(history)] else mask_of(*range(VOCAB))

    drafter = CallableDrafter(lambda history, count: [(plain[len(history) - 1] + 1) % VOCAB] * count)
    result = greedy(model, [[1]], rule=rule, grammar=grammar, drafter=drafter, max_new_tokens=9)[0]
    assert (result.tokens, result.finished) == (plain, "length")


def test_a_grammar_is_not_asked_what_follows_a_stop_token(model):
    """Nor what follows what it did not allow: either may break it."""

    def grammar(history):
        assert 7 not in history
        assert all(token % 2 for token in history)
        return mask_of(1, 3, 5, 7, 9)

    for propose in (
        lambda history, count: [7] * count,
        lambda history, count: [3, 7, 3, 5][:count],
        lambda h, c: [2] * c,
    ):
        drafter = CallableDrafter(propose)
        for rule in ("token", "block", "coupled"):
            options = {"rule": rule, "drafter": drafter, "stop_tokens": {7}, "grammar": grammar, "temperature": 2.0}
            results = generate(TransformersTarget(model), [[1]] * 8, seed=list(range(8)), max_new_tokens=20, **options)
            assert all(token % 2 for r in results for token in r.tokens)
            assert all((r.tokens[-1] == 7) == (r.finished == "stop") for r in results)


def test_masks_of_padded_vocabularies(model):
    """Logits that are wider than the tokenizer: what a mask does not cover is not allowed."""
    wide = tiny(1, vocab=70, layers=2)
    results = generate(TransformersTarget(wide), [[1]] * 20, seed=list(range(20)), max_new_tokens=4, temperature=3.0,
                       grammar=lambda history: mask_of(*range(0, 32)))  # fmt: skip
    assert {token for r in results for token in r.tokens} <= set(range(32))
    only = generate(TransformersTarget(wide), [[1]], grammar=lambda history: mask_of(69, words=3), max_new_tokens=2)
    assert only[0].tokens == [69, 69]
    beyond = generate(TransformersTarget(wide), [[1]], grammar=lambda history: mask_of(70, 95, words=3))
    assert (beyond[0].tokens, beyond[0].finished) == ([], "dead_end")


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(1), TypeError, r"grammar must give int32 \[1\], a bit for each id, got float32 \[1\]"),
        (torch.zeros(1, dtype=torch.int64), TypeError, r"grammar must give int32 \[1\].*got int64 \[1\]"),
        ([1], TypeError, r"grammar must give int32 \[1\].*got \[1\]"),
        (
            torch.zeros(2, dtype=torch.int32),
            ValueError,
            r"grammar must give at most 1 words for 11 ids, got int32 \[2\]",
        ),
        (torch.zeros(2, 1, dtype=torch.int32), ValueError, r"at most 1 words for 11 ids, got int32 \[2, 1\]"),
    ],
)
def test_masks_that_are_refused(model, mask, error, message):
    with pytest.raises(error, match=message):
        greedy(model, [[1]], grammar=lambda history: mask)


def test_a_grammar_may_give_a_batch_of_one(model):
    """As xgrammar allocates them."""
    assert greedy(model, [[1]], grammar=lambda history: mask_of(4)[None], max_new_tokens=3)[0].tokens == [4, 4, 4]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_allowed_id_with_the_lowest_logit_is_the_one(model, temperature):
    """Case 36: whatever the temperature makes of the lowest finite number."""
    with torch.no_grad():
        low = tiny(1, layers=2)
        low.lm_head.weight.zero_()
        low.lm_head.bias = torch.nn.Parameter(torch.full((VOCAB,), torch.finfo(torch.float32).min))
    for rule in ("token", "block", "coupled"):
        result = generate(
            TransformersTarget(low), [[1, 2]], grammar=lambda history: mask_of(9), temperature=temperature, rule=rule,
            max_new_tokens=3,
        )[0]  # fmt: skip
        assert result.tokens == [9, 9, 9] or (result.tokens, result.finished) == ([], "invalid")


# --- targets and drafters that give nan -------------------------------------------------------------------------------


class Poisoned(torch.nn.Module):
    """A head that gives nan (or something else) for some histories, by their last hidden state."""

    def __init__(self, head, when, value):
        super().__init__()
        self.head, self.when, self.value = head, when, value

    @property
    def weight(self):
        return self.head.weight

    def forward(self, x):
        logits = self.head(x)
        return torch.where(self.when(logits)[..., None], self.value, logits)


@pytest.mark.brief(kept=lambda parameters: parameters["value"] != parameters["value"] or parameters["rule"] == "block")
@RULES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [None, "lookup", "self", "tree"])
def test_a_target_of_nan_is_seen(rule, value, name):
    """Case 45: after a certain token, in the middle of a text; its neighbours are what they are alone."""
    model = tiny(1, layers=2)
    plain = {tuple(prompt): slow_greedy(model, prompt, 12) for prompt in PROMPTS}
    last = plain[tuple(PROMPTS[0])][6]
    model.lm_head = Poisoned(model.lm_head, lambda logits: logits.argmax(-1) == last, value).eval()
    drafter = None if name is None else drafters(tiny(1, layers=2))[name]
    statistics = Statistics()
    results = generate(
        TransformersTarget(model, check=False), PROMPTS, temperature=0.0, rule=rule, drafter=drafter,
        max_new_tokens=12, statistics=statistics,
    )  # fmt: skip
    ended = 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = plain[tuple(prompt)]
        if last in expected:
            ended += 1
            assert (result.tokens, result.finished) == (expected[: expected.index(last)], "invalid")
        else:
            assert (result.tokens, result.finished) == (expected, "length")
    assert statistics.invalid == ended > 0


@pytest.mark.parametrize("name", ["model", "feature", "siblings", "tree"])
def test_a_drafter_of_nan_changes_nothing(model, name):
    drafter = drafters(model)[name]

    def spoiled(draft, step):
        rows = draft.logits.clone() if draft.logits is not None else None
        if rows is None:
            return draft
        rows[:, 1:] = float("nan")
        stats = draft.stats.clone()
        stats[:, 1:] = float("nan")
        return replace(draft, logits=rows, stats=stats)

    statistics = Statistics()
    options = {"rule": "coupled", "temperature": 0.8, "seed": [1, 2, 3, 4], "max_new_tokens": 10}
    plain = generate(TransformersTarget(model), PROMPTS, **options)
    spoilt = generate(
        TransformersTarget(model), PROMPTS, drafter=Altered(drafter, spoiled), statistics=statistics, **options
    )
    assert [r.tokens for r in spoilt] == [r.tokens for r in plain]
    for rule in ("token", "block"):
        results = generate(
            TransformersTarget(model), PROMPTS, drafter=Altered(drafter, spoiled), statistics=statistics,
            **{**options, "rule": rule},
        )  # fmt: skip
        assert [r.finished for r in results] == ["length"] * 4
    assert statistics.invalid == 0
    assert statistics.accepted > 0


@RULES
@pytest.mark.parametrize("kind", ["none", "chain", "tree"])
@pytest.mark.parametrize(("most", "tokens"), [(3e38, VOCAB), (-3e38, 1)])
def test_rows_that_penalties_leave_no_distribution_are_seen(model, rule, kind, most, tokens):
    """Each id becomes -inf, or +inf, as soon as it was written, be it as a draft of the same step."""
    written = []

    def known(history, count):
        return [*written, *[0] * count][len(history) - 2 :][:count]

    drafter = {
        "none": None, "chain": CallableDrafter(known),
        "tree": MergedDrafter(CallableDrafter(known), CallableDrafter(lambda history, count: [1])),
    }  # fmt: skip
    options = {"presence_penalty": most, "frequency_penalty": most, "temperature": 0.0, "max_new_tokens": 20}
    for used in (None, drafter[kind]):
        steps = Statistics()
        (result,) = generate(
            TransformersTarget(model), [[1, 2]], drafter=used, rule=rule, logprobs=True, statistics=steps, **options
        )
        assert (len(result.tokens), result.finished) == (tokens, "invalid")
        assert (steps.invalid, steps.emitted) == (1, tokens)
        assert all(math.isfinite(score) for score in result.logprobs)
        written += result.tokens
    assert written[:tokens] == written[tokens:]
    assert (steps.accepted > 0) == (kind != "none")


@RULES
def test_ids_that_are_all_biased_away_are_seen(model, rule):
    """And a token that is biased away is never the one."""
    options = {"rule": rule, "max_new_tokens": 5, "seed": list(range(4)), "temperature": 2.0}
    never = dict.fromkeys(range(VOCAB), float("-inf"))
    results = generate(TransformersTarget(model), PROMPTS, logit_bias=[never, {}, {3: float("-inf")}, {}], **options)
    assert (results[0].tokens, results[0].finished) == ([], "invalid")
    assert [r.finished for r in results[1:]] == ["length"] * 3
    some = {token: float("-inf") for token in range(VOCAB) if token not in (2, 7)}
    for result in generate(TransformersTarget(model), PROMPTS, logit_bias=some, **options):
        assert set(result.tokens) <= {2, 7}
        assert len(result.tokens) == 5


# --- stop tokens, defaults --------------------------------------------------------------------------------------------


def test_stop_tokens_default_to_the_models_own(model):
    plain = slow_greedy(model, PROMPTS[0], 12)
    stop = plain[4]
    cut = plain[: plain.index(stop) + 1]
    for configured in (stop, [stop, 10**6]):
        model.generation_config.eos_token_id = configured
        assert TransformersTarget(model).stop_tokens >= {stop}
        assert greedy(model, PROMPTS[:1])[0].tokens == cut
        assert greedy(model, PROMPTS[:1], stop_tokens=())[0].tokens == plain
        assert greedy(model, PROMPTS[:1], stop_tokens=[])[0].finished == "length"
    model.generation_config.eos_token_id = None
    assert greedy(model, PROMPTS[:1])[0].tokens == plain
    model.config.eos_token_id = stop
    assert greedy(model, PROMPTS[:1])[0].tokens == cut
    model.config.eos_token_id = None


def test_the_default_temperature_is_one(model):
    assert Sampling().temperature == 1.0
    options = {"max_new_tokens": 12, "seed": 5}
    drawn = generate(TransformersTarget(model), PROMPTS, **options)
    hot = generate(TransformersTarget(model), PROMPTS, temperature=1.0, **options)
    assert [r.tokens for r in drawn] == [r.tokens for r in hot]
    assert [r.tokens for r in drawn] != [r.tokens for r in greedy(model, PROMPTS)]


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lookup", "self", "siblings", "tree"])
def test_nothing_is_drafted_that_could_not_be_kept(model, name):
    """A request that may go on by n tokens is given n - 1 drafts at most, one of n = 1 none."""
    asked = []

    def noted(draft, step):
        tree = draft if isinstance(draft, TreeDraft) else TreeDraft.of(draft)
        asked.extend(zip(step.num_draft, (tree.live.sum(1) - 1).tolist(), strict=True))
        return draft

    statistics = Statistics()
    limits = [1, 2, 4, 9]
    greedy(model, PROMPTS, drafter=Altered(drafters(model)[name], noted), num_draft=3, max_new_tokens=limits,
           statistics=statistics)  # fmt: skip
    assert all(drafted <= most <= 3 for most, drafted in asked)
    assert [most for most, _ in asked[:4]] == [0, 1, 3, 3]
    assert statistics.emitted == sum(limits)
    assert statistics.accepted + statistics.request_steps == statistics.emitted


def test_a_lookup_wants_the_tokens_it_says():
    for least, drafted in ((1, [5]), (2, [5]), (3, [])):
        session = NGramDrafter(least).begin([[3, 4, 5, 1, 3, 4]], None)
        one = torch.ones(1, dtype=torch.int64)
        assert session.propose(Step([1], one, one, 1.0)).tokens.tolist() == [drafted]


# --- errors -----------------------------------------------------------------------------------------------------------


BAD = [
    (
        {"prompts": [1, 2, 3]},
        TypeError,
        r"prompts must be a list of lists of token ids, \[prompt\] for one, got \[1, 2",
    ),
    ({"prompts": "hello"}, TypeError, "prompts must be a list of lists of token ids, got 'hello'"),
    ({"prompts": ["hello"]}, TypeError, r"prompts\[0\] must be a list of token ids, got 'hello'"),
    ({"prompts": [[1], []]}, ValueError, "prompts must not be empty, got an empty prompt at index 1"),
    ({"prompts": [[1, 99]]}, ValueError, r"prompts\[0\] must hold token ids in \[0, 11\), got 99 at index 1"),
    ({"prompts": [[1, -1]]}, ValueError, r"prompts\[0\] must hold token ids in \[0, 11\), got -1 at index 1"),
    ({"prompts": [[1, None]]}, TypeError, r"prompts\[0\] must be a list of token ids, got \[1, None\]"),
    ({"prompts": [[1.0]]}, TypeError, r"prompts\[0\] must be a list of token ids, got \[1.0\]"),
    ({"prompts": 7}, TypeError, "prompts must be a list of lists of token ids, got 7"),
    ({"seed": 1 << 63}, ValueError, r"seed must be in \[-2\^63, 2\^63\), got 9223372036854775808"),
    ({"seed": 1.5}, TypeError, "seed must be an int, a list of int, or None, got 1.5"),
    ({"stop_tokens": 2}, TypeError, "stop_tokens must be a list of token ids, got 2"),
    ({"stop_tokens": "</s>"}, TypeError, "stop_tokens must be a list of token ids, got '</s>'"),
    ({"num_draft": 1.5}, TypeError, "num_draft must be an int, got 1.5"),
    ({"num_draft": None}, TypeError, "num_draft must be an int, got None"),
    ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be an int or a list of int, got 1.5"),
    ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an int or a list of int, got True"),
    ({"max_new_tokens": [3, 3]}, ValueError, "max_new_tokens must have one entry for each of the 1 prompts, got 2"),
    ({"max_tokens": 3}, TypeError, "has no argument 'max_tokens': max_new_tokens is meant"),
    ({"eos_token_id": 3}, TypeError, "has no argument 'eos_token_id': stop_tokens is meant"),
    ({"repetition": 1.1}, TypeError, "has no argument 'repetition': repetition_penalty is meant"),
    ({"nonsense": 1}, TypeError, "has no argument 'nonsense': its arguments are target, prompts"),
    ({"stop_when": 3}, TypeError, r"stop_when must be a function of \(index, tokens\), got 3"),
    ({"statistics": 3}, TypeError, "statistics must be Statistics, got 3"),
    ({"rule": "tokens"}, ValueError, r"rule must be one of \['block', 'coupled', 'token'\], got 'tokens'"),
    ({"logit_bias": {11: 1.0}}, ValueError, r"logit_bias must hold token ids in \[0, 11\), got 11"),
    ({"logit_bias": {1: float("nan")}}, ValueError, r"logit_bias must be finite in .*, got nan for 1"),
    ({"logit_bias": {1: float("inf")}}, ValueError, r"logit_bias must be finite in .*, got inf for 1"),
    ({"logit_bias": {1: "2"}}, TypeError, "logit_bias must map token ids to numbers, got '2' for 1"),
    ({"logit_bias": {"a": 1.0}}, TypeError, "logit_bias must be a list of token ids"),
    ({"drafter": CallableDrafter(lambda h, c: [11] * c)}, ValueError, r"drafter must propose .* \[0, 11\), got 11"),
    (
        {"drafter": CallableDrafter(lambda h, c: [1 << 40] * c)},
        ValueError,
        r"drafter must propose .*, got 1099511627776",
    ),
    ({"drafter": CallableDrafter(lambda h, c: [1 << 70] * c)}, ValueError, r"draft must hold token ids in \[0, "),
    ({"drafter": CallableDrafter(lambda h, c: [-2] * c)}, ValueError, r"draft must hold token ids in \[0, .*, got -2"),
    ({"drafter": CallableDrafter(lambda h, c: [None])}, TypeError, r"draft must be a list of token ids, got \[None\]"),
]


@pytest.mark.parametrize("function", [generate, stream])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[next(iter(change)) for change, _, _ in BAD])
def test_errors_name_the_argument(model, function, change, error, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 4, **change}
    prompts = arguments.pop("prompts")
    with pytest.raises(error, match=message):
        list(function(TransformersTarget(model), prompts, **arguments))


def test_what_is_no_target_or_no_drafter(model):
    with pytest.raises(TypeError, match=r"target must be a Target, such as TransformersTarget\(model\), got LlamaFor"):
        generate(model, [[1]])
    with pytest.raises(
        TypeError, match=r"drafter must be a Drafter, such as ModelDrafter\(model\), got LlamaForCausalLM"
    ):
        generate(TransformersTarget(model), [[1]], drafter=model)
    with pytest.raises(TypeError, match=r"propose must be a function of"):
        CallableDrafter([1, 2])
    with pytest.raises(TypeError, match=r"what propose returns must be a list of token ids, got None"):
        generate(TransformersTarget(model), [[1]], drafter=CallableDrafter(lambda history, count: None))

    def failing(history, count):
        yield history[0] + "a mistake of its own"

    with pytest.raises(TypeError, match=r"unsupported operand"):
        generate(TransformersTarget(model), [[1]], drafter=CallableDrafter(failing))
    with pytest.raises(TypeError, match=r"generate\(\) missing a required argument: 'target'"):
        generate()
    with pytest.raises(TypeError, match=r"generate\(\) too many positional arguments"):
        generate(TransformersTarget(model), [[1]], None)
    with pytest.raises(TypeError, match=r"growth must be a Growth, got None"):
        TreeDrafter(ModelDrafter(model), None)
    for drafter in (NGramDrafter(), AdaptiveDrafter(ModelDrafter(model))):
        message = f"drafter must have a model of its own .* got {type(drafter).__name__}"
        with pytest.raises(TypeError, match=message):
            generate(TransformersTarget(model), [[1]], drafter=TreeDrafter(drafter))
    with pytest.raises(TypeError, match=r"min_match must be an int, got 1.5"):
        NGramDrafter(1.5)
    with pytest.raises(TypeError, match=r"check must be True or False, got 'no'"):
        TransformersTarget(model, check="no")
    with pytest.raises(TypeError, match=r"dynamic must be True or False, got 'no'"):
        Growth(dynamic="no")
    with pytest.raises(TypeError, match=r"depth must be an int, got 2.5"):
        Growth(depth=2.5)


@pytest.mark.parametrize(
    "around",
    [
        lambda inner: inner,
        lambda inner: FallbackDrafter(NGramDrafter(), inner),
        AsyncDrafter,
        AdaptiveDrafter,
        TreeDrafter,
        lambda inner: AdaptiveDrafter(FallbackDrafter(NGramDrafter(), AsyncDrafter(inner))),
    ],
)
@pytest.mark.parametrize("vocab", [6, 14])
def test_a_drafter_of_another_vocabulary_is_told_how_to_be_made(model, vocab, around):
    drafter, message = around(ModelDrafter(tiny(3, vocab=vocab))), rf"vocab_size=11\) if .*, got vocab_size={vocab}"
    target = TransformersTarget(model)
    with pytest.raises(ValueError, match=message):
        Scheduler(target, drafter)
    target.begin = None  # before anything is read
    with pytest.raises(ValueError, match=message):
        generate(target, [[1]], drafter=drafter)


def test_drafts_alone_may_be_of_a_smaller_vocabulary(model):
    """Where nothing is read of what they were drawn from."""
    drafter = MergedDrafter(NGramDrafter(1), ModelDrafter(tiny(3, vocab=6)))
    drafted, plain = greedy(model, PROMPTS, drafter=drafter), greedy(model, PROMPTS)
    assert [result.tokens for result in drafted] == [result.tokens for result in plain]


def test_prompts_that_come_one_after_the_other(model):
    results = greedy(model, (prompt for prompt in PROMPTS))
    assert [result.tokens for result in results] == [result.tokens for result in greedy(model, PROMPTS)]
    assert greedy(model, iter(())) == []


@pytest.mark.parametrize("name", ["lookup", "tree"])
def test_what_is_handed_to_callers_is_theirs(model, name):
    """To keep, and to change: neither ``stop_when`` nor a grammar changes by it what they are handed later."""

    def handed(change):
        texts, histories, copies = [], [], []

        def stop_when(index, tokens):
            texts.append(tokens)
            change(tokens)
            return False

        def grammar(history):
            histories.append(history)
            copies.append(list(history))
            change(history)
            return torch.tensor([(1 << VOCAB) - 1], dtype=torch.int32)

        drafter = drafters(model)[name]
        (result,) = greedy(model, PROMPTS[:1], drafter=drafter, stop_when=stop_when, grammar=grammar)
        return result.tokens, texts, histories, copies

    tokens, texts, histories, copies = handed(lambda own: None)
    assert tokens == slow_greedy(model, PROMPTS[0], 12)
    assert texts == [tokens[:count] for count in range(1, 13)]
    assert histories == copies
    turned, texts, histories, same = handed(list.reverse)
    assert turned == tokens
    assert [own[::-1] for own in texts] == [tokens[:count] for count in range(1, 13)]
    assert same == copies == [own[::-1] for own in histories]


def test_a_batch_that_cannot_be_made_leaves_those_that_run(model):
    """Nothing is joined by halves."""
    target, options = TransformersTarget(model), Options(4, "token", False, None, None)
    loop = Loop(target, NGramDrafter(1), options, Statistics())
    loop.begin(make_requests(PROMPTS[:1], VOCAB, 1, 12, {"temperature": 0.0}))
    tokens = [token.token for token in loop.step()]
    (bad,) = make_requests(PROMPTS[1:2], VOCAB, 1, 12, {"temperature": 0.0})
    bad.seed = 1 << 70
    layers = target.begin([bad.prompt], [12], ()), NGramDrafter(1).begin([bad.prompt], None)
    with pytest.raises((RuntimeError, OverflowError, ValueError)):
        loop.join([bad], *layers)
    while loop.requests:
        tokens += [token.token for token in loop.step()]
    assert tokens == slow_greedy(model, PROMPTS[0], 12)


def test_errors_come_before_anything_is_read(model):
    """When the function is called, not when its first token is requested."""
    target = TransformersTarget(model)
    target.begin = None
    for change, error, message in BAD:
        if "drafter" not in change:
            arguments = {"prompts": [[1]], **change}
            with pytest.raises(error, match=message):
                stream(target, arguments.pop("prompts"), **arguments)


def test_a_multimodal_configuration(model):
    """Its vocabulary is that of its text."""
    other = tiny(1, layers=2)
    text = copy.deepcopy(other.config)
    other.config.get_text_config = lambda decoder=True: text
    del other.config.vocab_size
    assert [r.tokens for r in greedy(other, PROMPTS)] == [r.tokens for r in greedy(model, PROMPTS)]
    silent = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace()))
    with pytest.raises(ValueError, match="model must have a vocab_size in its text configuration, got None"):
        model_facts.vocab_size(silent)


def test_signatures_can_be_read():
    """By help(), and by an editor."""
    for function in (generate, stream):
        named = inspect.signature(function).parameters
        assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in named.values())
        described = function.__doc__ + stream.__doc__
        assert all(re.search(rf"\b{name}\b", described) for name in named)
    assert Draft.nothing(2).counts == [0, 0]
