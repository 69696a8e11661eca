"""``model.generate(custom_generate=...)`` beside plain ``generate``: texts, distribution, what is refused."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import Architecture, build
from decoding import exact_distribution
from distributions import g_test, limit
from tiny import VOCAB, tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LogitsProcessor,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    StoppingCriteria,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation import logits_process as hf
from transformers.generation import stopping_criteria as hf_stops

from specdec_kernels.decode import Statistics
from specdec_kernels.decode.drafters import CallableDrafter, ModelDrafter, NGramDrafter
from specdec_kernels.integrations import transformers as ours
from specdec_kernels.integrations.transformers import generate

IDS = torch.tensor(
    [[0, 0, 0, 1, 2, 3, 1, 2], [0, 0, 0, 0, 0, 0, 0, 4], [0, 5, 6, 7, 8, 9, 5, 6], [3, 3, 4, 3, 3, 4, 3, 3]]
)
MASK = torch.tensor([[0] * pad + [1] * (8 - pad) for pad in (3, 7, 1, 0)])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
ONE = {"input_ids": IDS[:1, 3:], "attention_mask": MASK[:1, 3:]}

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    **COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "rotary_dim": 4,
}  # fmt: skip
#: Layers that attend to a window are for tests/test_architectures.py.
ARCHITECTURES = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8},
    "phi": {}, "phi3": {}, "gpt2": GPT2, "gptj": GPT2, "codegen": GPT2, "gpt_neox": {}, "falcon": {}, "stablelm": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {"n_head": 4, "n_layer": 2}, "starcoder2": {},
    "olmo2": {}, "cohere": {}, "granite": {}, "glm": {"head_dim": 8}, "smollm3": {},
}  # fmt: skip


#: One of each way to know positions; that all of them are decoded rightly is for tests/decode/test_architectures.py.
BRIEF = {"llama", "gpt2", "gptj", "gpt_neox", "falcon", "opt", "bloom", "glm"}


def architecture(name):
    torch.manual_seed(1)
    options = {**COMMON, **ARCHITECTURES[name]}
    if name in ("gpt2", "gptj", "codegen"):
        for alias in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            options.pop(alias)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options)).eval()


@pytest.fixture(scope="module")
def model():
    return tiny(1, layers=2)


@pytest.fixture(scope="module")
def assistant():
    return tiny(2)


def run(model, inputs=BATCH, custom=True, **options):
    named = {"max_new_tokens": 12, "pad_token_id": 0, **options}
    return model.generate(**inputs, **named, **({"custom_generate": generate} if custom else {}))


@pytest.mark.brief(kept=lambda parameters: parameters["name"] in BRIEF)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_texts_of_architectures(name, assistant):
    """Greedy texts are plain generate's; drawn ones, by the coupled rule, are a function of the seeds alone."""
    model = architecture(name)
    drawn = {"do_sample": True, "temperature": 0.8, "rule": "coupled", "seeds": [3, 4, 5, 6]}
    for inputs in (ONE, BATCH):
        want, results = run(model, inputs, custom=False), []
        drawn["seeds"] = drawn["seeds"][: len(inputs["input_ids"])]
        for way in ({"drafter": NGramDrafter(), "num_draft": 3}, {"assistant_model": assistant, "num_draft": 3}):
            statistics = Statistics()
            assert run(model, inputs, statistics=statistics, **way).tolist() == want.tolist()
            assert statistics.proposed > 0
            results.append(run(model, inputs, **{**drawn, "seeds": [3, 4, 5, 6][: len(inputs["input_ids"])]}, **way))
        assert results[0].tolist() == results[1].tolist() != want.tolist()


# --- distribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lookup", "assistant", "wrong"])
def test_the_distribution_of_drawn_texts(way):
    """Three tokens, against their exact distribution; another temperature, the control, is told from it."""
    target, count = tiny(7, vocab=3, sharp=0.8), 6_000
    distribution = exact_distribution(target, [1, 2], 0.8, 3)
    drafts = {"drafter": NGramDrafter(1)} if way == "lookup" else {"assistant_model": tiny(8, vocab=3, sharp=0.8)}
    torch.manual_seed(0)
    statistics = Statistics()
    out = run(
        target, {"input_ids": torch.tensor([[1, 2]]).expand(count, 2)}, max_new_tokens=3, do_sample=True, top_k=0,
        temperature=1.1 if way == "wrong" else 0.8, num_draft=2, statistics=statistics, **drafts,
    )  # fmt: skip
    assert statistics.accepted > 500
    seen = Counter(map(tuple, out[:, 2:].tolist()))
    statistic, freedom = g_test(
        np.array([float(seen[sequence]) for sequence in distribution]), np.array(list(distribution.values()))
    )
    assert (statistic < limit(freedom)) == (way != "wrong")


def test_seeds(model):
    """PyTorch's own generator fixes the texts; so does another one, or the seeds themselves; greedy needs none."""
    drawn = {"do_sample": True, "top_k": 0}
    torch.manual_seed(5)
    first = run(model, **drawn).tolist()
    assert run(model, **drawn).tolist() != first
    torch.manual_seed(5)
    assert run(model, **drawn).tolist() == first
    own = [run(model, generator=torch.Generator().manual_seed(seed), **drawn).tolist() for seed in (1, 1, 2)]
    assert own[0] == own[1] != own[2]
    assert run(model, seeds=[1, 2, 3, 4], **drawn).tolist()[:2] == run(model, seeds=[1, 2, 5, 6], **drawn).tolist()[:2]
    state = torch.get_rng_state()
    run(model)
    assert torch.equal(state, torch.get_rng_state())


# --- parameters -------------------------------------------------------------------------------------------------------

OPTIONS = {
    "repetition penalty": {"repetition_penalty": 1.4},
    "bias": {"sequence_bias": [[[3], -4.0], [[5], 2.5]]},
    "bias and penalty": {"sequence_bias": [[[3], -4.0], [[5], 2.5]], "repetition_penalty": 1.4},
    "bad words": {"bad_words_ids": [[3], [5, 6], [1, 2, 7]]},
    "n-grams": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": [1, 3, 5]},
    "suppressed at first": {"begin_suppress_tokens": [1, 2, 3, 5, 7, 9]},
    "end": {"eos_token_id": 3},
    "ends": {"eos_token_id": [3, 7]},
    "least length": {"eos_token_id": [3, 7], "min_new_tokens": 6},
    "least whole length": {"eos_token_id": [3, 7], "min_length": 13},
    "most length": {"max_new_tokens": None, "max_length": 14},
    "forced end": {"eos_token_id": 3, "forced_eos_token_id": 3},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [row, 5 + row, (int(ids[-1]) + 1) % VOCAB]},
    "normalised": {"renormalize_logits": True},
    "several": {
        "repetition_penalty": 1.3, "suppress_tokens": [1], "no_repeat_ngram_size": 3, "eos_token_id": 3,
        "min_new_tokens": 4,
    },
    "warpers of greedy": {"logits_processor": [hf.TemperatureLogitsWarper(0.5), hf.TopKLogitsWarper(3)]},
    "own processors": {"logits_processor": [hf.SuppressTokensLogitsProcessor([2, 4])], "repetition_penalty": 1.2},
    "own length": {"stopping_criteria": [hf_stops.MaxLengthCriteria(11)]},
    "own length beyond": {"stopping_criteria": [hf_stops.MaxLengthCriteria(24)]},
    "own length beyond most": {
        "max_new_tokens": None, "max_length": 10, "stopping_criteria": [hf_stops.MaxLengthCriteria(14)],
    },
    "own length beyond default": {"max_new_tokens": None, "stopping_criteria": [hf_stops.MaxLengthCriteria(31)]},
    "own lengths": {"stopping_criteria": [hf_stops.MaxLengthCriteria(24), hf_stops.MaxLengthCriteria(22)]},
    "own length of less than the prompt": {"stopping_criteria": [hf_stops.MaxLengthCriteria(3)]},
    "no end": {"eos_token_id": -1},
    "no end and an end": {"eos_token_id": [-1, 7]},
    "own end": {"stopping_criteria": [hf_stops.EosTokenCriteria(7)], "eos_token_id": 3},
    "config": {"generation_config": GenerationConfig(repetition_penalty=1.5, eos_token_id=3, pad_token_id=0)},
}  # fmt: skip


@pytest.mark.parametrize("way", ["lookup", "assistant"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_as_in_plain_generate(model, assistant, name, way):
    options = OPTIONS[name]
    want = run(model, custom=False, **options)
    drafts = {"drafter": NGramDrafter()} if way == "lookup" else {"assistant_model": assistant}
    assert run(model, **options, **drafts).tolist() == want.tolist()


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"most length", "no end", "normalised", "warpers of greedy"}))
def test_options_matter(model, name):
    """The control for the test above: without it the text is another one."""
    assert run(model, **OPTIONS[name]).tolist() != run(model).tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"top_k": 4}, {"top_k": 0, "top_p": 0.7}, {"top_k": 0, "min_p": 0.2}, {"top_k": 5, "top_p": 0.9, "min_p": 0.05}],
)
def test_filters_of_drawn_texts(model, options):
    """The first token's distribution, which transformers' own processors give."""
    count, drawn = 4_000, {"do_sample": True, "temperature": 1.5, **options}
    inputs = {"input_ids": IDS[3:].expand(count, -1)}
    torch.manual_seed(1)
    out = run(model, inputs, max_new_tokens=2, assistant_model=tiny(2), **drawn)
    scores = run(
        model, {"input_ids": IDS[3:]}, custom=False, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        **drawn,
    ).scores[0]  # fmt: skip
    probs = scores.double().softmax(-1)[0].numpy()
    assert 1 < (probs > 0).sum() < VOCAB
    counts = np.bincount(out[:, IDS.shape[1]].numpy(), minlength=VOCAB).astype(float)
    assert not counts[probs == 0].any()
    statistic, freedom = g_test(counts[probs > 0], probs[probs > 0])
    assert statistic < limit(freedom)


# --- what is returned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lookup", "assistant"])
def test_scores_and_logits(model, assistant, way):
    """As plain generate's, of every token up to the end of its sequence."""
    options = {
        "output_scores": True, "output_logits": True, "return_dict_in_generate": True, "repetition_penalty": 1.3,
        "suppress_tokens": [1], "eos_token_id": [3, 7],
    }  # fmt: skip
    drafts = {"drafter": NGramDrafter()} if way == "lookup" else {"assistant_model": assistant}
    got, want = run(model, **options, **drafts), run(model, custom=False, **options)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert len(got.scores) == len(got.logits) == len(want.scores) == got.sequences.shape[1] - IDS.shape[1]
    ended = torch.zeros(len(IDS), dtype=torch.bool)
    for step, token in enumerate(got.sequences[:, IDS.shape[1] :].unbind(1)):
        for mine, theirs in ((got.scores, want.scores), (got.logits, want.logits)):
            torch.testing.assert_close(mine[step][~ended], theirs[step][~ended], rtol=1e-3, atol=1e-3)
            assert not mine[step][ended].any()
        ended |= torch.isin(token, torch.tensor([3, 7]))
    assert ended.any()
    plain = run(model, return_dict_in_generate=True)
    assert plain.scores is plain.logits is None
    assert torch.is_tensor(run(model, output_scores=True))


def test_several_sequences(model):
    torch.manual_seed(2)
    out = run(model, ONE, do_sample=True, num_return_sequences=3)
    assert out.shape == (3, 5 + 12)
    assert len(set(map(tuple, out.tolist()))) == 3
    assert out[:, :5].tolist() == ONE["input_ids"].tolist() * 3


class Streamer:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamers(model, assistant):
    streamer = Streamer()
    out = run(model, ONE, streamer=streamer, assistant_model=assistant)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended
    with pytest.raises(ValueError, match="streamer takes a batch of one sequence, got 4"):
        run(model, streamer=Streamer())


class After(StoppingCriteria):
    """Ends a sequence behind two tokens of a kind in a row."""

    def __call__(self, input_ids, scores, **kwargs):
        if scores is not None and len(input_ids) == 1:  # ours, which does not ask about what has ended
            self.asked = True
            assert len(scores) == input_ids.shape[1] - self.length
            assert torch.equal(scores[-1].argmax(-1), input_ids[:, -1])
        return input_ids[:, -1] % 3 == 0


@pytest.mark.parametrize("scores", [False, True])
def test_stopping_criteria(model, assistant, scores):
    """Of transformers' own kind and the caller's, with padding behind the end."""
    criterion = After()
    criterion.length, criterion.asked = IDS.shape[1], False
    options = {"stopping_criteria": [criterion], "eos_token_id": 7}
    if scores:
        options |= {"output_scores": True, "return_dict_in_generate": True}
    got, want = run(model, assistant_model=assistant, **options), run(model, custom=False, **options)
    got, want = (out.sequences if scores else out for out in (got, want))
    assert got.tolist() == want.tolist()
    assert got.shape[1] < IDS.shape[1] + 12
    assert criterion.asked == scores
    late = hf_stops.MaxTimeCriteria(1.0, initial_timestamp=0.0)
    assert run(model, stopping_criteria=[late]).shape[1] == IDS.shape[1] + 1


def test_stop_strings(model):
    """With the criterion itself: ``model.generate`` drops the tokenizer that ``stop_strings=`` needs, and says so."""
    letters = [chr(97 + token) for token in range(VOCAB)]

    class Tokenizer(SimpleNamespace):
        def __call__(self, text, **kwargs):
            return {"input_ids": [letters.index(letter) for letter in text]}

    tokenizer = Tokenizer(
        get_vocab=lambda: {letter: token for token, letter in enumerate(letters)},
        convert_tokens_to_string="".join,
        _convert_id_to_token=letters.__getitem__,
        clean_up_tokenization_spaces=False,
    )
    tokens = run(model, ONE)[0, 5:].tolist()
    string = "".join(letters[token] for token in tokens[3:5])
    criterion = hf_stops.StopStringCriteria(tokenizer, string)
    options = {"stopping_criteria": [criterion]}
    assert run(model, ONE, **options).tolist() == run(model, ONE, custom=False, **options).tolist()
    assert run(model, ONE, **options).shape[1] <= 5 + 5
    with pytest.raises(ValueError, match="tokenizer"):
        run(model, ONE, stop_strings=[string], tokenizer=tokenizer)


@pytest.mark.parametrize("sampled", [False, True])
def test_lookups_that_nobody_named_are_as_many_as_pay(model, sampled):
    """All of them for one sequence that repeats itself, none where another one of the batch has nothing to look up; the
    greedy text is plain generate's, and a seed fixes the others."""
    again, nothing = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    drawn = {"do_sample": True, "top_k": 0, "seeds": [3, 4]} if sampled else {}
    proposed = []
    for rows in ([again], [again, nothing]):
        inputs, statistics = {"input_ids": torch.tensor(rows)}, Statistics()
        options = drawn | ({"seeds": drawn["seeds"][: len(rows)]} if sampled else {})
        named = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 6, **options}
        sequences = run(model, inputs, statistics=statistics, **named).tolist()
        assert sequences == run(model, inputs, **named).tolist()
        if not sampled:
            assert sequences == run(model, inputs, custom=False, max_new_tokens=6).tolist()
        proposed.append(statistics.proposed_at)
    assert sum(proposed[1]) < sum(proposed[0])


def test_drafters_and_their_number(model, assistant):
    asked = []
    drafter = CallableDrafter(lambda history, count: asked.append(count) or [1] * count)
    want = run(model, custom=False)
    assert run(model, drafter=drafter, num_draft=2).tolist() == want.tolist()
    assert max(asked) == 2
    asked.clear()
    run(model, drafter=drafter, prompt_lookup_num_tokens=3)
    assert max(asked) == 3
    asked.clear()
    run(model, drafter=drafter)
    assert max(asked) == 4
    statistics = Statistics()
    assert run(model, drafter=ModelDrafter(model), statistics=statistics).tolist() == want.tolist()
    assert statistics.accepted == statistics.proposed > 0
    with pytest.raises(ValueError, match="drafter and assistant_model must not both be passed"):
        run(model, drafter=drafter, assistant_model=assistant)


def test_what_generate_drops_is_found(model, assistant):
    """The names that are read from ``model.generate``, should transformers rename them; and a call without it."""
    assert {"assistant_model", "streamer", "synced_gpus"} <= set(inspect.signature(GenerationMixin.generate).parameters)
    assert ours._dropped_arguments() == {}
    seen = []
    drafter = ours.ModelDrafter
    try:
        ours.ModelDrafter = lambda *arguments: seen.append(arguments[0]) or drafter(*arguments)
        run(model, assistant_model=assistant)
    finally:
        ours.ModelDrafter = drafter
    assert seen == [assistant]


def test_no_process_is_waited_for(model, monkeypatch):
    """As transformers has it, under DeepSpeed ZeRO-3 and FSDP with several processes, unless it is told not to."""
    for name in ("is_deepspeed_zero3_enabled", "is_fsdp_managed_module"):
        for size in (1, 2):
            with monkeypatch.context() as patched:
                patched.setattr(ours, name, lambda *_: True)
                ours._check_processes(model, None)  # nothing is distributed
                patched.setattr(torch.distributed, "is_initialized", lambda: True)
                patched.setattr(torch.distributed, "get_world_size", lambda size=size: size)
                ours._check_processes(model, False)
                if size == 1:
                    ours._check_processes(model, None)
                else:
                    with pytest.raises(ValueError, match="synced_gpus must be False here, got True, or None where"):
                        ours._check_processes(model, None)


# --- what is refused --------------------------------------------------------------------------------------------------


class Unknown(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Derived(hf.TopKLogitsWarper):
    """Not what it is derived from."""


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8), 0)
    return cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_processor": [Unknown()]}, "logits_processor Unknown cannot be honoured"),
        ({"logits_processor": [Derived(3)]}, "logits_processor Derived cannot be honoured"),
        ({"remove_invalid_values": True}, "InfNanRemoveLogitsProcessor"),
        ({"exponential_decay_length_penalty": (2, 1.1), "eos_token_id": 3}, "ExponentialDecayLengthPenalty"),
        ({"encoder_repetition_penalty": 1.2}, "EncoderRepetitionPenaltyLogitsProcessor"),
        ({"encoder_no_repeat_ngram_size": 2}, "EncoderNoRepeatNGramLogitsProcessor"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"sequence_bias": [[[1, 2], 1.0]]}, "sequence_bias of more than one token"),
        ({"do_sample": True, "typical_p": 0.9}, "TypicalLogitsWarper"),
        ({"do_sample": True, "epsilon_cutoff": 0.1}, "EpsilonLogitsWarper"),
        ({"do_sample": True, "eta_cutoff": 0.1}, "EtaLogitsWarper"),
        ({"do_sample": True, "top_h": 0.5}, "TopHLogitsWarper"),
        ({"logits_processor": [hf.MinPLogitsWarper(0.1), hf.TemperatureLogitsWarper(0.7)]}, "Tempera.* behind MinP"),
        ({"logits_processor": [hf.TopKLogitsWarper(3), hf.SuppressTokensLogitsProcessor([1])]}, "Supp.* behind TopK"),
        ({"logits_processor": [hf.TemperatureLogitsWarper(0.7)], "do_sample": True, "temperature": 0.5,
          "top_k": 3}, "Temperature.* behind Temperature"),
        ({"logits_processor": [hf.TopPLogitsWarper(0.7, min_tokens_to_keep=2)]}, "min_tokens_to_keep=1"),
        ({"logits_processor": [hf.TopKLogitsWarper(3, filter_value=-9.0)]}, "filter_value=-inf"),
        ({"logits_processor": [hf.RepetitionPenaltyLogitsProcessor(1.2)]}, "must ignore the padding"),
        ({"num_beams": 2}, "greedy decoding or sampling, got beam_search"),
        ({"num_beams": 2, "do_sample": True}, "got beam_sample"),
        ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, "got contrastive_search"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions cannot be honoured"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states cannot be honoured"),
        ({"assistant_early_exit": 1}, "assistant_early_exit cannot be honoured"),
        ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight cannot be honoured"),
        ({"synced_gpus": True}, "synced_gpus must be False here, got True"),
        ({"assistant_model": tiny(2, vocab=9)},
         f"assistant_model must have the model's vocab_size {VOCAB}, got 9: .* drafter=IntersectionDrafter"),
        ({"assistant_model": tiny(2, vocab=20)}, "vocab_size 11, got 20"),
        ({"past_key_values": filled_cache()}, "past_key_values cannot be honoured"),
        ({"position_ids": torch.arange(8).expand(4, 8) + 1}, "position_ids must count"),
        ({"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}, "attention_mask must be 0 to the left"),
        ({"seeds": [1, 2]}, "seed must have one entry for each of the 4 prompts"),
        ({"stopping_criteria": [After()], "pad_token_id": None}, "pad_token_id must be set"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(model, options, message, monkeypatch):
    """Before anything is decoded."""

    def decodes(*arguments, **named):
        raise AssertionError("it was decoded")

    if "seeds" not in options:
        monkeypatch.setattr(ours, "stream", decodes)
    inputs = {name: options.get(name, BATCH[name]) for name in BATCH}
    with pytest.raises(ValueError, match=message):
        run(model, inputs, **{name: value for name, value in options.items() if name not in BATCH})


def test_rows_that_are_no_distribution(model):
    with pytest.raises(ValueError, match=r"sequence 0 cannot go on after \[\]: nothing is allowed"):
        run(model, suppress_tokens=list(range(VOCAB)))


def test_it_is_imported_when_it_is_used():
    modules = "specdec_kernels.integrations.flashinfer, specdec_kernels.integrations.sglang"
    code = f"import sys, {modules}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SOURCES = torch.tensor([[3, 4, 5, 6, 3, 4, 7], [8, 9, 1, 0, 0, 0, 0]])
SOURCE_MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])


def encoder_decoder(kind, seed=1):
    return build(
        Architecture(kind, {"decoder_start_token_id": 1, "pad_token_id": 0}), seed, "sdpa", AutoModelForSeq2SeqLM
    )


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_texts_of_encoder_decoders(kind):
    """Batches whose sources are padded; looked up in the source, and of an assistant that reads it too."""
    model, statistics = encoder_decoder(kind), Statistics()
    inputs = {"input_ids": SOURCES, "attention_mask": SOURCE_MASK}
    for options in (
        {}, {"repetition_penalty": 1.5, "num_return_sequences": 1}, {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
        {"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 7]])},
    ):  # fmt: skip
        plain = run(model, inputs, custom=False, do_sample=False, **options)
        assert torch.equal(run(model, inputs, do_sample=False, statistics=statistics, **options), plain)
    assert statistics.accepted > 0
    one = {"input_ids": SOURCES[:1], "attention_mask": SOURCE_MASK[:1]}
    plain = run(model, one, custom=False, do_sample=False)
    drafted = Statistics()
    assert torch.equal(run(model, one, do_sample=False, assistant_model=model, statistics=drafted), plain)
    assert drafted.accepted == drafted.proposed > 0
    given = run(model, inputs, do_sample=False, return_dict_in_generate=True, output_logits=True)
    known = run(model, inputs, custom=False, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert type(given) is type(known)
    assert torch.allclose(torch.stack(given.logits), torch.stack(known.logits), atol=1e-4)
    drawn = run(model, inputs, do_sample=True, num_return_sequences=2, seeds=[1, 2, 3, 4])
    assert drawn.shape[0] == 4
    assert torch.equal(
        drawn[2:], run(model, {"input_ids": SOURCES[1:, :3]}, do_sample=True, num_return_sequences=2, seeds=[3, 4])
    )


def test_sources_that_cannot_be_known_are_refused():
    model = encoder_decoder("t5")
    with pytest.raises(ValueError, match=r"attention_mask must be 1 in each source and 0 behind it"):
        run(model, {"input_ids": SOURCES, "attention_mask": SOURCE_MASK.flip(1)})
    encoded = model.encoder(input_ids=SOURCES[:1])
    with pytest.raises(ValueError, match="source must hold token ids"):
        run(model, {"encoder_outputs": encoded})
    with pytest.raises(ValueError, match="decoder_attention_mask cannot be honoured here"):
        run(model, {"input_ids": SOURCES[:1], "decoder_attention_mask": torch.ones(1, 1)})


@torch.no_grad()
def test_masks_of_sounds():
    """What is no text is taken without padding, but by Whisper, whose texts depend on no mask."""
    sizes = {
        "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "init_std": 0.3,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(WhisperConfig(
        num_mel_bins=8, max_source_positions=50, max_target_positions=40, suppress_tokens=None,
        begin_suppress_tokens=None, **sizes,
    )).eval()  # fmt: skip
    other = Speech2TextForConditionalGeneration(Speech2TextConfig(
        input_feat_per_channel=8, conv_channels=16, max_source_positions=100, max_target_positions=40, **sizes
    )).eval()  # fmt: skip
    for model, shape in ((whisper, (1, 8, 100)), (other, (1, 100, 8))):
        sounds, mask = 3 * torch.randn(shape), torch.ones(1, 100, dtype=torch.int64)
        inputs = {"input_features": sounds, "attention_mask": mask}
        whole = run(model, inputs, custom=False, do_sample=False)
        assert run(model, inputs, do_sample=False).tolist() == whole.tolist()
        mask[:, 16:] = 0
        plain = run(model, inputs, custom=False, do_sample=False)
        assert (plain.tolist() == whole.tolist()) == (model is whisper)
        if model is whisper:
            assert run(model, inputs, do_sample=False).tolist() == plain.tolist()
        else:
            with pytest.raises(ValueError, match=r"attention_mask must be 1 everywhere in .* 0 for Speech2Text"):
                run(model, inputs, do_sample=False)
