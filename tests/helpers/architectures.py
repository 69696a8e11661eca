"""Tiny models of any architecture of transformers, and what transformers writes with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from specdec_kernels.decode import TransformersTarget, generate

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
STATES: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
CHUNKS: dict[str, Any] = {"attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"]}
CONV: dict[str, Any] = {"layer_types": ["conv", "full_attention"]}


@dataclass(frozen=True)
class Architecture:
    """A type of model, what its configuration has beside the sizes (None: not this size), and what is refused."""

    kind: str
    named: dict[str, Any] = field(default_factory=dict)
    batches: bool = True
    trees: bool = True


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


def expected(model: Any, prompt: list[int], count: int = TOKENS) -> list[int]:
    """By transformers."""
    ids = torch.tensor([prompt])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    continued: list[int] = written[0, len(prompt) :].tolist()
    return continued


def decoded(model: Any, drafter: Any, prompts: list[list[int]], counts: int | list[int] = TOKENS) -> list[list[int]]:
    results = generate(
        TransformersTarget(model), prompts, drafter=drafter, num_draft=5, max_new_tokens=counts, temperature=0.0
    )
    return [result.tokens for result in results]
