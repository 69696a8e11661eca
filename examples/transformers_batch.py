"""Decode a batch of prompts with a transformers model and an n-gram drafter, each request with its own parameters."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec_kernels.decode import Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import NGramDrafter

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
target = TransformersTarget(LlamaForCausalLM(config).eval())  # with a real model: AutoModelForCausalLM.from_pretrained
prompts = [[1, 2, 3, 4, 5, 1, 2, 3], [7, 8, 7, 8, 7], [9]]
parameters = {"max_new_tokens": [40, 24, 12], "temperature": [0.0, 0.7, 1.0], "top_p": 0.95, "seed": [1, 2, 3]}

statistics = Statistics()
results = generate(target, prompts, drafter=NGramDrafter(), num_draft=6, statistics=statistics, **parameters)
for result in results:
    print(result.finished, result.tokens)
print(f"{statistics.tokens_per_step:.2f} tokens a step, {statistics.accepted} of {statistics.proposed} drafts accepted")

# Greedy requests, and under the rule "coupled" all of them, give the same tokens without a drafter.
plain = generate(target, prompts, rule="coupled", **parameters)
drafted = generate(target, prompts, rule="coupled", drafter=NGramDrafter(), **parameters)
assert [each.tokens for each in plain] == [each.tokens for each in drafted]
