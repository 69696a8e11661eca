"""llama.cpp as a target: against a stand-in of its interface, and where the package is installed (``make test-llama``)
against llama.cpp itself."""

from __future__ import annotations

import gc
import importlib.util
import sys

import pytest
import torch
from decoding import NAMES, OPTIONS, PROMPTS, TREES, drafters, exact_distribution, only_even
from distributions import g_test, limit
from forms import some
from llama_cpp_stand_in import LlamaCpp
from tiny import greedy, slow_greedy, steady, tiny

from specdec_kernels.cli.models import load_drafter, load_gguf, load_target, smollm2_gguf
from specdec_kernels.cli.prompts import PROMPTS as QUESTIONS
from specdec_kernels.decode import SourcePrompt, TransformersTarget, generate, llama_cpp
from specdec_kernels.decode.drafters import CallableDrafter, ModelDrafter, NGramDrafter
from specdec_kernels.decode.llama_cpp import LlamaCppTarget

CHAINS = [name for name in NAMES if name not in TREES]
MODEL = steady(tiny(1, layers=2))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Makes targets of stand-ins that the test describes."""

    def make(model=MODEL, *, name="model.gguf", **named):
        made = LlamaCpp(model, **named)
        monkeypatch.setitem(sys.modules, "llama_cpp", made)
        path = tmp_path / name
        path.touch()
        return made, path

    return make


@pytest.mark.parametrize("name", CHAINS)
def test_greedy_text_is_the_models(stand_in, name):
    target = LlamaCppTarget(stand_in()[1])
    lengths = [30, 9, 17, 1]
    results = generate(target, PROMPTS, drafter=drafters(MODEL)[name], temperature=0, max_new_tokens=lengths)
    for prompt, result, length in zip(PROMPTS, results, lengths, strict=True):
        assert result.tokens == greedy(MODEL, tuple(prompt), length)


@pytest.mark.parametrize("name", ["model", "lookup", "feature of two layers"])
@pytest.mark.parametrize("options", [*OPTIONS, "grammar"])
def test_drawn_text_is_that_of_a_model_of_transformers(stand_in, name, options):
    """Whose distribution is tested; the same logits and noise give the same tokens."""
    how = (
        {"temperature": 0.9, "grammar": [only_even, None, None, only_even]}
        if options == "grammar"
        else OPTIONS[options]
    )
    results = [
        generate(
            target, PROMPTS, drafter=drafters(MODEL, lambda *a, **n: steady(tiny(*a, **n)))[name], rule="block",
            max_new_tokens=[12, 20, 5, 9], seed=[1, 2, 3, 4], logprobs=True, **how,
        )
        for target in (LlamaCppTarget(stand_in()[1]), TransformersTarget(MODEL))
    ]  # fmt: skip
    for ours, theirs in zip(*results, strict=True):
        assert (ours.tokens, ours.drafted) == (theirs.tokens, theirs.drafted)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_the_distribution_is_exact(stand_in):
    model = tiny(4, vocab=3)
    target, requests, length = LlamaCppTarget(stand_in(model)[1]), some(400, 1500), 3
    drafter = ModelDrafter(tiny(5, vocab=3))
    distribution = exact_distribution(model, [1, 2], 0.8, length)
    for rule in ("token", "block"):
        counts = dict.fromkeys(distribution, 0)
        for first in range(0, requests, 4):  # batches, whose requests end a step at different numbers of drafts
            batch = generate(
                target, [[1, 2]] * 4, drafter=drafter, num_draft=2, max_new_tokens=length, temperature=0.8, rule=rule,
                seed=list(range(first, first + 4)),
            )  # fmt: skip
            for each in batch:
                counts[tuple(each.tokens)] += 1
        observed = torch.tensor(list(counts.values())).double()
        statistic, freedom = g_test(observed.numpy(), torch.tensor(list(distribution.values())).numpy())
        assert statistic < limit(freedom)


def test_long_prompts_are_read_in_passes(stand_in, monkeypatch):
    monkeypatch.setattr(llama_cpp, "PASS", 4)
    library, path = stand_in()
    prompts = [[1, 2, 3] * 5, [4, 5]]
    drafter = CallableDrafter(lambda history, count: [history[-1]] * count)
    results = generate(LlamaCppTarget(path), prompts, drafter=drafter, num_draft=5, temperature=0, max_new_tokens=8)
    assert [result.tokens for result in results] == [slow_greedy(MODEL, prompt, 8) for prompt in prompts]
    assert max(library.reads) == 4
    assert library.reads[:4] == [4, 4, 4, 3]


@pytest.mark.parametrize("layers", [(-1,), (0, 1, -1)])
def test_features_are_those_of_transformers(stand_in, layers):
    prompts, rows = [[1, 2, 3, 4, 5], [6, 7]], torch.tensor([[1, 2], [3, 4]])
    ours, theirs = (
        target.begin(prompts, [9, 9], layers) for target in (LlamaCppTarget(stand_in()[1]), TransformersTarget(MODEL))
    )
    for slot, prompt in enumerate(prompts):
        read = len(prompt) - 1
        torch.testing.assert_close(ours.features[slot, :read], theirs.features[slot, :read].float())
    mine, other = ours.score(rows, [2, 1]), theirs.score(rows, [2, 1])
    for slot, count in enumerate((2, 1)):
        torch.testing.assert_close(mine.features[slot, :count], other.features[slot, :count].float())
        torch.testing.assert_close(mine.logits[slot, :count], other.logits[slot, :count])
    assert mine.logits.shape == (2, 2, MODEL.config.vocab_size)


def test_contexts_are_as_large_as_their_requests_and_freed_with_them(stand_in):
    library, path = stand_in(context=1000)
    target = LlamaCppTarget(path, threads=3)
    generate(target, [[1, 2], [3]], max_new_tokens=[5, 300], temperature=0)
    (made,) = library.contexts
    assert made.n_ctx_seq == 512
    assert (made.parameters.n_threads, made.parameters.n_threads_batch) == (3, 3)
    gc.collect()
    assert sorted(library.freed) == ["batch", "context"]
    session = target.begin([[1, 2]], [5])
    del target
    gc.collect()
    assert "model" not in library.freed
    del session
    gc.collect()
    assert library.freed[-1] == "model"


def test_streams_do_not_see_each_other(stand_in):
    target = LlamaCppTarget(stand_in()[1])
    first, second = target.begin([[1, 2, 3]], [9]), target.begin([[4, 5]], [9])
    rows = torch.tensor([[6, 7]])
    for session, prompt in ((first, [1, 2]), (second, [4]), (first, [1, 2])):
        plain = MODEL(torch.tensor([[*prompt, 6, 7]])).logits[0, -2:]
        torch.testing.assert_close(session.score(rows, [2]).logits[0], plain)
        session.commit([0])


def test_stop_tokens_are_the_models(stand_in):
    target = LlamaCppTarget(stand_in(ends=(3, 7))[1])
    assert target.stop_tokens == {3, 7}
    (result,) = generate(target, [[1, 2]], max_new_tokens=60, seed=1)
    assert result.finished == "stop"
    assert result.tokens[-1] in (3, 7)


@pytest.mark.parametrize(
    ("prompts", "lengths", "message"),
    [
        (
            [[1, 2, 3], [4]],
            [19, 1],
            "within the 20 positions of model.gguf, the last token not counted, got 21 for pro",
        ),
        ([SourcePrompt([1], [1])], [1], r"prompts\[0\] must have no source for llama.cpp"),
        ([[1]] * 9, [1] * 9, "prompts must be at most 8, llama.cpp's sequences of a context, got 9"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(stand_in, prompts, lengths, message):
    library, path = stand_in(context=20)
    with pytest.raises(ValueError, match=message):
        generate(LlamaCppTarget(path), prompts, max_new_tokens=lengths)
    assert not library.contexts
    assert len(generate(LlamaCppTarget(path), [[1, 2, 3]], max_new_tokens=18, seed=1)[0].tokens) == 18


@pytest.mark.parametrize(
    ("described", "arguments", "error", "message"),
    [
        (
            {"kind": "is_recurrent"},
            {},
            ValueError,
            r"a decoder whose layers all attend to tokens, got .*\(is_recurrent\)",
        ),
        ({"kind": "has_encoder"}, {}, ValueError, r"\(has_encoder\)"),
        ({"name": "broken.gguf"}, {}, ValueError, "path must be a GGUF file that llama.cpp can load, got"),
        ({}, {"gpu_layers": -1}, ValueError, "gpu_layers must be 0 where llama.cpp was built without a GPU, got -1"),
        ({}, {"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({}, {"threads": True}, TypeError, "threads must be an int, got True"),
        ({}, {"gpu_layers": None}, TypeError, "gpu_layers must be an int, got None"),
    ],
)
def test_bad_constructions(stand_in, described, arguments, error, message):
    _, path = stand_in(**described)
    with pytest.raises(error, match=message):
        LlamaCppTarget(path, **arguments)


def test_layers_go_to_a_gpu_where_there_is_one(stand_in):
    library, path = stand_in(gpu=True)
    LlamaCppTarget(path, gpu_layers=-1)
    assert library.gpu_layers == -1


def test_a_file_or_package_that_is_missing(stand_in, monkeypatch):
    _, path = stand_in()
    with pytest.raises(FileNotFoundError, match=r"path must be a GGUF file, got '/nowhere.gguf'"):
        LlamaCppTarget("/nowhere.gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        ImportError, match=r"llama_cpp is not installed: pip install 'specdec-kernels\[llama\]' brings it"
    ):
        LlamaCppTarget(path)


@pytest.mark.parametrize(
    ("described", "layers", "message"),
    [
        ({}, (2, -1), r"feature_layers must be -1 or in \[0, 2\), got \(2, -1\)"),
        ({"architecture": "gemma"}, (1,), r"unless the architecture is one of .*, got \(1,\) of 'gemma'"),
    ],
)
def test_layers_that_llama_cpp_does_not_give(stand_in, described, layers, message):
    target = LlamaCppTarget(stand_in(**described)[1])
    with pytest.raises(ValueError, match=message):
        target.begin([[1, 2]], [3], layers)


def test_middle_layers_of_another_llama_cpp(stand_in):
    library, path = stand_in()
    library.llama_cpp._lib = object()
    with pytest.raises(ValueError, match=r"for a llama.cpp without llama_set_embeddings_layer_inp"):
        LlamaCppTarget(path).begin([[1, 2]], [3], (1,))
    LlamaCppTarget(path).begin([[1, 2]], [3], (-1,))


def test_failures_of_llama_cpp_are_errors(stand_in, monkeypatch):
    library, path = stand_in()
    session = LlamaCppTarget(path).begin([[1, 2]], [3])
    session.score(torch.tensor([[1]]), [1])
    monkeypatch.setattr(library, "llama_memory_seq_rm", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"llama.cpp cannot take back the tokens of model.gguf"):
        session.commit([1])
    monkeypatch.setattr(library, "llama_decode", lambda *_: 1)
    with pytest.raises(RuntimeError, match=r"llama.cpp could not read 1 tokens: llama_decode gave 1"):
        session.score(torch.tensor([[1]]), [1])
    monkeypatch.setattr(library, "llama_init_from_model", lambda *_: None)
    with pytest.raises(MemoryError, match=r"llama.cpp gave no context for 1 requests of 4 tokens"):
        LlamaCppTarget(path).begin([[1, 2]], [3])


def test_trees_are_refused(stand_in):
    target = LlamaCppTarget(stand_in()[1])
    with pytest.raises(ValueError, match="drafter must draft chains for LlamaCppTarget, got a tree"):
        generate(target, [[1, 2, 3]], drafter=drafters(MODEL)["tree"], max_new_tokens=4)


# --- llama.cpp itself -------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def smollm2():
    return load_gguf(smollm2_gguf())


def question(tokenizer, kind):
    message = [{"role": "user", "content": QUESTIONS[kind][0]}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


@real
def test_real_rows_are_the_same_however_many_are_read_together(smollm2):
    """On CPUs bit for bit, so that greedy texts do not depend on the drafts."""
    target, tokenizer = smollm2
    ids = question(tokenizer, "edit")
    session = target.begin([ids[:60]], [40])
    rows = torch.tensor([ids[59:75]])
    together = session.score(rows, [16]).logits[0]
    session.commit([0])
    for start, count in ((0, 1), (1, 2), (3, 5), (8, 8)):
        part = session.score(rows[:, start : start + count], [count]).logits[0]
        session.commit([count])
        torch.testing.assert_close(part, together[start : start + count], atol=0, rtol=0)


@real
@pytest.mark.parametrize("kind", QUESTIONS)
def test_real_greedy_text_is_its_own(smollm2, kind):
    import llama_cpp as library

    target, tokenizer = smollm2
    ids, own = question(tokenizer, kind), []
    model = library.Llama(str(target.path), n_ctx=512, flash_attn=True, verbose=False)  # by default llama.cpp has it on
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        own.append(token)
        if len(own) == 40 or token in target.stop_tokens:
            break
    for drafter in (None, NGramDrafter(1), load_drafter("model", target)):
        assert generate(target, [ids], drafter=drafter, temperature=0, max_new_tokens=40)[0].tokens == own
    batch = generate(target, [ids[:9], ids], drafter=NGramDrafter(1), temperature=0, max_new_tokens=40)
    assert batch[1].tokens == own


@real
def test_real_logits_and_features_are_nearly_those_of_the_dequantised_model(smollm2):
    """llama.cpp rounds what the layers read to eight bits, which transformers does not: a difference of 0.13 was seen.
    After another token it is above 0.5."""
    target, tokenizer = smollm2
    model, _ = load_target(dtype=torch.float32)
    prompts, layers = [question(tokenizer, "chat"), question(tokenizer, "story")[:20]], (10, 20, -1)
    ours, theirs = (each.begin(prompts, [8, 8], layers) for each in (target, TransformersTarget(model, check=False)))
    rows, width = torch.tensor([[5, 6, 7], [50, 60, 70]]), model.config.hidden_size

    def close(ours, theirs):
        assert ((ours - theirs).norm(dim=-1) < 0.25 * theirs.norm(dim=-1)).all()

    for kept in ([2, 1], [3, 3]):
        mine, other = ours.score(rows, [3, 2]), theirs.score(rows, [3, 2])
        for slot, count in enumerate((3, 2)):
            close(mine.logits[slot, :count], other.logits[slot, :count])
            for layer in range(len(layers)):
                part = slice(layer * width, (layer + 1) * width)
                close(mine.features[slot, :count, part], other.features[slot, :count, part])
        for session in (ours, theirs):
            session.commit([min(kept[0], 3), min(kept[1], 2)])
