"""Texts in, texts out: stop strings, samples that share a prompt, log-probabilities of prompts, whole characters."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch
from small_tokenizers import byte_level
from tiny import steady, tiny

from specdec_kernels.decode import SamplingParams, TextGenerator, TransformersTarget, generate
from specdec_kernels.decode.drafters import NGramDrafter

TOKENIZER = byte_level()
LETTERS = TOKENIZER.convert_tokens_to_ids(list("abcdé"[:4])) + TOKENIZER.encode("é")
PROMPT = "abca"
#: Nothing but four letters and the two halves of a fifth, so that strings come again.
ONLY = {token: -math.inf for token in range(len(TOKENIZER)) if token not in LETTERS}


@pytest.fixture(scope="module")
def model():
    return steady(tiny(1, vocab=len(TOKENIZER), sharp=2.0, layers=2))


def generator(model, **options):
    return TextGenerator(TransformersTarget(model), TOKENIZER, NGramDrafter(1), rule="coupled", **options)


def params(**named):
    return SamplingParams(**{"temperature": 0.9, "seed": 3, "max_new_tokens": 40, "logit_bias": ONLY, **named})


@pytest.fixture(scope="module")
def whole(model):
    """The text without stop strings."""
    (completion,) = generator(model).generate([PROMPT], params())[0]
    assert completion.finished == "length"
    assert completion.text == TOKENIZER.decode(completion.tokens)
    assert len(set(completion.text)) >= 4
    return completion.text


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("include", [False, True])
def test_the_text_ends_before_the_first_stop_string(model, whole, length, include):
    for start in range(0, 30, 7):
        stop = whole[start : start + length]
        others = ["never", stop, whole[-3:] + "z"]
        (made,) = generator(model).submit(PROMPT, params(stop=others, include_stop=include))
        pieces = list(made)
        completion = made.result()
        end = whole.index(stop)
        assert completion.text == whole[: end + length * include]
        assert "".join(pieces) == completion.text
        assert (completion.finished, completion.stop) == ("stop", stop)
        assert len(completion.tokens) < 40 or end + length >= len(whole) - 1


def test_of_two_stop_strings_the_one_that_is_complete_first(model, whole):
    long, short = whole[4:9], whole[6:8]
    end = min(whole.index(long) + 5, whole.index(short) + 2)
    stop = long if whole.index(long) + 5 < whole.index(short) + 2 else short
    completion = generator(model).generate([PROMPT], params(stop=[long, short], include_stop=True))[0][0]
    assert completion.stop == stop
    assert completion.text == whole[:end]


def test_pieces_are_whole_characters_and_no_beginnings_of_stop_strings(model, whole):
    stop = whole[10:13] + "never"
    (made,) = generator(model).submit(PROMPT, params(stop=stop))
    shown, held = "", set()
    for piece in made:
        shown += piece
        assert whole.startswith(shown)  # a character's half alone would be another one
        if not made.submission.done and not made._pieces:
            back = made._text.removeprefix(shown)
            held.add(len(back))
            assert back == max((stop[:k] for k in range(4) if made._text.endswith(stop[:k])), key=len)
    assert len(held) > 1
    assert shown == made.result().text == whole


def test_samples_share_the_reading_of_their_prompt(model):
    prompt = list(LETTERS) * 5
    rows = []
    hook = model.register_forward_pre_hook(lambda *args: rows.append(args[2]["input_ids"].numel()), with_kwargs=True)
    texts = TextGenerator(TransformersTarget(model, check=False), TOKENIZER, max_requests=3, chunk=7, rule="coupled")
    made = texts.generate([prompt], params(n=3, max_new_tokens=5))[0]
    hook.remove()
    assert rows == [7, 7, 7, 7, 1, *[3] * 5]  # once, then steps of all three
    for index, completion in enumerate(made):
        alone = generate(
            TransformersTarget(model), [prompt], seed=3 + index, temperature=0.9, max_new_tokens=5, logit_bias=ONLY,
            rule="coupled",
        )  # fmt: skip
        assert completion.tokens == alone[0].tokens
    assert len({tuple(completion.tokens) for completion in made}) > 1


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_log_probabilities_of_a_prompt(model, chunk):
    prompt = [*LETTERS, 7, *LETTERS]
    completion = generator(model, chunk=chunk).generate([prompt], params(prompt_logprobs=True))[0][0]
    with torch.no_grad():
        scores = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert math.isnan(completion.prompt_logprobs[0])
    want = [float(scores[position, token]) for position, token in enumerate(prompt[1:])]
    assert completion.prompt_logprobs[1:] == pytest.approx(want, abs=1e-5)
    without = generator(model).generate([prompt], params())[0][0]
    assert without.prompt_logprobs == []
    assert completion.tokens == without.tokens


@pytest.mark.parametrize("least", [0, 1, 5, 12])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_token_before_the_least_number(least, temperature):
    """In drafts neither; as transformers has it, where that can be compared."""
    model = steady(tiny(3, layers=2))
    stops, target = {2, 5, 7}, TransformersTarget(model)
    for drafter in (None, NGramDrafter(1)):
        for seed in range(5):
            options = {"seed": seed, "temperature": temperature, "max_new_tokens": 12, "stop_tokens": stops}
            (made,) = generate(target, [[1, seed]], drafter=drafter, min_new_tokens=least, rule="coupled", **options)
            assert len(made.tokens) >= least
            assert not stops & set(made.tokens[: max(0, least - 1)])
            if temperature == 0:
                want = model.generate(
                    torch.tensor([[1, seed]]), attention_mask=torch.ones(1, 2, dtype=torch.int64),
                    do_sample=False, max_new_tokens=12, min_new_tokens=least,
                    eos_token_id=sorted(stops), pad_token_id=0,
                )  # fmt: skip
                assert made.tokens == want[0, 2:].tolist()


def test_an_error_leaves_nothing_behind(model):
    """Neither one of a later prompt, nor one in the middle of a text."""

    def fails(history):
        raise KeyError("mine")

    texts = generator(model, max_requests=2)
    for bad, own, error in (([10**6], params(), ValueError), (PROMPT, params(grammar=fails), KeyError)):
        with pytest.raises(error):
            texts.generate([PROMPT, PROMPT, bad, PROMPT], [params(), params(n=2), own, params()])
        assert texts.scheduler.waiting == texts.scheduler.running == 0
        before = texts.scheduler.statistics.emitted
        assert len(texts.generate([PROMPT], params(max_new_tokens=4))[0][0].tokens) == 4
        assert texts.scheduler.statistics.emitted == before + 4


def test_more_prompts_than_may_wait(model, whole):
    texts = generator(model, max_requests=2, max_waiting=1)
    made = texts.generate((PROMPT for _ in range(7)), params())
    assert [completion.text for (completion,) in made] == [whole] * 7
    made = texts.generate([PROMPT] * 3, [params(n=2, seed=seed) for seed in (3, 2, 3)])
    assert [[whole in completion.text for completion in own] for own in made] == [
        [True, False], [False, True], [True, False],
    ]  # fmt: skip


def test_a_stop_string_in_what_was_held_back(model):
    """A text that is whole only at its end has ended with it."""
    first = {"logit_bias": {token: 0.0 if token == LETTERS[-2] else -math.inf for token in range(len(TOKENIZER))}}
    half = TOKENIZER.decode([LETTERS[-2]])
    (made,) = generator(model).generate([PROMPT], params(max_new_tokens=1, stop=half, **first))[0]
    assert (made.text, made.stop, made.finished) == ("", half, "stop")


def test_asynchronous_pieces(model, whole):
    async def read(continuation):
        return "".join([piece async for piece in continuation])

    async def main():
        texts = generator(model)
        made = [texts.submit(PROMPT, params(stop=whole[5:8]))[0], texts.submit(PROMPT, params())[0]]
        return await asyncio.gather(*map(read, made))

    assert asyncio.run(main()) == [whole[: whole.index(whole[5:8])], whole]


async def pieces_of(continuation):
    return [piece async for piece in continuation]


def test_pieces_go_on_where_waiting_for_one_was_cancelled(model, whole):
    """Before the first of them, and in between."""

    async def main():
        (made,) = generator(model).submit(PROMPT, params())
        pieces, shown = aiter(made), []
        for _ in range(3):
            waiting = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0)  # until it waits, where it does not have a piece at once
            if waiting.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                cancelled.append(len(shown))
            else:
                shown.append(await waiting)
            shown.append(await anext(pieces))
        return "".join(shown + await pieces_of(pieces))

    cancelled: list[int] = []
    assert asyncio.run(main()) == whole
    assert cancelled[0] == 0


def test_pieces_go_on_where_a_step_of_others_was_interrupted(model, whole):
    def interrupted(history):
        raise KeyboardInterrupt

    texts = generator(model, max_requests=1)
    texts.submit(PROMPT, params(grammar=interrupted))
    (made,) = texts.submit(PROMPT, params())
    pieces = iter(made)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert "".join(pieces) == whole


def test_a_cancelled_text_is_what_there_is(model, whole):
    (made,) = generator(model).submit(PROMPT, params())
    pieces = iter(made)
    shown = next(pieces) + next(pieces)
    made.cancel()
    shown += "".join(pieces)
    assert whole.startswith(shown)
    assert made.result().text == shown
    assert made.result().finished == ""


def test_a_character_that_is_cut_in_half_is_shown_once(model):
    """Whether the text is read in pieces, as a whole, or both, and however often."""
    first = {"logit_bias": {token: 0.0 if token == LETTERS[-2] else -math.inf for token in range(len(TOKENIZER))}}
    half = TOKENIZER.decode([LETTERS[-2]])
    for read in (lambda made: made.result().text, lambda made: "".join(made)):
        (made,) = generator(model).submit(PROMPT, params(max_new_tokens=1, **first))
        assert read(made) == half
        assert made.result().text == made.result().text == half


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 1.0}, TypeError, "n must be an int, got 1.0"),
        (
            {"stop": ["a", ""]},
            TypeError,
            r"stop must be a string or a list .* none of them empty, got \['a', ''\]",
        ),
        ({"stop": 7}, TypeError, "stop must be a string"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"min_new_tokens": 50}, ValueError, r"min_new_tokens must be in \[0, max_new_tokens = 40\], got 50"),
        ({"n": 9}, ValueError, "n must be at most max_requests=8, got 9"),
        ({"seed": 2**63}, ValueError, r"seed must be in \[-2\^63, 2\^63\), got 9223372036854775808"),
        ({"seed": 1.5}, TypeError, "seed must be an int or None, got 1.5"),
        (
            {"seed": 2**63 - 1, "n": 2},
            ValueError,
            r"seed must be at most 2\^63 - n for n=2 .*, got 9223372036854775807",
        ),
        ({"include_stop": 2}, TypeError, "include_stop must be True or False, got 2"),
        ({"prompt_logprobs": "no"}, TypeError, "prompt_logprobs must be True or False, got 'no'"),
    ],
)
def test_bad_parameters(model, named, error, message):
    with pytest.raises(error, match=message):
        generator(model).submit(PROMPT, params(**named))


def test_bad_use(model):
    with pytest.raises(TypeError, match="params must be SamplingParams, got dict"):
        generator(model).submit(PROMPT, {"n": 2})
    with pytest.raises(ValueError, match="params must have one entry for each of the 2 prompts, got 1"):
        generator(model).generate(["a", "b"], [params()])
    with pytest.raises(
        TypeError, match=r"prompts must be a list of texts or of token ids, \[prompt\] for one, got 'ab'"
    ):
        generator(model).generate("ab", params())
    with pytest.raises(TypeError, match="prompts must be a list of texts or of token ids, got 3"):
        generator(model).generate(3, params())
    with pytest.raises(TypeError, match="params must be a list of SamplingParams, got 3"):
        generator(model).generate(["a"], 3)
    slow = SimpleNamespace(all_special_ids=(), get_vocab=dict, encode=lambda text: [1], decode=lambda ids, **_: "")
    other = TextGenerator(TransformersTarget(tiny(1)), slow)
    assert other.generate(["x"], SamplingParams(max_new_tokens=2))[0][0].tokens
    with pytest.raises(ValueError, match="stop needs a tokenizer of the tokenizers library, got SimpleNamespace"):
        other.submit("x", SamplingParams(stop="a"))
