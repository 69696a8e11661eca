"""Layers with states: kept a row, taken back, and left alone where somebody else decodes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from architectures import CONV, STATES, Architecture, build, decoded, expected
from decoding import PROMPTS
from host_reads import HostReads

from specdec_kernels.decode import StaticTarget, Statistics, TransformersTarget, stream
from specdec_kernels.decode.cache import RaggedCache
from specdec_kernels.decode.drafters import ModelDrafter, NGramDrafter, StaticDrafter

KINDS = {
    "mamba": Architecture("mamba"), "lfm2": Architecture("lfm2", CONV),
    "qwen3_next": Architecture("qwen3_next", STATES),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_rows_are_read_as_one_after_the_other(name):
    """Whatever was taken back between them, and of requests that keep different numbers."""
    model = build(KINDS[name], 1, "eager")
    target = TransformersTarget(model, check=False)
    session = target.begin(PROMPTS[:3], [20] * 3)
    written = [list(prompt[:-1]) for prompt in PROMPTS[:3]]
    for step, kept in enumerate(([2, 4, 1], [4, 1, 3], [1, 1, 1])):
        rows = [[(7 * step + 5 * row + slot) % 11 for row in range(4)] for slot in range(3)]
        logits = session.score(torch.tensor(rows), [4, 4, 3]).logits
        for slot in range(3):
            plain = model(torch.tensor([written[slot] + rows[slot][:3]]), use_cache=False).logits[0, -3:]
            torch.testing.assert_close(logits[slot, :3], plain, atol=2e-4, rtol=2e-4)
            written[slot] += rows[slot][: kept[slot]]
        session.commit(kept)


@pytest.mark.parametrize("name", KINDS)
def test_a_mark_is_gone_back_to(name):
    model = build(KINDS[name], 1, "eager")
    target = TransformersTarget(model)
    cache = target.begin(PROMPTS[:1], [20])._cache
    assert isinstance(cache, RaggedCache)
    with torch.inference_mode():
        mark, rows = cache.mark(), torch.tensor([[3, 1, 4]])
        first, second = (
            (
                cache.run([3], 3, decided=True, input_ids=rows),
                cache.restore(mark),
            )[0]
            for _ in range(2)
        )
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("name", KINDS)
def test_the_host_waits_once_a_step(name):
    model, small = (build(KINDS[name], seed, "eager") for seed in (1, 2))
    for drafter in (None, NGramDrafter(1), ModelDrafter(small)):
        options = {"num_draft": 3, "max_new_tokens": [9, 3, 5, 7], "seed": 3, "temperature": 0.9}
        list(stream(TransformersTarget(model), PROMPTS, drafter=drafter, **options))  # the probes of first use
        steps = Statistics()
        with HostReads() as reads:
            tokens = stream(TransformersTarget(model), PROMPTS, drafter=drafter, statistics=steps, **options)
            reads.found.clear()
            list(tokens)
        assert len(reads.found) == steps.steps, reads.found


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_what_it_was_to_others(name):
    """Its text with transformers' own cache, its class, its copies, and when it goes."""
    model = build(KINDS[name], 1, "eager")
    before, kind = expected(model, PROMPTS[0]), [type(module).__name__ for module in model.modules()]
    assert decoded(model, None, PROMPTS[:1]) == [before]
    assert expected(model, PROMPTS[0]) == before
    assert [type(module).__name__ for module in model.modules()] == kind
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for weights in model.parameters():
                weights.add_(0.1)  # of which a copy knows nothing
        assert expected(other, PROMPTS[0]) == before
        assert decoded(other, None, PROMPTS[:1]) == [before]
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_steps_of_static_shapes_are_refused():
    model = build(KINDS["lfm2"], 1, "eager")
    for kind, otherwise in ((StaticTarget, "TransformersTarget"), (StaticDrafter, "ModelDrafter")):
        with pytest.raises(ValueError, match=f"keys and values in every layer .* got states: use {otherwise}"):
            kind(model)


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_requests_join(name):
    """Behind others, and one that has read nothing yet before and behind."""
    model = build(KINDS[name], 1, "eager")
    target = TransformersTarget(model)
    for first, then in (([1, 2, 3], [4, 5, 6, 7]), ([1], [4, 5, 6]), ([1, 2, 3], [4])):
        session, other = (target.begin([prompt], [20]) for prompt in (first, then))
        session.join(other)
        logits = session.score(torch.tensor([[first[-1], 8], [then[-1], 9]]), [2, 2]).logits
        for slot, history in enumerate(([*first, 8], [*then, 9])):
            plain = model(torch.tensor([history]), use_cache=False).logits[0, -2:]
            torch.testing.assert_close(logits[slot, -len(plain) :], plain, atol=2e-4, rtol=2e-4)
