"""Constrained decoding: a model of random weights that can write nothing but a JSON list of digits."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec_kernels.decode import TransformersTarget, generate
from specdec_kernels.decode.drafters import CallableDrafter

CHARACTERS = "[],0123456789"
MOST = 20  # tokens of the answer


def grammar(generated):
    """What may follow, one bit for each id (xgrammar's layout); also asked for every draft of a step."""
    if not generated:
        allowed = "["
    elif CHARACTERS[generated[-1]].isdigit():
        allowed = "]" if len(generated) >= MOST - 2 else "],"
    else:
        allowed = "0123456789"
    return torch.tensor([sum(1 << CHARACTERS.index(character) for character in allowed)], dtype=torch.int32)


def propose(history, count):
    """Drafts of a person who knows JSON: a comma behind a digit, else a zero."""
    return [CHARACTERS.index("," if CHARACTERS[history[-1]].isdigit() else "0")] * min(count, 1)


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(CHARACTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, eos_token_id=CHARACTERS.index("]"), bos_token_id=None,
)  # fmt: skip
target = TransformersTarget(LlamaForCausalLM(config).eval())
prompt = [CHARACTERS.index("0")]
results = generate(
    target, [prompt] * 4, drafter=CallableDrafter(propose), grammar=grammar, max_new_tokens=MOST, seed=[1, 2, 3, 4]
)
for result in results:
    text = "".join(CHARACTERS[token] for token in result.tokens)
    print(result.finished, json.loads(text), "drafts accepted:", sum(result.drafted))
