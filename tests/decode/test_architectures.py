"""The right text in every architecture of transformers, in every kind of batch, or a clear refusal.

Tiny models with random weights of standard deviation 0.3 in float32: what they write is compared token for token with
transformers' own ``generate`` of each prompt alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from architectures import (
    CHUNKS,
    CONV,
    FULL,
    LOCAL,
    MAMBA,
    MIXED,
    MLA,
    PROMPTS,
    STATES,
    TOKENS,
    WINDOW,
    Architecture,
    build,
    decoded,
    expected,
)
from forms import EVERYTHING, some
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, logging

from specdec_kernels.decode import TransformersTarget, generate, stream
from specdec_kernels.decode.drafters import Growth, ModelDrafter, NGramDrafter, TreeDrafter

logging.set_verbosity_error()  # of configurations that are unlike any real one


pytestmark = pytest.mark.usefixtures("one_thread")


def plain(*kinds: str, **named: Any) -> dict[str, Architecture]:
    return {kind: Architecture(kind, named) for kind in kinds}


RIGHT: dict[str, Architecture] = {
    **plain(
        "apertus", "arcee", "aria_text", "biogpt", "bitnet", "codegen", "cohere", "ctrl", "diffllama", "dots1",
        "ernie4_5", "flex_olmo", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
        "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "internlm3", "jais2", "jetmoe", "llama",
        "minimax_m2", "ministral3", "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmoe", "opt", "persimmon",
        "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open",
        "stablelm", "starcoder2", "xglm",
    ),
    **plain("deepseek_v2", "deepseek_v3", **MLA),
    **plain("cohere2", "exaone4", "gemma2", "gemma3_text", "ministral", "olmo3", **FULL),
    **plain("mistral", sliding_window=None),
    "falcon": Architecture("falcon", {"head_dim": None}),
    "falcon, new decoder": Architecture("falcon", {"head_dim": None, "new_decoder_architecture": True}),
    "falcon, alibi": Architecture("falcon", {"head_dim": None, "alibi": True}, trees=False),
    "bloom": Architecture("bloom", trees=False),
    "mpt": Architecture("mpt", batches=False, trees=False),
    "gpt_neo": Architecture("gpt_neo", {**LOCAL, "window_size": 64}),
    "bart": Architecture("bart", batches=False, trees=False),
    "whisper": Architecture("whisper", batches=False),
    "electra, decoder": Architecture("electra", {"is_decoder": True}),
    **{
        f"{kind}, windows": Architecture(kind, named) for kind, named in {
            **dict.fromkeys(["mistral", "mixtral", "phi3", "starcoder2"], WINDOW),
            **dict.fromkeys(["cohere2", "exaone4", "gemma2", "gemma3_text", "ministral", "olmo3", "smollm3"], MIXED),
            "qwen2": {**MIXED, "use_sliding_window": True}, "gpt_oss": {**MIXED, "pad_token_id": 0},
            "llama4_text": CHUNKS,
        }.items()
    },
    **{
        f"{kind}, states": Architecture(kind, named, trees=False) for kind, named in {
            "mamba": {}, "falcon_mamba": {}, "mamba2": {"head_dim": 8, "num_heads": 8, "n_groups": 1},
            "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "bamba": {"attn_layer_indices": [1], **MAMBA},
            "granitemoehybrid": {**STATES, **MAMBA},
            **dict.fromkeys(["olmo_hybrid", "qwen3_5_text", "qwen3_next"], STATES),
            **dict.fromkeys(["lfm2", "lfm2_moe"], CONV),
        }.items()
    },
}  # fmt: skip


@lru_cache(maxsize=4)
def models(name: str, attention: str) -> tuple[Any, Any]:
    """A target, and a drafter that is right every now and then."""
    target, drafter, other = (build(RIGHT[name], seed, attention) for seed in (1, 1, 2))
    with torch.no_grad():
        for weights, noise in zip(drafter.parameters(), other.parameters(), strict=True):
            weights.lerp_(noise, 0.2)
    return target, drafter


@lru_cache(maxsize=4)
def sequences(name: str, attention: str) -> list[list[int]]:
    return [expected(models(name, attention)[0], prompt) for prompt in PROMPTS]


def drafters(model: Any) -> dict[str, Any]:
    return {
        "none": None,
        "n-gram": NGramDrafter(1),
        "model": ModelDrafter(model),
        "tree": TreeDrafter(ModelDrafter(model), Growth(depth=3, width=2, children=3)),
    }


#: (architecture, attention), of each that it has.
CASES = [
    (name, attention)
    for name, architecture in RIGHT.items()
    for attention in ("eager", "sdpa")
    if attention == "eager" or AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[architecture.kind]]._supports_sdpa
]


#: One of each way to know positions, and what is special in its masks: in both kinds of attention, alone, and in a
#: batch that stays as it is, every time.
BOTH = {"llama", "gpt2", "gptj", "bloom", "falcon", "gpt_neo", "opt", "mpt", "gemma2", "deepseek_v3", "whisper"}


#: With rotary positions, one mask for all layers and a cache of keys and values, as Llama.
AS_LLAMA = {
    "apertus", "arcee", "cohere", "dots1", "ernie4_5", "flex_olmo", "glm", "granite", "granitemoe", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "internlm3", "jais2", "minimax_m2", "ministral3", "nemotron", "olmo", "olmo2",
    "olmoe", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "seed_oss", "smollm3", "solar_open", "stablelm",
}  # fmt: skip


def in_brief(parameters: Any) -> bool:
    """Each architecture that is not as others are, in the attention that transformers prefers."""
    name, attention = parameters["name"], parameters["attention"]
    return name in BOTH or (name not in AS_LLAMA and (attention == "sdpa" or (name, "sdpa") not in CASES))


@pytest.mark.brief(kept=in_brief)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_text_is_that_of_transformers(name, attention):
    (model, small), known = models(name, attention), sequences(name, attention)
    architecture, lengths = RIGHT[name], [TOKENS, 6, 8]
    in_full = EVERYTHING or name in BOTH  # the others with drafts in the batch that shrinks alone
    for kind, drafter in drafters(small).items():
        if kind == "tree" and not architecture.trees:
            with pytest.raises(ValueError, match=r"trees.*draft chains"):
                decoded(model, drafter, PROMPTS[:1])
            continue
        if in_full or kind == "none" or not architecture.batches:
            assert decoded(model, drafter, PROMPTS[:1]) == known[:1], kind
        if not architecture.batches:
            with pytest.raises(ValueError, match=r"batches.*one at a time"):
                decoded(model, drafter, PROMPTS)
            continue
        if in_full:
            assert decoded(model, drafter, PROMPTS) == known, kind
        shrinking = [sequence[:length] for sequence, length in zip(known, lengths, strict=True)]
        assert decoded(model, drafter, PROMPTS, lengths) == shrinking, kind
    depends_on_its_first_token(model, name)


@pytest.mark.parametrize("name", [name for name in RIGHT if "windows" in name])
def test_windows_are_shorter_than_the_texts(name):
    kinds = TransformersTarget(build(RIGHT[name], 1, "eager")).layers
    assert {kind.window for kind in kinds} in ({4}, {4, None})


def depends_on_its_first_token(model: Any, name: str) -> None:
    """Else nothing that goes wrong with the history would be seen above. (With windows, on one out of the last's.)"""
    before, (_, *behind) = (PROMPTS[2][:2], PROMPTS[2][2:]) if "windows" in name else ([], PROMPTS[2])
    with torch.inference_mode():
        first, other = (model(torch.tensor([[*before, token, *behind]])).logits[0, -1] for token in (5, 17))
    assert (first - other).norm() > 0.02 * (first - first.mean()).norm()


#: Why a model is refused, and how it comes to be one.
REFUSED: dict[str, tuple[str, Architecture]] = {
    "bert": ("chains.*differ by", Architecture("bert")),
    "roberta, decoder": ("chains.*differ by", Architecture("roberta", {"is_decoder": True, "pad_token_id": 0})),
    "deepseek_v32": ("got .*Indexed", Architecture("deepseek_v32", MLA)),
    "doge": ("within the 8 positions", Architecture("doge", {"keep_window_size": 8})),
    "falcon_h1": ("keys and values, or of states, got .*LinearAttentionAndFull", Architecture("falcon_h1")),
    "minimax": ("uses cache of its own", Architecture("minimax", STATES)),
    "openai-gpt": ("must write its keys and values, or states", Architecture("openai-gpt")),
    "recurrent_gemma": (
        "must write its keys and values, or states",
        Architecture("recurrent_gemma", {"block_types": ["recurrent", "attention"], "lru_width": 32}),
    ),
    "rwkv": ("must write its keys and values, or states", Architecture("rwkv")),
    "xlnet": ("must write its keys and values, or states", Architecture("xlnet")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name):
    reason, architecture = REFUSED[name]
    model = build(architecture, 1, None)
    with pytest.raises(ValueError, match=reason):
        decoded(model, None, PROMPTS[:1])


def test_a_part_in_training_mode_is_refused():
    """Such as layers that checkpoint gradients, which leave the cache as it is, or drop out."""
    model = build(RIGHT["llama"], 1, "sdpa")
    model.model.layers[0].train()
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        TransformersTarget(model)
    target = TransformersTarget(model.eval())
    model.train()
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        generate(target, PROMPTS)


def test_logits_of_another_width_are_refused():
    model = build(RIGHT["llama"], 1, "sdpa")
    model.lm_head = torch.nn.Linear(32, 32, bias=False).eval()
    with pytest.raises(ValueError, match="vocab_size, 23, got 32 in LlamaForCausalLM"):
        TransformersTarget(model)
    with pytest.raises(ValueError, match="vocab_size, 23, got 32 in LlamaForCausalLM"):
        ModelDrafter(model)


def test_a_compiled_model_writes_the_same():
    """Its own forward pass takes anything; which arguments there are, the model within knows."""
    model = build(Architecture("llama", {"num_hidden_layers": 1}), 1, "sdpa")
    compiled, prompts = torch.compile(model, backend="eager", dynamic=True), some(PROMPTS[:1], PROMPTS)
    assert decoded(compiled, None, prompts, 2) == [expected(model, prompt, 2) for prompt in prompts]


def longrope(**named: Any) -> Architecture:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    scaled = {"rope_type": "longrope", **factors, "original_max_position_embeddings": 24}
    return Architecture("phi3", {"rope_parameters": scaled, "original_max_position_embeddings": 24, **named})


@pytest.mark.parametrize("kind", ["none", "model", "tree"])
def test_longrope_within_and_beyond_its_original_length(kind):
    """And with what the one leaves behind for the other; never across it."""
    model, small = (build(longrope(), seed, "sdpa") for seed in (1, 2))
    drafter, long = drafters(small)[kind], [(PROMPTS[2] * 4)[:length] for length in (26, 33, 30)]
    for prompts in (PROMPTS, long, PROMPTS):
        known = [expected(model, prompt) for prompt in prompts]
        expected(model, long[0])
        assert decoded(model, drafter, prompts) == known
    for prompts in (long[:1] + PROMPTS[:1], [long[0][:20]], [long[0][:25]]):
        with pytest.raises(ValueError, match="within 24 tokens"):
            decoded(model, drafter, prompts)
    assert decoded(model, drafter, [long[0][:15]]) == [expected(model, long[0][:15])]  # 24 that are read


@pytest.mark.parametrize("kind", ["none", "model", "tree"])
def test_dynamic_rotary_frequencies_end_with_the_positions(kind):
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    dynamic = Architecture("llama", {"rope_parameters": scaled, "max_position_embeddings": 24})
    model, small = (build(dynamic, seed, "sdpa") for seed in (1, 2))
    drafter, long = drafters(small)[kind], [(PROMPTS[2] * 4)[:length] for length in (15, 16, 30)]
    expected(model, long[2])  # grows the frequencies
    assert decoded(model, drafter, [*PROMPTS, long[0]]) == [expected(model, prompt) for prompt in [*PROMPTS, long[0]]]
    with pytest.raises(ValueError, match="within the 24 positions"):
        decoded(model, drafter, [*PROMPTS, long[1]])


def test_local_windows_by_column():
    """Beyond them: chains of one prompt, and nothing else."""
    local = Architecture("gpt_neo", {**LOCAL, "window_size": 8})
    model, small = (build(local, seed, "eager") for seed in (1, 2))
    offered = drafters(small)
    for kind in ("none", "n-gram", "model"):
        assert decoded(model, offered[kind], PROMPTS[:1]) == [expected(model, PROMPTS[0])]
    with pytest.raises(ValueError, match="one at a time beyond the local window of 8 tokens"):
        decoded(model, None, PROMPTS)
    with pytest.raises(ValueError, match="chains beyond the local window of 8 tokens"):
        decoded(model, offered["tree"], PROMPTS[:1])


def test_attention_without_masks_of_trees_is_refused():
    model, small = models("llama", "sdpa")
    tree, before = drafters(small)["tree"], model.config._attn_implementation
    try:
        model.config._attn_implementation = "flash_attention_2"  # of one token, nothing is read before the tree
        target = TransformersTarget(model, check=False)
        with pytest.raises(ValueError, match="'eager' or 'sdpa' to score trees, got 'flash_attention_2': draft chains"):
            generate(target, [[1]], drafter=tree, max_new_tokens=5)
    finally:
        model.config._attn_implementation = before


def test_a_model_can_write_between_two_tokens_of_a_stream():
    (model, small), known = models("gemma", "sdpa"), sequences("gemma", "sdpa")
    written: list[list[int]] = [[], [], []]
    for token in stream(
        TransformersTarget(model), PROMPTS, drafter=drafters(small)["tree"], max_new_tokens=TOKENS, temperature=0.0
    ):
        written[token.request].append(token.token)
        expected(model, PROMPTS[token.request], 3)
    assert written == known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_less_than_wrong_columns(dtype):
    """What is right passes, and what is not does not."""
    for name in ("llama", "qwen3_moe", "gpt2", "mpt"):
        model, small = (build(RIGHT[name], seed, "eager").to(dtype) for seed in (1, 2))
        if RIGHT[name].trees:
            decoded(model, drafters(small)["tree"], PROMPTS)
        else:
            with pytest.raises(ValueError, match=r"batches.*differ by"):
                decoded(model, None, PROMPTS)
            with pytest.raises(ValueError, match="no ALiBi to score trees, got MptForCausalLM: draft chains"):
                decoded(model, TreeDrafter(ModelDrafter(build(RIGHT["llama"], 1, "eager"))), PROMPTS[:1])
