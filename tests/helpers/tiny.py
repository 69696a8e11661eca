"""Small models for tests, and drafters that do what they should not.

Weights of standard deviation 0.3: with transformers' own 0.02 a text depends on its last token alone, and nothing that
goes wrong with the history before it is seen.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 11


def tiny(seed, vocab=VOCAB, layers=1, sharp=3.0, **named):
    """A Llama whose logits have a standard deviation of about ``sharp``."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, **named,
    })  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, sharp / 32**0.5)
        model.model.embed_tokens.weight.normal_(0, 1)
    return model


@torch.no_grad()
def slow_greedy(model, prompt, count):
    """The greedy continuation, each token by a pass over the whole history without a cache."""
    history = list(prompt)
    for _ in range(count):
        history.append(int(model(torch.tensor([history])).logits[0, -1].argmax()))
    return history[len(prompt) :]


@cache
def greedy(model, prompt, count):
    """The same, computed once, of a model that stays as it is; ``prompt`` is a tuple."""
    return slow_greedy(model, prompt, count)


class Altered:
    """A drafter whose proposals are changed by ``change(draft, step)`` before they are handed on."""

    def __init__(self, drafter, change):
        self.drafter, self.change = drafter, change
        self.feature_layers = drafter.feature_layers
        self.siblings = getattr(drafter, "siblings", 0)

    def begin(self, prompts, features):
        session = self.drafter.begin(prompts, features)
        return SimpleNamespace(
            propose=lambda step: self.change(session.propose(step), step),
            commit=session.commit,
            select=session.select,
            join=lambda other: session.join(other.session),
            session=session,
        )


class _RoundedHead(torch.nn.Module):
    """A head whose logits are rounded to float32."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    @property
    def weight(self):
        return self.head.weight

    def forward(self, x):
        return self.head(x).float()


def steady(model):
    """A model that computes in float64 and gives logits in float32: the same to the last bit whatever else is in the
    batch, so that texts can be compared token by token without a word about rounding."""
    model = model.double()
    model.set_output_embeddings(_RoundedHead(model.get_output_embeddings()).eval())
    return model
