"""Where tensors are made, and how often the host waits for them.

Under ``torch.set_default_device("meta")`` whatever is made without a device of its own has no data, and fails at once
when it meets a tensor that has. So a CPU shows what would lie on the wrong side of a GPU.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from decoding import NAMES, OPTIONS, PROMPTS, SESSIONS, drafters
from host_reads import HostReads
from tiny import VOCAB, tiny

from specdec_kernels.decode import Statistics, TransformersTarget, generate, stream


@pytest.fixture(scope="module")
def model():
    return tiny(1, layers=2)


@contextmanager
def foreign_defaults():
    """Everything that somebody else may have set for code of their own."""
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_default_dtype(dtype)


def only_even(tokens):
    """Even tokens, and the one behind an even number of tokens is not 0."""
    allowed = sum(1 << token for token in range(0, VOCAB, 2)) - (len(tokens) % 2 == 0)
    return torch.tensor([allowed], dtype=torch.int32, device="cpu")


PROCESSING = {
    **OPTIONS,
    "grammar": {"temperature": 0.9, "grammar": [only_even, None, only_even, only_even]},
    "logprobs": {"temperature": 0.9, "logprobs": True},
}


def decoded(model, name, surroundings=nullcontext, **options):
    """What is generated for a batch that shrinks: tokens and their log-probabilities."""
    drafter = None if name is None else drafters(model)[name]
    if name is not None and "adaptive" in name:  # what it drafts depends on the clock; a greedy text does not
        options["temperature"] = 0.0
    options = {"num_draft": 3, "max_new_tokens": [9, 3, 5, 7], "seed": 3, "temperature": 0.9, **options}
    with surroundings():
        results = generate(TransformersTarget(model), PROMPTS, drafter=drafter, **options)
    return [(result.tokens, [str(value) for value in result.logprobs]) for result in results]


RULES = ("token", "block", "coupled")


def in_brief(parameters):
    """Each drafter with one rule, and one of each kind with all."""
    name, rule = parameters["name"], parameters["rule"]
    return name in (None, "model", "tree") or rule == RULES[NAMES.index(name) % 3]


@pytest.mark.brief(kept=in_brief)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [None, *NAMES])
def test_everything_is_made_where_and_as_what_it_is_meant_to_be(model, name, rule):
    assert decoded(model, name, foreign_defaults, rule=rule) == decoded(model, name, rule=rule)


@pytest.mark.parametrize("options", PROCESSING)
@pytest.mark.parametrize("name", [None, "model", "lookup", "tree", "siblings"])
def test_so_is_all_that_logits_are_processed_with(model, name, options):
    processing = PROCESSING[options]
    assert decoded(model, name, foreign_defaults, **processing) == decoded(model, name, **processing)


@pytest.mark.parametrize("name", ["model", "tree"])
def test_the_reference_makes_its_own_likewise(model, name):
    options = {"backend": "reference", "max_new_tokens": 3, "rule": "block"}
    assert decoded(model, name, foreign_defaults, **options) == decoded(model, name, **options)


def test_the_control_of_these_tests():
    """A tensor that is made without a device fails where it meets one that has."""
    with foreign_defaults(), pytest.raises(RuntimeError, match="meta"):
        torch.ones(2, device="cpu") + torch.ones(2)


@pytest.mark.parametrize("name", [None, "model", "feature", "lookup", "tree", "medusa", "siblings"])
def test_under_autocast_decoding_works(model, name):
    """With numbers of its own: nothing but a text of the requested length."""
    results = decoded(model, name, lambda: torch.autocast("cpu", torch.bfloat16))
    assert [len(tokens) for tokens, _ in results] == [9, 3, 5, 7]


#: What waits for the device more than once a step, and why.
READS_MORE = {
    "tree": "how likely a node is decides whether its level is drafted",
    "tree of self": "likewise",
    "feature with repeats": "what followed the drafts before is looked up in histories on the host, at every draft",
    "feature tree": "likewise, at every level of the tree",
    "confident": "how sure the drafter is decides whether it drafts on, at every draft",
    "siblings": "likewise; and which nodes there are is decided on the host",
    "siblings of features": "which nodes there are is decided on the host",
    "first of siblings": "likewise",
    "adaptive siblings": "likewise",
    "merged tree": "likewise",
}


@pytest.mark.brief(kept=lambda parameters: parameters["name"] in {None, *SESSIONS, *READS_MORE})
@pytest.mark.parametrize("name", [None, *NAMES])
def test_the_host_waits_once_a_step(model, name):
    steps = Statistics()
    drafter = None if name is None else drafters(model)[name]
    options = {"num_draft": 3, "max_new_tokens": [9, 3, 5, 7], "seed": 3, "temperature": 0.9}
    generate(TransformersTarget(model), PROMPTS, drafter=drafter, **options)  # the probes of first use
    with HostReads() as reads:
        tokens = stream(TransformersTarget(model), PROMPTS, drafter=drafter, statistics=steps, **options)
        reads.found.clear()  # what is read at the beginning
        list(tokens)
    if name in READS_MORE:
        assert len(reads.found) > steps.steps, f"no more than others: {READS_MORE[name]}"
    else:
        assert len(reads.found) == steps.steps, reads.found


def test_a_grammar_is_asked_on_the_host(model):
    """For what was drafted on the device: the one thing that is done to logits that waits."""
    for options, each in ((PROCESSING["penalties"], 1), (PROCESSING["bias"], 1), (PROCESSING["grammar"], 3)):
        steps, named = Statistics(), {"num_draft": 3, "max_new_tokens": 6, "seed": 3, **options}
        with HostReads() as reads:
            generate(TransformersTarget(model), PROMPTS, drafter=drafters(model)["model"], statistics=steps, **named)
        assert len(reads.found) == each * steps.steps, reads.found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reads_are_counted(mode):
    """The control: what reads a tensor that descends from a model's parameters, and nothing else."""
    weight, own = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    with HostReads() as reads, mode():
        scores = weight * own
        for read in (
            scores.tolist, scores.cpu, scores.numpy, scores.nonzero, lambda: scores[0].item(), lambda: int(scores[0]),
            lambda: bool(scores[0] > 0), lambda: own[scores > 0], lambda: float(scores.sum()), scores.argmax().item,
        ):  # fmt: skip
            before = len(reads.found)
            read()
            assert len(reads.found) == before + 1
            own.tolist(), own.nonzero(), own[0].item()
            assert len(reads.found) == before + 1
        assert not scores.is_cpu
        assert own.is_cpu
