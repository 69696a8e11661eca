"""Requests in batches and as they come: their texts, and the times that are made of them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from tiny import steady, tiny

from specdec_kernels.bench import serving
from specdec_kernels.bench.serving import Request, Served, Service, quantile
from specdec_kernels.decode import Sampling, TransformersTarget, generate
from specdec_kernels.decode.drafters import NGramDrafter

REQUESTS = [
    Request([1, 2, 3, 1, 2], 9, 0.0, 1), Request([4], 3, 0.0, 2), Request([5, 6], 12, 0.01, 3),
    Request([7, 3], 1, 0.02, 4),
]  # fmt: skip
#: A likely id of the model's.
STOP = 7


@pytest.fixture(scope="module")
def model():
    return steady(tiny(1, layers=2))


@pytest.mark.parametrize("drafter", [None, NGramDrafter(1)])
@pytest.mark.parametrize(("most", "dynamic"), [(1, False), (3, False), (3, True)])
def test_every_request_is_served_as_it_is_alone(model, drafter, most, dynamic, monkeypatch):
    """Some of them to a stop token, which is the last of theirs."""
    sampling = Sampling(temperature=0.8)
    monkeypatch.setattr(model.generation_config, "eos_token_id", STOP)
    target = TransformersTarget(model)
    served = Service(target, drafter, rule="coupled", sampling=sampling, most=most, dynamic=dynamic).serve(REQUESTS)
    for own, request in zip(served, REQUESTS, strict=True):
        alone = generate(
            target, [request.prompt], max_new_tokens=request.max_new_tokens, seed=request.seed, temperature=0.8,
            rule="coupled",
        )  # fmt: skip
        assert own.finished
        assert own.tokens == alone[0].tokens
        assert len(own.times) == len(own.drafted) == len(own.tokens)
        assert own.first > 0
        assert own.times == sorted(own.times)
    assert 0 < sum(own.tokens[-1] == STOP for own in served) < len(served)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_takes_too_long_is_cut_off(model, dynamic, monkeypatch):
    """A clock on which every look takes a second."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)), sleep=lambda seconds: None)
    monkeypatch.setattr(serving, "time", clock)
    many = [Request([1, 2], 20) for _ in range(5)]
    served = Service(TransformersTarget(model), most=2, dynamic=dynamic).serve(many, seconds=60)
    assert sum(own.finished for own in served) < 5
    assert not served[-1].finished
    assert any(own.tokens and not own.finished for own in served)
    for own in served:
        assert len(own.times) == len(own.tokens) == len(own.drafted) >= len(own.latencies())


def test_tokens_that_come_together_have_waited_together():
    times = [1.0, 1.5, 3.0, 3.0, 3.0, 4.0]
    own = Served(Request([1], 6, 0.25), [0] * 6, times, [False, False, True, True, False, False])
    assert own.first == 0.75
    assert own.latencies() == [0.5, 0.5, 0.5, 0.5, 1.0]
    cut = Served(Request([1], 4), [0] * 4, [1.0, 2.0, 4.0, 4.0], [False, False, True, True])
    assert cut.latencies() == [1.0, 1.0, 1.0]
    first = Served(Request([1], 3), [0] * 3, [1.0, 1.0, 2.0], [True, False, False])
    assert first.latencies() == [1.0]


def test_quantiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [quantile(values, share) for share in (0.0, 0.2, 0.21, 0.5, 0.99, 1.0)] == [1, 1, 2, 3, 5, 5]
    assert quantile([], 0.5) != quantile([], 0.5)
