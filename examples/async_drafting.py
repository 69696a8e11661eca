"""Drafting while the target checks: a drafter that takes a third of the target's time, before it and beside it."""

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec_kernels.decode import Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import AsyncDrafter, CallableDrafter

TARGET, DRAFT, DRAFTS = 0.060, 0.005, 4  # seconds of a pass and of a draft; drafts a step

torch.manual_seed(0)
torch.set_num_threads(1)  # what takes time here is asleep
config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, eos_token_id=None)
model, prompt = LlamaForCausalLM(config).eval(), [1, 2, 3]
(known,) = generate(TransformersTarget(model), [prompt], max_new_tokens=50, temperature=0.0)
text = prompt + known.tokens


class SlowTarget(TransformersTarget):
    """A target that takes its time, as on a device that computes by itself."""

    def begin(self, *arguments, **named):
        """Its sessions do."""
        session = super().begin(*arguments, **named)
        score = session.score

        def score_slowly(tokens, counts):
            time.sleep(TARGET)
            return score(tokens, counts)

        session.score = score_slowly
        return session


def propose(history, count):
    """What the target will write; now and then a draft is wrong."""
    time.sleep(DRAFT * count)
    places = range(len(history), len(history) + count)
    return [(text[place] + (place % 24 == 0)) % 99 for place in places if place < len(text)]


target, drafter = SlowTarget(model, check=False), CallableDrafter(propose)
for name, chosen in (("no drafts", None), ("before", drafter), ("beside", AsyncDrafter(drafter))):
    statistics, start = Statistics(), time.perf_counter()
    (result,) = generate(
        target, [prompt], drafter=chosen, num_draft=DRAFTS, max_new_tokens=50, temperature=0.0,
        statistics=statistics,
    )  # fmt: skip
    assert result.tokens == known.tokens
    step = 1000 * (time.perf_counter() - start) / statistics.steps
    print(f"{name:9} {statistics.tokens_per_step:.2f} tokens a step, {step:.0f} ms a step")
