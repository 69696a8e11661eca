"""Requests that come and go: two slots, priorities, one request cancelled, all read as they are decoded."""

import asyncio

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec_kernels.decode import Sampling, Scheduler, TransformersTarget
from specdec_kernels.decode.drafters import AdaptiveDrafter, NGramDrafter

torch.manual_seed(0)
config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, eos_token_id=None)
model = LlamaForCausalLM(config).eval()
# The drafter drafts less the more requests there are, down to nothing.
scheduler = Scheduler(TransformersTarget(model), AdaptiveDrafter(NGramDrafter(1)), max_requests=2)


async def serve(name, prompt, **options):
    """One user's request."""
    submission = scheduler.submit(prompt, **options)
    tokens = []
    async for token in submission:  # decodes a step of all requests meanwhile
        tokens.append(token.token)
        if name == "patience" and len(tokens) == 3:
            submission.cancel()
    result = submission.result()
    print(f"{name}: {len(tokens)} tokens, {result.finished or 'cancelled'}, {submission.acceptance.accepted} drafted")


async def main():
    """All of them at once."""
    await asyncio.gather(
        serve("greedy", [1, 2, 3], sampling=Sampling(temperature=0.0), max_new_tokens=40),
        serve("warm", [4, 5, 6], sampling=Sampling(temperature=0.8, top_p=0.9), seed=1, max_new_tokens=30),
        serve("patience", [7, 8], max_new_tokens=30, seed=2),
        serve("urgent", [9], max_new_tokens=10, seed=3, priority=1),
    )


asyncio.run(main())
