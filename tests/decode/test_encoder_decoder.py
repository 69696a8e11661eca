"""Encoder-decoders: the text of transformers' own ``generate`` for each source alone, or a clear refusal."""

from __future__ import annotations

import copy
from collections import Counter
from functools import lru_cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import PROMPTS as CAUSAL
from architectures import TOKENS, Architecture, build, expected
from distributions import g_test, limit
from forms import some
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationMixin,
    logging,
)

from specdec_kernels.decode import (
    Sampling,
    Scheduler,
    SourcePrompt,
    StaticTarget,
    Statistics,
    TransformersTarget,
    generate,
)
from specdec_kernels.decode.drafters import (
    DraftConfig,
    FallbackDrafter,
    Growth,
    ModelDrafter,
    NGramDrafter,
    StaticDrafter,
    TreeDrafter,
)
from specdec_kernels.decode.drafters.histories import Histories
from specdec_kernels.decode.requests import make_requests
from specdec_kernels.decode.sources import EncodedSources
from specdec_kernels.integrations.recording import RecordingTarget
from specdec_kernels.lossy import SyntheticAcceptance

logging.set_verbosity_error()

START = 1
#: Of different lengths, as what the texts begin with is.
SOURCES = [[3, 4, 5, 6, 3, 4, 7], [8, 9], [5, 6, 7, 8, 9, 5, 6, 11, 12, 13, 14]]
BEGINNINGS = [[START], [START, 2, 3], [START, 4, 4, 5, 6]]
LENGTHS = [TOKENS, 3, 8]

STARTED: dict[str, Any] = {"decoder_start_token_id": START}
HEARD: dict[str, Any] = {
    **STARTED, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 128, "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip

RIGHT: dict[str, Architecture] = {
    **{
        kind: Architecture(kind, STARTED)
        for kind in ("t5", "bart", "mt5", "umt5", "mbart", "marian", "pegasus", "blenderbot", "plbart")
    },
    "t5, deeper decoder": Architecture("t5", {**STARTED, "num_decoder_layers": 3, "num_layers": 1}),
    "bart, shallower decoder": Architecture("bart", {**STARTED, "decoder_layers": 1, "encoder_layers": 3}),
    "whisper": Architecture("whisper", HEARD),
}

CASES = [(name, attention) for name in RIGHT for attention in ("eager", "sdpa")]

#: Each way to know positions: a bias of distances in the first layer and in all, learned ones, and sounds. One of them
#: in the other kind of attention too.
BRIEF = {"t5", "umt5", "bart", "whisper"}


pytestmark = pytest.mark.usefixtures("one_thread")


def made(architecture: Architecture, seed: int, attention: str = "sdpa") -> Any:
    auto = AutoModelForSpeechSeq2Seq if architecture.kind == "whisper" else AutoModelForSeq2SeqLM
    return build(architecture, seed, attention, auto)


@lru_cache(maxsize=4)
def models(name: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """A target, and a drafter that is right every now and then."""
    target, drafter, other = (made(RIGHT[name], seed, attention) for seed in (1, 1, 2))
    with torch.no_grad():
        for weights, noise in zip(drafter.parameters(), other.parameters(), strict=True):
            weights.lerp_(noise, 0.2)
    return target, drafter


def sources(name: str) -> list[Any]:
    torch.manual_seed(0)
    return [torch.randn(4, 12) for _ in SOURCES] if name == "whisper" else SOURCES


def written(model: Any, source: Any, beginning: list[int], count: int = TOKENS) -> list[int]:
    """By transformers; Whisper's own ``generate`` is about windows of sound. Its cache (5.23) has the layers of T5's
    encoder."""
    heard = isinstance(source, torch.Tensor)
    read = source[None] if heard else torch.tensor([source])
    named = {"input_features" if heard else "input_ids": read}
    if not heard:
        named["attention_mask"] = torch.ones_like(read)
    begun, cached = torch.tensor([beginning]), getattr(model.config, "num_decoder_layers", 2) == 2
    sequence = GenerationMixin.generate(
        model, **named, decoder_input_ids=begun, do_sample=False, max_new_tokens=count, use_cache=cached
    )
    continued: list[int] = sequence[0, len(beginning) :].tolist()
    return continued


@lru_cache(maxsize=4)
def sequences(name: str, attention: str = "sdpa") -> list[list[int]]:
    model = models(name, attention)[0]
    return [written(model, *pair) for pair in zip(sources(name), BEGINNINGS, strict=True)]


def decoded(model: Any, drafter: Any, prompts: list[Any], counts: Any = TOKENS, **named: Any) -> list[list[int]]:
    target = TransformersTarget(model)
    asked = [target.prompt(*prompt) for prompt in prompts]
    options = {"num_draft": 5, "temperature": 0.0, **named}
    return [result.tokens for result in generate(target, asked, drafter=drafter, max_new_tokens=counts, **options)]


def drafters(small: Any) -> dict[str, Any]:
    return {
        "none": None,
        "n-gram": NGramDrafter(1),
        "model": ModelDrafter(small),
        "both": FallbackDrafter(NGramDrafter(), ModelDrafter(small, config=DraftConfig(siblings=1))),
        "tree": TreeDrafter(ModelDrafter(small), Growth(depth=3, width=2, children=3)),
    }


def in_brief(parameters: Any) -> bool:
    name, attention = parameters["name"], parameters["attention"]
    return name in BRIEF and (attention == "sdpa" or name == "t5")


@pytest.mark.brief(kept=in_brief)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_text_is_that_of_transformers(name, attention):
    (model, small), known = models(name, attention), sequences(name, attention)
    prompts = list(zip(sources(name), BEGINNINGS, strict=True))
    shrinking = [sequence[:length] for sequence, length in zip(known, LENGTHS, strict=True)]
    for kind, drafter in drafters(small).items():
        assert decoded(model, drafter, prompts[:1]) == known[:1], kind
        assert decoded(model, drafter, prompts) == known, kind
        assert decoded(model, drafter, prompts, LENGTHS) == shrinking, kind
    depends_on_source_and_beginning(model, name)


def depends_on_source_and_beginning(model: Any, name: str) -> None:
    """Else nothing that goes wrong with either would be seen above."""
    source = sources(name)[2]
    other = source.flip(-1) if isinstance(source, torch.Tensor) else [17, *source[1:]]
    argument = "input_features" if name == "whisper" else "input_ids"
    with torch.inference_mode():
        first, others, begun = (
            model(**{argument: torch.as_tensor(read)[None]}, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            for read, ids in ((source, BEGINNINGS[2]), (other, BEGINNINGS[2]), (source, [START, 9, *BEGINNINGS[2][2:]]))
        )
    for changed in (others, begun):
        assert (first - changed).norm() > 0.02 * (first - first.mean()).norm()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_requests_come_and_go(name):
    """In a scheduler, where the longest source leaves first and a short one comes in its place."""
    (model, small), known = models(name), sequences(name)
    target = TransformersTarget(model)
    for drafter in (None, NGramDrafter(1), ModelDrafter(small)):
        scheduler = Scheduler(target, drafter, max_requests=2, chunk=2)
        order = [2, 0, 1, 2, 1]
        asked = [
            scheduler.submit(
                target.prompt(SOURCES[index], BEGINNINGS[index]), sampling=Sampling(temperature=0.0),
                max_new_tokens=LENGTHS[index],
            )
            for index in order
        ]  # fmt: skip
        scheduler.run()
        assert [own.result().tokens for own in asked] == [known[index][: LENGTHS[index]] for index in order]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sounds_of_another_dtype(dtype):
    """As a processor of transformers makes them, for models of any dtype; also where a plain pass is compared with."""
    model, heard = made(RIGHT["whisper"], 1).to(dtype), sources("whisper")[0]
    assert heard.dtype == torch.float32
    assert decoded(model, None, [(heard,)]) == decoded(model, None, [(heard.to(dtype),)])


def test_sounds_of_another_length_cannot_join():
    """What of them were padding is not known; the others go on."""
    model = models("whisper")[0]
    sessions = [EncodedSources(model, [SourcePrompt(torch.randn(4, 12), [START])]) for _ in range(2)]
    sessions[1]._states = sessions[1]._states[:, :-1]
    with pytest.raises(ValueError, match=r"must have one shape, got states of \[\(5, 32\), \(6, 32\)\]"):
        sessions[0].join(sessions[1])


def test_a_source_is_encoded_once(monkeypatch):
    model, small = models("t5")
    read = []
    for which in (model, small):
        encode = which.encoder.forward
        monkeypatch.setattr(which.encoder, "forward", lambda *a, encode=encode, **k: read.append(1) or encode(*a, **k))
    decoded(model, ModelDrafter(small), list(zip(SOURCES, BEGINNINGS, strict=True)))  # with its checks
    read.clear()
    decoded(model, ModelDrafter(small), list(zip(SOURCES, BEGINNINGS, strict=True)))
    assert len(read) == 2


def test_cross_attention_reads_the_source_once(monkeypatch):
    """Keys of the source are made in the first pass, and not again."""
    model = models("bart")[0]
    project, rows = model.model.decoder.layers[0].encoder_attn.k_proj, []
    linear = project.forward
    monkeypatch.setattr(project, "forward", lambda x: rows.append(x.shape[1]) or linear(x))
    target = TransformersTarget(model, check=False)
    generate(target, [target.prompt(SOURCES[0])], drafter=NGramDrafter(1), max_new_tokens=8, temperature=0.0)
    assert rows == [len(SOURCES[0])]


@pytest.mark.parametrize("beginning", [[START], [START, 3, 5]])
def test_lookup_in_the_source(beginning):
    """The beginning of a text is looked up at the beginning of its source; with ``sources=False`` in nothing."""
    prompt = SourcePrompt([7, 8, 9, 10, 11], beginning)
    for with_sources, drafts in ((True, [7, 8, 9]), (False, [])):
        session = NGramDrafter(1, sources=with_sources).begin([prompt], None)
        assert drafted(session, 3) == drafts
        session.commit([[9]], None)
        assert drafted(session, 2) == ([10, 11] if with_sources else [])


def with_two_vocabularies(kind: str) -> Any:
    """A model that reads other ids than it writes; as many of them, or more."""
    if kind == "put together":
        small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
        reads = BertConfig(vocab_size=60, pad_token_id=0, **small)
        config = EncoderDecoderConfig.from_encoder_decoder_configs(
            reads, BertConfig(vocab_size=23, pad_token_id=0, is_decoder=True, add_cross_attention=True, **small)
        )
        torch.manual_seed(1)
        model = EncoderDecoderModel(config).eval()
        model.config.decoder_start_token_id = START
        return model
    named = {"vocab_size": 23 if kind == "as many" else 60, "decoder_vocab_size": 23}
    return made(Architecture("marian", {**STARTED, **named, "share_encoder_decoder_embeddings": False}), 1)


@pytest.mark.parametrize("kind", ["as many", "more", "put together"])
@pytest.mark.parametrize("way", ["target.prompt", "SourcePrompt", "Scheduler", "RecordingTarget"])
def test_no_lookup_in_ids_of_another_vocabulary(kind, way, monkeypatch):
    """Whoever makes the prompt: the text is the model's, and what is drafted depends on no source."""
    model = with_two_vocabularies(kind)
    target: Any = TransformersTarget(model)
    assert [each.shares_ids for each in (target, SyntheticAcceptance(target, [0.5]))] == [False, False]
    ids = [START, 5, 6, 7, 8, 22] if kind == "as many" else [START, 5, 6, 57, 58, 59]
    prompt = SourcePrompt(ids, [START, 5]) if way == "SourcePrompt" else target.prompt(ids, [START, 5])
    known, looked_up = [], Histories.__init__
    monkeypatch.setattr(Histories, "__init__", lambda self, texts: known.extend(texts) or looked_up(self, texts))
    options = {"max_new_tokens": 6, "stop_tokens": ()}
    if way == "Scheduler":
        submission = Scheduler(target, NGramDrafter(1)).submit(prompt, sampling=Sampling(temperature=0.0), **options)
        text = submission.result().tokens
    else:
        wrapped = RecordingTarget(target) if way == "RecordingTarget" else target
        (result,) = generate(wrapped, [prompt], drafter=NGramDrafter(1), temperature=0.0, **options)
        text = result.tokens
    assert [list(history) for history in known] == [[START, 5]]
    (alone,) = generate(target, [prompt], temperature=0.0, **options)
    assert text == alone.tokens


def test_ids_beyond_the_vocabulary_are_looked_up_nowhere():
    """Whatever is said of them: by a target of one's own, say, which says nothing."""
    source = [START, 5, 6, 57, 58, 59]
    for shares_ids, vocab, found in ((True, 60, True), (False, 60, False), (True, 59, False)):
        (request,) = make_requests([SourcePrompt(source, [START])], vocab, 1, 4, {}, shares_ids=shares_ids)
        assert isinstance(request.prompt, SourcePrompt)
        assert request.prompt[:1].shares_ids == copy.deepcopy(request.prompt).shares_ids == found
    with pytest.raises(TypeError, match="shares_ids must be True or False, got 1"):
        SourcePrompt([1], [1], 1)


def drafted(session: Any, count: int) -> list[int]:
    tokens: list[list[int]] = session.propose(SimpleNamespace(num_draft=[count])).tokens.tolist()
    return tokens[0]


@pytest.mark.brief(kept=lambda named: (named["kind"] == "model") == (named["rule"] == "block"))
@pytest.mark.parametrize("kind", ["n-gram", "model", "tree"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_drawn_text_has_the_models_distribution(kind, rule):
    """Of four ids and three tokens, by a model of its own for the target, for all texts together."""
    tiny = Architecture("t5", {**STARTED, "vocab_size": 4, "d_model": 16, "d_kv": 4, "d_ff": 16})
    model, small = made(tiny, 3), made(tiny, 4)
    with torch.no_grad():
        for each in (model, small):
            each.lm_head.weight.normal_(0, 0.4)
    drafter = {
        "n-gram": NGramDrafter(1),
        "model": ModelDrafter(small, config=DraftConfig(temperature_scale=0.7)),
        "tree": TreeDrafter(ModelDrafter(small), Growth(depth=2, width=2, children=2)),
    }[kind]
    source, count, batch, length = [2, 3, 1], some(4_000, 6_000), 2_000, 3
    probs = exact(model, source, length)
    seen, steps, target = Counter[tuple[int, ...]](), Statistics(), TransformersTarget(model)
    other = target.prompt([1, 2, 0, 3, 3])  # a longer one, so that the others are padded
    for start in range(0, count, batch):
        prompts = [target.prompt(source)] * batch
        results = generate(
            target, [*prompts, other], drafter=drafter, num_draft=3, max_new_tokens=length, temperature=0.8, rule=rule,
            seed=list(range(start, start + batch + 1)), statistics=steps,
        )  # fmt: skip
        seen.update(tuple(result.tokens) for result in results[:-1])
    assert steps.accepted > 300
    observed = np.array([float(seen[sequence]) for sequence in probs])
    statistic, freedom = g_test(observed, np.array(list(probs.values())))
    assert statistic < limit(freedom)


@torch.no_grad()
def exact(model: Any, source: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Of every text."""
    every = list(product(range(model.config.vocab_size), repeat=length))
    tokens = torch.tensor([[START, *sequence[:-1]] for sequence in every])
    read = torch.tensor([source]).expand(len(every), -1)
    probs = (model(input_ids=read, decoder_input_ids=tokens).logits.double() / 0.8).softmax(-1)
    return {
        sequence: float(own[torch.arange(length), list(sequence)].prod())
        for sequence, own in zip(every, probs, strict=True)
    }


def test_models_do_with_others_what_they_did():
    """Passes of transformers between ours and after, and copies, which are told positions of their own."""
    model, known = models("bart")[0], sequences("bart")
    pairs = list(zip(SOURCES, BEGINNINGS, strict=True))
    again = copy.deepcopy(model)
    assert [written(model, *pair) for pair in pairs] == known
    assert [written(again, *pair) for pair in pairs] == known
    assert decoded(again, None, pairs) == known
    assert type(again.model.decoder.embed_positions).__name__ == "BartLearnedPositionalEmbedding"


def test_positions_by_column_are_refused_in_batches_and_trees():
    """A decoder that cannot be told them writes one text at a time."""
    named = {**STARTED, "pad_token_id": 0, "max_decoder_position_embeddings": 64, "attention_window": 4}
    model = made(Architecture("led", named), 1, "eager")
    pairs = list(zip(SOURCES, BEGINNINGS, strict=True))
    for pair in pairs:
        assert decoded(model, NGramDrafter(1), [pair]) == [written(model, *pair)]
    with pytest.raises(ValueError, match=r"batches.*one at a time"):
        decoded(model, None, pairs)
    with pytest.raises(ValueError, match=r"trees.*draft chains"):
        decoded(model, TreeDrafter(ModelDrafter(made(RIGHT["t5"], 1))), pairs[:1])


def test_prompts_are_checked():
    model = models("t5")[0]
    target, bart = TransformersTarget(model), TransformersTarget(models("bart")[0])
    options = {"max_new_tokens": 2}
    with pytest.raises(TypeError, match=r"prompts\[0\] must be a SourcePrompt for T5ForConditionalGeneration"):
        generate(target, [[1]], **options)
    with pytest.raises(ValueError, match=r"prompts\[0\].source must hold token ids in \[0, 23\), got 23 at index 1"):
        generate(target, [target.prompt([1, 23])], **options)
    with pytest.raises(TypeError, match=r"prompts\[0\].source must be token ids for T5.*, got Tensor"):
        generate(target, [target.prompt(torch.zeros(3))], **options)
    with pytest.raises(ValueError, match=r"prompts\[0\].source must have at most 128 tokens, got 129"):
        generate(bart, [bart.prompt([1] * 129)], **options)
    with pytest.raises(ValueError, match="source must not be empty"):
        target.prompt([])
    with pytest.raises(ValueError, match=r"source must hold token ids .* got -1"):
        target.prompt([-1])
    with pytest.raises(ValueError, match="prompts must not be empty"):
        generate(target, [target.prompt([1], [])], **options)
    causal = build(Architecture("llama"), 1, "sdpa")
    with pytest.raises(ValueError, match=r"prompts\[0\] must have no source for LlamaForCausalLM"):
        generate(TransformersTarget(causal), [target.prompt([1])], **options)
    with pytest.raises(TypeError, match="encoder-decoder to have sources, got LlamaForCausalLM"):
        TransformersTarget(causal).prompt([1])
    with pytest.raises(TypeError, match="must be a SourcePrompt"):
        generate(TransformersTarget(causal), [[1, 2]], drafter=ModelDrafter(model), **options)
    heard = TransformersTarget(models("whisper")[0])
    with pytest.raises(TypeError, match=r"must be a floating tensor, its input_features for Whisper.*, got list"):
        generate(heard, [heard.prompt([1, 2])], **options)
    with pytest.raises(ValueError, match=r"must have one shape, got \[\(4, 11\), \(4, 12\)\]"):
        generate(heard, [heard.prompt(torch.zeros(4, 12)), heard.prompt(torch.zeros(4, 11))], **options)


def test_what_has_no_encoder_refuses_encoder_decoders():
    model = models("t5")[0]
    with pytest.raises(ValueError, match=r"decoder alone for steps of static shapes.*TransformersTarget"):
        StaticTarget(model)
    with pytest.raises(ValueError, match=r"decoder alone for drafts of static shapes.*ModelDrafter"):
        StaticDrafter(model)
    drafter = NGramDrafter()
    drafter.feature_layers = (-1,)
    target = TransformersTarget(model)
    with pytest.raises(ValueError, match="decoder alone where a drafter reads hidden states"):
        generate(target, [target.prompt([1, 2])], drafter=drafter, max_new_tokens=2)


def test_a_decoder_alone_drafts_for_an_encoder_decoder():
    """It knows nothing of the source."""
    drafter = ModelDrafter(build(Architecture("llama"), 1, "sdpa"))
    assert decoded(models("t5")[0], drafter, [(SOURCES[0], BEGINNINGS[0])]) == sequences("t5")[:1]
    assert len(expected(drafter.model, CAUSAL[0])) == TOKENS


def test_windows_of_fixed_rows():
    """An encoder-decoder is scored in them as a decoder is."""
    model, small = models("t5")
    target = TransformersTarget(model, fixed_rows=4)
    for drafter in (None, ModelDrafter(small)):
        (result,) = generate(
            target, [target.prompt(SOURCES[2], BEGINNINGS[2])], drafter=drafter, max_new_tokens=TOKENS, temperature=0.0
        )
        assert result.tokens == sequences("t5")[2]


def test_a_prompt_with_a_source_is_a_sequence_of_its_tokens():
    prompt = SourcePrompt([4, 5], [1, 2, 3])
    assert list(prompt) == [1, 2, 3]
    assert prompt[1] == 2
    assert isinstance(prompt[:2], SourcePrompt)
    assert (prompt[:2].source, list(prompt[:2])) == ([4, 5], [1, 2])
    assert copy.deepcopy(prompt).source == [4, 5]


@pytest.mark.parametrize("name", ["t5, deeper decoder", "bart, shallower decoder"])
def test_depths_of_encoder_and_decoder_differ(name):
    assert decoded(models(name)[0], NGramDrafter(1), [(SOURCES[0], BEGINNINGS[0])]) == sequences(name)[:1]
