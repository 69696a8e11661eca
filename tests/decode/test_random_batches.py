"""Random batches (lengths, limits, stop tokens, drafters, rules, trees, parameters of each request, ends at any time)
against slow references that run every request alone, in full, without a cache.

``make test`` has fifty, ``make test-all`` thousands.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from decoding import drafters
from forms import some
from tiny import VOCAB, steady, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from specdec_kernels import LogitBias, Penalties, verify_chain
from specdec_kernels.decode import Scores, TransformersTarget, generate
from specdec_kernels.ops.trees import tree_mask

BATCHES, CHUNK = some(48, 4800), 12
CONTEXT = 40


def gpt2(seed):
    """Learned positions, of which there are just enough, and eager attention."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MODELS = {
    "llama": lambda: tiny(1, layers=2),
    "eager llama": lambda: tiny(4, layers=2, attn_implementation="eager"),
    "gpt2": lambda: gpt2(3),
}


@pytest.fixture(scope="module")
def models():
    return {name: steady(make()) for name, make in MODELS.items()}


def test_models_depend_on_their_whole_context(models):
    """Else nothing that goes wrong with it would be seen."""
    generator = torch.Generator().manual_seed(0)
    for model in models.values():
        distances = []
        for position in range(10):
            ids = torch.randint(0, VOCAB, (1, 12), generator=generator)
            other = ids.clone()
            other[0, position] = (ids[0, position] + 1) % VOCAB
            a, b = (model(x).logits[0, -1].detach().softmax(-1) for x in (ids, other))
            distances.append(float((a - b).abs().sum() / 2))
        assert sum(distance > 0.02 for distance in distances) >= 8, distances


@torch.inference_mode()
def logits_after(model, history):
    return model(torch.tensor([history])).logits[0, -1]


class SlowTarget:
    """Scores every row by a pass over its whole history."""

    device, stop_tokens, vocab_size = torch.device("cpu"), frozenset(), VOCAB

    def __init__(self, model):
        self.model = model

    def begin(self, prompts, max_new_tokens, feature_layers=()):
        (prompt,) = prompts
        history = list(prompt[:-1])
        session = SimpleNamespace(features=None, max_rows=lambda: 1 << 30, select=lambda slots: None)
        features = feature_layers or ()

        def passed(histories):
            made = [self.model(torch.tensor([each]), output_hidden_states=True) for each in histories]
            logits = torch.stack([out.logits[0, -1] for out in made])[None]
            if not features:
                return Scores(logits, None)
            rows = [torch.cat([out.hidden_states[layer][0, -1] for layer in features]) for out in made]
            return Scores(logits, torch.stack(rows)[None])

        def score(tokens, counts):
            session.rows = tokens[0].tolist()
            return passed([history + session.rows[: i + 1] for i in range(counts[0])])

        def score_tree(tokens, parents):
            session.rows = tokens[0].tolist()
            above = tree_mask(parents)[0]
            paths = [[token for token, up in zip(session.rows, row, strict=True) if up] for row in above]
            return passed([history + (path or [0]) for path in paths])

        session.score, session.score_tree = score, score_tree
        session.commit = lambda counts: history.extend(session.rows[: counts[0]])
        session.commit_path = lambda paths: history.extend(session.rows[node] for node in paths[0])
        if features and history:
            out = self.model(torch.tensor([history]), output_hidden_states=True)
            session.features = torch.cat([out.hidden_states[layer] for layer in features], -1)
        return session


def grammar_of(modulus):
    """Ids that leave no rest, and one that depends on how many there are."""

    def grammar(history):
        allowed = [token for token in range(VOCAB) if token % modulus == 0 or token == len(history) % VOCAB]
        return torch.tensor([sum(1 << token for token in allowed)], dtype=torch.int32)

    return grammar


def slow_tokens(model, prompt, limit, stops, rule, seed, sampling):
    """Token by token by the operator itself, with no drafts."""
    history = list(prompt)
    strengths = {name: sampling[name] for name in sampling if name.endswith("_penalty")}
    for _ in range(limit):
        new = history[len(prompt) :]
        bias, mask = sampling["logit_bias"], sampling["grammar"]
        token = verify_chain(
            logits_after(model, history)[None, None],
            torch.empty((1, 0), dtype=torch.int64),
            seed=seed,
            position=len(history),
            rule=rule,
            penalties=Penalties(torch.tensor([prompt]), torch.tensor([new], dtype=torch.int64), **strengths),
            logit_bias=LogitBias(torch.tensor([list(bias)]), torch.tensor([list(bias.values())])) if bias else None,
            bitmask=None if mask is None else mask(new)[None, None],
            backend="reference",
            **{name: sampling[name] for name in ("temperature", "top_k", "top_p", "min_p")},
        ).tokens[0, 0]
        history.append(int(token))
        if history[-1] in stops:
            break
    return history[len(prompt) :]


NAMES = [None, *drafters(tiny(1, layers=2))]
#: What they draft depends on the clock.
CLOCKED = [name for name in NAMES if name and "adaptive" in name]


def drafter_of(name, model, kind):
    """Those that read the target's features need a Llama."""
    if name is None or (kind == "gpt2" and any(word in name for word in ("feature", "medusa", "nested", "trees"))):
        return None
    return drafters(model, lambda *seed, **named: steady(tiny(*seed, **named)))[name]


def random_case(own):
    count = own.choice([1, 2, 2, 3, 3, 4, 6])
    prompts = [[own.randrange(VOCAB) for _ in range(own.choice([1, 1, 2, 3, 5, 9, 14]))] for _ in range(count)]
    limits = [own.choice([1, 2, 3, 6, 10, 16, CONTEXT + 1 - len(prompt)]) for prompt in prompts]

    def each(values):
        return [own.choice(values) for _ in prompts]

    sampling = {
        "temperature": each([0.0, 0.0, 0.7, 1.3]) if own.random() < 0.8 else [0.0] * count,
        "top_k": each([0, 0, 3, 6]),
        "top_p": each([1.0, 1.0, 0.8]),
        "min_p": each([0.0, 0.0, 0.1]),
        "repetition_penalty": each([1.0, 1.0, 1.3]),
        "presence_penalty": each([0.0, 0.0, 0.5]),
        "frequency_penalty": each([0.0, 0.0, 0.3]),
        "logit_bias": each([{}, {}, {3: 2.0, 5: -4.0}]),
        "grammar": each([None, None, None, grammar_of(2), grammar_of(3)]),
    }
    for name, off in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if own.random() < 0.5:
            sampling[name] = [off] * count
    return SimpleNamespace(
        kind=own.choice(list(MODELS)),
        prompts=prompts,
        limits=limits,
        sampling=sampling,
        rule=own.choice(["token", "block", "coupled"]),
        name=own.choice(NAMES),
        num_draft=own.choice([0, 1, 2, 4, 4, 7]),
        seeds=[own.randrange(1 << 40) for _ in prompts],
        stops=own.sample(range(VOCAB), own.choice([0, 0, 1, 2])),
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, BATCHES, CHUNK))
def test_random_batches(models, start):
    for number in range(start, start + CHUNK):
        case = random_case(random.Random(number))
        model = models[case.kind]
        greedy = all(temperature == 0 for temperature in case.sampling["temperature"])
        if case.name in CLOCKED and not greedy:
            case.rule = "coupled"
        options = {"num_draft": case.num_draft, "stop_tokens": case.stops, "rule": case.rule}
        drafter = drafter_of(case.name, model, case.kind)
        results = generate(
            TransformersTarget(model), case.prompts, drafter=drafter, max_new_tokens=case.limits, seed=case.seeds,
            **options, **case.sampling,
        )  # fmt: skip
        for slot, (prompt, result) in enumerate(zip(case.prompts, results, strict=True)):
            own = {name: values[slot] for name, values in case.sampling.items()}
            fixed = own["temperature"] == 0 or case.rule == "coupled" or drafter is None or case.num_draft == 0
            if fixed:  # the text does not depend on what is drafted
                limit, seed = case.limits[slot], case.seeds[slot]
                expected = slow_tokens(model, prompt, limit, case.stops, case.rule, seed, own)
            else:
                expected = generate(
                    SlowTarget(model), [prompt], drafter=drafter, max_new_tokens=case.limits[slot],
                    seed=case.seeds[slot], **options, **own,
                )[0].tokens  # fmt: skip
            assert result.tokens == expected, (number, slot, case)
            ended = "stop" if result.tokens[-1] in case.stops else "length"
            assert result.finished == ended, (number, slot, case)
