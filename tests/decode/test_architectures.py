"""The right text in every architecture of transformers, in every kind of batch, or a clear refusal.

Tiny models with random weights of standard deviation 0.3 in float32: what they write is compared token for token with
transformers' own ``generate`` of each prompt alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, logging

from specdec_kernels.decode import TransformersTarget, generate, stream
from specdec_kernels.decode.drafters import Growth, ModelDrafter, NGramDrafter, TreeDrafter

logging.set_verbosity_error()  # of configurations that are unlike any real one

VOCAB, TOKENS = 23, 10
PROMPTS = [[1, 2, 3, 1, 2], [4, 5], [5, 6, 7, 8, 9, 5, 6, 11, 12]]

#: By every name that some configuration has for them.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "initializer_range": 0.3, "attention_dropout": 0.0,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "dff", "ffn_hidden_size", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4), "num_experts_per_tok": 2,
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip

MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": None}
FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
LOCAL: dict[str, Any] = {"attention_types": [[["global", "local"], 1]]}
WINDOW: dict[str, Any] = {"sliding_window": 4}  # fewer than are drafted
MIXED: dict[str, Any] = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CHUNKS: dict[str, Any] = {"attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models are so small that threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Architecture:
    """A type of model, what its configuration has beside the sizes (None: not this size), and what is refused."""

    kind: str
    named: dict[str, Any] = field(default_factory=dict)
    batches: bool = True
    trees: bool = True


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
}  # fmt: skip


def build(architecture: Architecture, seed: int, attention: str | None, auto: Any = AutoModelForCausalLM) -> Any:
    known = CONFIG_MAPPING[architecture.kind]()
    names = known.to_dict().keys() | known.attribute_map.keys()
    ids = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id", "forced_eos_token_id"])
    sizes = {name: value for name, value in SIZES.items() if name in names} | architecture.named
    given = {name: value for name, value in sizes.items() if name not in MLA or value is not None}
    config = CONFIG_MAPPING[architecture.kind](**ids | given)
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.3)
    return model


@lru_cache(maxsize=4)
def models(name: str, attention: str) -> tuple[Any, Any]:
    """A target, and a drafter that is right every now and then."""
    target, drafter, other = (build(RIGHT[name], seed, attention) for seed in (1, 1, 2))
    with torch.no_grad():
        for weights, noise in zip(drafter.parameters(), other.parameters(), strict=True):
            weights.lerp_(noise, 0.2)
    return target, drafter


def expected(model: Any, prompt: list[int], count: int = TOKENS) -> list[int]:
    """By transformers."""
    ids = torch.tensor([prompt])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    continued: list[int] = written[0, len(prompt) :].tolist()
    return continued


@lru_cache(maxsize=4)
def texts(name: str, attention: str) -> list[list[int]]:
    return [expected(models(name, attention)[0], prompt) for prompt in PROMPTS]


def decoded(model: Any, drafter: Any, prompts: list[list[int]], counts: int | list[int] = TOKENS) -> list[list[int]]:
    results = generate(
        TransformersTarget(model), prompts, drafter=drafter, num_draft=5, max_new_tokens=counts, temperature=0.0
    )
    return [result.tokens for result in results]


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


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_text_is_that_of_transformers(name, attention):
    (model, small), known = models(name, attention), texts(name, attention)
    architecture, lengths = RIGHT[name], [TOKENS, 3, 8]
    for kind, drafter in drafters(small).items():
        if kind == "tree" and not architecture.trees:
            with pytest.raises(ValueError, match=r"trees.*draft chains"):
                decoded(model, drafter, PROMPTS[:1])
            continue
        assert decoded(model, drafter, PROMPTS[:1]) == known[:1], kind
        if not architecture.batches:
            with pytest.raises(ValueError, match=r"batches.*one at a time"):
                decoded(model, drafter, PROMPTS)
            continue
        assert decoded(model, drafter, PROMPTS) == known, kind
        shrinking = [text[:length] for text, length in zip(known, lengths, strict=True)]
        assert decoded(model, drafter, PROMPTS, lengths) == shrinking, kind


@pytest.mark.parametrize("name", [name for name in RIGHT if "windows" in name])
def test_windows_are_shorter_than_the_texts(name):
    kinds = TransformersTarget(build(RIGHT[name], 1, "eager")).layers
    assert {kind.window for kind in kinds} in ({4}, {4, None})


@pytest.mark.parametrize("name", RIGHT)
def test_a_text_depends_on_its_first_token(name):
    """Else nothing that goes wrong with the history would be seen above. (With windows, on one out of the last row's.)"""
    model, _ = models(name, "eager")
    before, (_, *behind) = (PROMPTS[2][:2], PROMPTS[2][2:]) if "windows" in name else ([], PROMPTS[2])
    with torch.inference_mode():
        first, other = (model(torch.tensor([[*before, token, *behind]])).logits[0, -1] for token in (5, 17))
    assert (first - other).norm() > 0.02 * (first - first.mean()).norm()


STATE = "keys and values of tokens in every layer, got layers of .*Linear"

#: Why a model is refused, and how it comes to be one.
REFUSED: dict[str, tuple[str, Architecture]] = {
    "bert": ("chains.*differ by", Architecture("bert")),
    "roberta, decoder": ("chains.*differ by", Architecture("roberta", {"is_decoder": True, "pad_token_id": 0})),
    "deepseek_v32": ("got layers of .*Indexed", Architecture("deepseek_v32", MLA)),
    "doge": ("within the 8 positions", Architecture("doge", {"keep_window_size": 8})),
    "falcon_mamba": (STATE, Architecture("falcon_mamba")),
    "jamba": (STATE, Architecture("jamba")),
    "lfm2": (STATE, Architecture("lfm2", {"layer_types": ["conv", "full_attention"]})),
    "mamba": (STATE, Architecture("mamba")),
    "mamba2": (STATE, Architecture("mamba2", {"head_dim": 8, "num_heads": 8, "n_groups": 1})),
    "openai-gpt": ("must write its keys and values to the cache", Architecture("openai-gpt")),
    "qwen3_next": (STATE, Architecture("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]})),
    "recurrent_gemma": (STATE, Architecture("recurrent_gemma")),
    "rwkv": ("must write its keys and values to the cache", Architecture("rwkv")),
    "xlnet": ("must write its keys and values to the cache", Architecture("xlnet")),
    "t5": ("must be a decoder alone", Architecture("t5")),
    "bart, with its encoder": ("must be a decoder alone", Architecture("bart")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name):
    reason, architecture = REFUSED[name]
    whole = name in ("t5", "bart, with its encoder")
    model = build(architecture, 1, None, AutoModelForSeq2SeqLM if whole else AutoModelForCausalLM)
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
    compiled = torch.compile(models("llama", "sdpa")[0], backend="eager")
    assert decoded(compiled, None, PROMPTS, 2) == [text[:2] for text in texts("llama", "sdpa")]


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
    (model, small), known = models("gemma", "sdpa"), texts("gemma", "sdpa")
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
