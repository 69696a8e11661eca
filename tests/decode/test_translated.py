"""Drafters whose model has another tokenizer: their tokens by text, and a distribution that nothing changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from decoding import exact_distribution
from distributions import g_test, limit
from small_tokenizers import byte_fallback, byte_level, of_tokens
from tiny import Altered, slow_greedy, tiny
from tokenizers import Tokenizer, models
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, T5Config

from specdec_kernels.decode import Sampling, Scheduler, Statistics, Step, TransformersTarget, generate
from specdec_kernels.decode.drafters import (
    CallableDrafter,
    DraftConfig,
    Growth,
    IntersectionDrafter,
    ModelDrafter,
    NGramDrafter,
    TranslatedDrafter,
    Translation,
    TreeDrafter,
)

#: The target's tokens and the drafter's: three are the same, with other ids.
TARGET, DRAFTER = ("a", "b", "c", "ab"), ("c", "d", "b", "a", "bc")
PROMPT = [1, 2, 1, 2]
TOKENIZERS = of_tokens(TARGET, [("a", "b")]), of_tokens(DRAFTER, [("b", "c")])


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_of_tokens_are_those_of_their_texts(make):
    tokenizer = make()
    translation = Translation(tokenizer, tokenizer)
    texts = translation.source.texts
    assert set(texts) == set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    before = tokenizer.encode("b", add_special_tokens=False)  # a space at the beginning of a text is left out
    for token, text in texts.items():
        if text.decode(errors="ignore").encode() == text:
            assert tokenizer.decode([*before, token]) == tokenizer.decode(before) + text.decode()
    assert {translation.of(token) == ([token], True) for token in texts.values() if token in texts} <= {True}


def test_tokens_by_text():
    to_draft = Translation(*TOKENIZERS)
    assert to_draft.shared(4, 5) == {0: 3, 1: 2, 2: 0}
    assert to_draft.shared(2, 5) == {0: 3, 1: 2}
    assert to_draft.shared(4, 3) == {1: 2, 2: 0}
    assert [to_draft.of(token) for token in range(4)] == [([3], True), ([2], True), ([0], True), ([3, 2], True)]
    assert to_draft.tokens([3, 2]) == [3, 2, 0]  # one by one: "bc" would depend on how many come at a time
    assert to_draft.prompt([3, 2]) == [3, 4]  # a prompt, though, as the other tokenizer cuts it
    back = to_draft.reversed()
    assert back.of(1) == ([], False)
    assert back.of(4) == ([1, 2], True)
    assert back.tokens([3, 1, 4]) == [0, 1, 2]
    assert Translation(of_tokens(["abc"]), TOKENIZERS[0]).of(0) == ([3, 2], True)  # the longest first


def test_letters_of_several_bytes_and_ends():
    bytewise, fallback = byte_level(), byte_fallback()
    there = Translation(fallback, bytewise)
    text = "a b. é"
    tokens = fallback.encode(text, add_special_tokens=False)
    assert bytewise.decode(there.tokens(tokens)).strip() == text
    assert bytewise.decode(there.prompt(tokens)) == text
    assert there.of(fallback.eos_token_id) == ([bytewise.eos_token_id], True)
    assert there.prompt([*tokens, fallback.eos_token_id])[-1] == bytewise.eos_token_id
    assert there.shared(10**6, 10**6)[fallback.eos_token_id] == bytewise.eos_token_id
    assert there.shared(10**6, 10**6)[fallback.get_vocab()["b"]] == bytewise.get_vocab()["b"]  # not <0x62>


def test_what_says_nothing_of_its_texts_is_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(ValueError, match="tokenizer must be byte-level or have SentencePiece's sign"):
        Translation(words, byte_level())


def permuted(model, order):
    """The same model by other ids: token ``order[i]`` has the id i."""
    other = tiny(1, vocab=len(order), sharp=1.5)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weights in (other.model.embed_tokens.weight, other.lm_head.weight):
            weights.copy_(weights[order])
    return other


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rule", ["token", "coupled"])
def test_the_target_by_other_ids_is_always_right(temperature, rule):
    """What it reads and what it draws are both translated, or it would be wrong now and then."""
    names, order = "abcdefgh", [3, 1, 4, 0, 6, 7, 5, 2]
    tokenizers = of_tokens(names), of_tokens([names[token] for token in order])
    model = tiny(1, vocab=8, sharp=1.5)
    other = permuted(model, order)
    prompts = [[0, 1, 2, 3, 4], [5], [7, 7, 1]]
    for drafter in (
        IntersectionDrafter(other, Translation(*tokenizers), 8),
        TranslatedDrafter(ModelDrafter(other), Translation(*tokenizers), 8),
    ):
        if temperature and isinstance(drafter, TranslatedDrafter):
            continue  # its drafts are the likeliest
        statistics = Statistics()
        results = generate(
            TransformersTarget(model), prompts, drafter=drafter, num_draft=3, max_new_tokens=[24, 9, 17],
            temperature=temperature, rule=rule, seed=[1, 2, 3], statistics=statistics,
        )  # fmt: skip
        assert statistics.accepted == statistics.proposed > 20
        if temperature == 0:
            assert [result.tokens for result in results] == [
                slow_greedy(model, prompt, count) for prompt, count in zip(prompts, [24, 9, 17], strict=True)
            ]


def made(kind, sharp=0.8):
    """Drafters of the tokens above, whose model knows nothing of the target."""
    small, translation = tiny(8, vocab=5, sharp=sharp), Translation(*TOKENIZERS)
    drafting = DraftConfig(min_confidence=0.2, temperature_scale=0.7)
    return {
        "intersection": lambda: IntersectionDrafter(small, translation, 4, drafting),
        "tree": lambda: TreeDrafter(IntersectionDrafter(small, translation, 4), Growth(2, 2, 2)),
        "siblings": lambda: IntersectionDrafter(small, translation, 4, replace(drafting, siblings=1)),
        "point masses": lambda: TranslatedDrafter(ModelDrafter(small), translation, 4),
        "looked up": lambda: TranslatedDrafter(NGramDrafter(1), translation, 4),
    }[kind]()


#: Each kind with one rule, and each rule, every time.
BRIEF = {
    ("intersection", "token"), ("tree", "coupled"), ("siblings", "block"), ("point masses", "token"),
    ("looked up", "coupled"),
}  # fmt: skip


@pytest.mark.brief(kept=lambda named: (named["kind"], named["rule"]) in BRIEF)
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("kind", ["intersection", "tree", "siblings", "point masses", "looked up"])
def test_text_has_the_targets_distribution(kind, rule):
    accepted, statistic, freedom = measured(made(kind), rule)
    assert accepted > 300
    assert statistic < limit(freedom)


def measured(drafter, rule="token", count=6_000, length=3):
    """(accepted drafts, statistic, degrees of freedom) of all texts of three tokens."""
    model, seen, steps = tiny(7, vocab=4, sharp=0.8), Counter(), Statistics()
    probs = exact_distribution(model, PROMPT, 0.8, length)
    for start in range(0, count, 2_000):
        results = generate(
            TransformersTarget(model), [PROMPT] * 2_000, drafter=drafter, num_draft=3, max_new_tokens=length,
            temperature=0.8, rule=rule, seed=list(range(start, start + 2_000)), statistics=steps,
        )  # fmt: skip
        seen.update(tuple(result.tokens) for result in results)
    observed = np.array([float(seen[sequence]) for sequence in probs])
    return steps.accepted, *g_test(observed, np.array(list(probs.values())))


def test_a_draft_by_another_tokens_logits_gives_a_wrong_distribution():
    """The control: what is drawn is one token, and the logits say that it was another one."""

    def mistranslated(draft, step):
        return replace(draft, tokens=torch.where(draft.tokens == 0, 1, torch.where(draft.tokens == 1, 0, draft.tokens)))

    drafter = IntersectionDrafter(tiny(8, vocab=5, sharp=2.0), Translation(*TOKENIZERS), 4)
    _, statistic, freedom = measured(Altered(drafter, mistranslated))
    assert statistic > limit(freedom)


@pytest.mark.parametrize("kind", ["intersection", "point masses"])
def test_drafts_do_not_depend_on_how_many_tokens_come_at_a_time(kind):
    drafter = made(kind)
    for new in ([3, 2], [2, 3, 3, 2, 1]):
        whole, piecewise = (drafter.begin([[1, 3]], None) for _ in range(2))
        whole.commit([new], None)
        for token in new:
            piecewise.commit([[token]], None)
        step = steps_of([3])
        first, second = whole.propose(step), piecewise.propose(step)
        assert first.tokens.tolist() == second.tokens.tolist()
        if first.logits is not None:
            assert torch.allclose(first.logits, second.logits, atol=1e-5)


def steps_of(counts):
    batch = len(counts)
    return Step(counts, torch.zeros(batch, dtype=torch.int64), torch.full((batch,), 4), 1.0)


def test_drafts_are_tokens_of_both():
    """By the model's distribution over them, renormalised."""
    small = tiny(8, vocab=5, sharp=2.0)
    session = IntersectionDrafter(small, Translation(*TOKENIZERS), 4).begin([[3, 2]], None)
    draft = session.propose(steps_of([1]))
    with torch.no_grad():
        logits = small(torch.tensor([[3, 4]])).logits[0, -1]
    assert torch.allclose(draft.logits[0, 0], logits[[3, 2, 0]], atol=1e-5)
    assert draft.vocabulary.draft_to_target.tolist() == [0, 1, 2]


def test_a_token_becomes_several_and_one_without_text_ends_the_drafts():
    own = [4, 0, 1, 0]  # "bc", "c", "d" and "c"
    drafter = TranslatedDrafter(CallableDrafter(lambda history, count: own[:count]), Translation(*TOKENIZERS), 4)
    for count, tokens in ((6, [1, 2, 2]), (2, [1, 2]), (1, [1])):
        assert drafter.begin([[0]], None).propose(steps_of([count])).tokens.tolist() == [tokens]


def test_requests_come_and_go():
    model, translation = tiny(7, vocab=4, sharp=2.0), Translation(*TOKENIZERS)
    small = tiny(8, vocab=5, sharp=2.0)
    prompts = [[0, 1], [2], [3, 3, 1]]
    for drafter in (IntersectionDrafter(small, translation, 4), TranslatedDrafter(ModelDrafter(small), translation, 4)):
        scheduler = Scheduler(TransformersTarget(model), drafter, max_requests=2)
        asked = [scheduler.submit(prompt, sampling=Sampling(temperature=0.0), max_new_tokens=9) for prompt in prompts]
        scheduler.run()
        assert [own.result().tokens for own in asked] == [slow_greedy(model, prompt, 9) for prompt in prompts]


def test_a_prompt_that_says_nothing_to_the_drafter():
    """Of "d" alone, where the drafter has no such token: it drafts as soon as it has read anything."""
    letters = of_tokens("abcd"), of_tokens("abc")
    model, small = tiny(7, vocab=4, sharp=2.0), tiny(8, vocab=3, sharp=2.0)
    for drafter in (
        IntersectionDrafter(small, Translation(*letters), 4),
        TranslatedDrafter(ModelDrafter(small), Translation(*letters), 4),
    ):
        (result,) = generate(TransformersTarget(model), [[3]], drafter=drafter, max_new_tokens=12, temperature=0.0)
        assert result.tokens == slow_greedy(model, [3], 12)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 2)])
def test_tokenizers_have_more_tokens_than_models(sizes):
    """What the target has no id for ends the drafts; what the drafter has none for is left out of what it reads."""
    translation = Translation(of_tokens("abcd"), of_tokens("dcba"))
    model, small = tiny(7, vocab=sizes[0]), tiny(8, vocab=sizes[1])
    for drafter in (
        TranslatedDrafter(CallableDrafter(lambda history, count: [3, 0, 3]), translation, sizes[0]),  # "a", "d", "a"
        TranslatedDrafter(ModelDrafter(small), translation, sizes[0]),
        IntersectionDrafter(small, translation, sizes[0]),
    ):
        (result,) = generate(TransformersTarget(model), [[0, 2, 1]], drafter=drafter, max_new_tokens=8, temperature=0.0)
        assert result.tokens == slow_greedy(model, [0, 2, 1], 8)
    guessing = TranslatedDrafter(CallableDrafter(lambda history, count: [3, 0, 3]), translation, 3)
    assert guessing.begin([[0]], None).propose(steps_of([3])).tokens.tolist() == [[0]]


def test_arguments_are_checked():
    small, translation = tiny(8, vocab=5), Translation(*TOKENIZERS)
    with pytest.raises(TypeError, match="translation must be a Translation"):
        IntersectionDrafter(small, TOKENIZERS, 4)
    with pytest.raises(TypeError, match="translation must be a Translation"):
        TranslatedDrafter(ModelDrafter(small), TOKENIZERS, 4)
    with pytest.raises(ValueError, match="share a token, got none in common"):
        IntersectionDrafter(small, Translation(of_tokens("ab"), of_tokens("cd")), 2)
    with pytest.raises(ValueError, match="must draft chains and read no features, got ModelDrafter"):
        TranslatedDrafter(ModelDrafter(small, config=DraftConfig(siblings=1)), translation, 4)
    tree = TreeDrafter(ModelDrafter(small), Growth(2, 2, 2))
    with pytest.raises(TypeError, match="must draft chains, got a drafter of trees"):
        generate(TransformersTarget(tiny(7, vocab=4)), [[0]], drafter=TranslatedDrafter(tree, translation, 4))
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        TranslatedDrafter(ModelDrafter(small), translation, 0)
    with pytest.raises(ValueError, match=r"drafter must draft from the target's vocabulary.*got vocab_size=3"):
        generate(TransformersTarget(tiny(7, vocab=4)), [[0]], drafter=TranslatedDrafter(NGramDrafter(), translation, 3))
    config = T5Config(vocab_size=5, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoding = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="decoder alone to draft with another tokenizer"):
        IntersectionDrafter(encoding.eval(), translation, 4)
