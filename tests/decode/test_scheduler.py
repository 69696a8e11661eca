"""Requests that come and go: their texts are those they have alone, whatever happens to the others."""

from __future__ import annotations

import asyncio
import functools
import gc
import heapq
import itertools
import os
import queue
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from architectures import LOCAL, Architecture, build
from decoding import NAMES, SESSIONS, drafters
from tiny import VOCAB, Altered, slow_greedy, steady, tiny

from specdec_kernels.bench.soak import KINDS, Soak
from specdec_kernels.decode import Sampling, Scheduler, StaticTarget, TransformersTarget, generate, model_facts
from specdec_kernels.decode.cache import RaggedCache
from specdec_kernels.decode.drafters import AsyncDrafter, CallableDrafter, ModelDrafter, NGramDrafter, adaptive

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 7, 8, 9, 5, 6], [3, 3], [7, 1, 4, 4, 2, 9], [10, 0]]
SAMPLINGS = [
    GREEDY, Sampling(temperature=0.8), Sampling(top_k=4), Sampling(repetition_penalty=1.3),
    Sampling(logit_bias={3: 2.0}), Sampling(temperature=0.7, frequency_penalty=0.3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """What an adaptive drafter drafts depends on one: here every look at it takes a second."""
    monkeypatch.setattr(adaptive, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


@pytest.fixture(scope="module")
def model():
    return steady(tiny(1, layers=2))


@functools.cache
def alone(model, index, drafter=None, rule="token", greedy=False, **named):
    sampling = vars(GREEDY if greedy else SAMPLINGS[index])
    options = {"max_new_tokens": 12 + index, "seed": index, "rule": rule, **named, **sampling}
    return generate(TransformersTarget(model), [PROMPTS[index]], drafter=drafter, **options)[0].tokens


def submitted(scheduler, index, **named):
    options = {"sampling": SAMPLINGS[index], "max_new_tokens": 12 + index, "seed": index, **named}
    return scheduler.submit(PROMPTS[index], **options)


def one_after_the_other(scheduler):
    """All requests, decoded to the end; two steps are made between any two that come."""
    submissions = []
    for index in range(len(PROMPTS)):
        submissions.append(submitted(scheduler, index))
        for _ in range(2):
            scheduler.step()
    scheduler.run()
    return submissions


@pytest.mark.parametrize("name", [None, *NAMES])
def test_texts_are_those_of_requests_alone(model, name):
    """Under the rule whose text does not depend on the drafts; they come one after the other, into freed slots too."""

    def made(seed, vocab=VOCAB):
        return steady(tiny(seed, vocab=vocab))

    drafter = None if name is None else drafters(model, made)[name]
    scheduler = Scheduler(TransformersTarget(model), drafter, max_requests=3, rule="coupled", chunk=3)
    submissions = one_after_the_other(scheduler)
    for index, submission in enumerate(submissions):
        assert submission.result().tokens == alone(model, index, rule="coupled")
    if name is not None and name != "rule":
        assert sum(submission.acceptance.accepted for submission in submissions) > 0
    assert not scheduler.step()


@pytest.mark.parametrize("name", ["feature", "model", "medusa", "lookup"])
def test_drafts_do_not_depend_on_the_others(model, name):
    """Nor on the pieces that a prompt was read in: what was proposed and accepted is as alone."""

    def drafter():
        return drafters(model, lambda seed, vocab=VOCAB: steady(tiny(seed, vocab=vocab)))[name]

    target = TransformersTarget(model)
    found = []
    for most, chunk in ((1, 512), (4, 512), (4, 1), (2, 3)):
        scheduler = Scheduler(target, drafter(), max_requests=most, chunk=chunk)
        submissions = [submitted(scheduler, index) for index in range(4)]
        scheduler.run()
        found.append([(s.result().tokens, s.acceptance.proposed, s.acceptance.accepted) for s in submissions])
    assert all(each == found[0] for each in found)


def test_priorities_and_order():
    scheduler = Scheduler(TransformersTarget(tiny(1)), max_requests=1)
    ended = []

    def noted(name):
        return lambda index, tokens: ended.append(name) if len(tokens) == 2 else False

    for name, priority in (("a", 0), ("b", 0), ("urgent", 1), ("c", 0), ("late", -2.5)):
        scheduler.submit([1], max_new_tokens=2, stop_when=noted(name), priority=priority)
    assert scheduler.waiting == 5
    scheduler.run()
    assert ended == ["urgent", "a", "b", "c", "late"]


def test_a_full_queue():
    scheduler = Scheduler(TransformersTarget(tiny(1)), max_waiting=2)
    submissions = [scheduler.submit([1], max_new_tokens=2) for _ in range(2)]
    with pytest.raises(queue.Full, match="max_waiting=2 requests at most, got 1 where 2 wait"):
        scheduler.submit([1])
    scheduler.step()  # they have slots now
    submissions.append(scheduler.submit([1], max_new_tokens=2))
    assert [len(submission.result().tokens) for submission in submissions] == [2, 2, 2]


def test_samples_are_requests_of_a_full_queue():
    """Each of them; but they are submitted at once, so that an empty queue takes them."""
    scheduler = Scheduler(TransformersTarget(tiny(1)), max_waiting=2)
    scheduler.submit([1])
    with pytest.raises(queue.Full, match="max_waiting=2 requests at most, got 2 where 1 wait"):
        scheduler.submit_samples([1], [1, 2])
    scheduler = Scheduler(TransformersTarget(tiny(1)), max_waiting=2)
    scheduler.submit_samples([1], [1, 2, 3])
    with pytest.raises(queue.Full, match="max_waiting=2 requests at most, got 1 where 3 wait"):
        scheduler.submit([1])


@pytest.mark.parametrize("steps", range(5))
def test_cancelled_at_any_time(model, steps):
    """In the queue, while its prompt is read, while it is decoded; the others do not notice."""
    scheduler = Scheduler(TransformersTarget(model), NGramDrafter(1), max_requests=3, chunk=2)
    submissions = [submitted(scheduler, index) for index in range(6)]
    for _ in range(steps):
        scheduler.step()
    for index in (0, 2, 5):
        submissions[index].cancel()
        submissions[index].cancel()
    scheduler.run()
    drafter = NGramDrafter(1)
    for index, submission in enumerate(submissions):
        result, whole = submission.result(), alone(model, index, drafter)
        assert (result.tokens == whole) == (index not in (0, 2, 5))
        assert result.tokens == whole[: len(result.tokens)]
        assert result.finished == ("" if index in (0, 2, 5) else "length")
    assert scheduler.running == scheduler.waiting == 0
    assert submissions[1].cancel() is None


def test_what_is_wrong_with_one_request_ends_that_one(model):
    target = TransformersTarget(model)
    scheduler = Scheduler(target, ModelDrafter(tiny(2)), max_requests=8)
    good = [submitted(scheduler, index, sampling=GREEDY) for index in range(3)]

    def fails(*_):
        raise KeyError("mine")

    bad = [
        scheduler.submit([1], max_new_tokens=1000),
        scheduler.submit([1, 2], max_new_tokens=9, stop_when=fails),
        scheduler.submit([1, 2], max_new_tokens=9, stop_when=lambda index, tokens: torch.tensor([tokens[-1], 0]) == 3),
        scheduler.submit([1, 2], max_new_tokens=9, sampling=Sampling(grammar=fails)),
        scheduler.submit([1, 2], max_new_tokens=9, sampling=Sampling(grammar=lambda history: torch.zeros(9))),
    ]
    scheduler.run()
    errors = [
        (ValueError, "max_new_tokens"), (KeyError, "mine"), (RuntimeError, "Boolean value of Tensor"),
        (KeyError, "mine"), (TypeError, "grammar must give"),
    ]  # fmt: skip
    for submission, (error, message) in zip(bad, errors, strict=True):
        with pytest.raises(error, match=message):
            submission.result()
        assert list(submission) == []
    for index, submission in enumerate(good):
        assert submission.result().tokens == alone(model, index, greedy=True)
    dead = scheduler.submit(
        [1, 2], max_new_tokens=5, sampling=Sampling(grammar=lambda history: torch.zeros(1, dtype=torch.int32))
    )
    assert dead.result().finished == "dead_end"


class Faulty:
    """A drafter with an error of its own wherever ``fails`` says so of a method and the prompts of a session, known by
    their first tokens."""

    def __init__(self, drafter, fails):
        self.drafter, self.fails, self.feature_layers = drafter, fails, drafter.feature_layers

    def begin(self, prompts, features):
        return FaultySession(self, prompts, features)


class FaultySession:
    def __init__(self, drafter, prompts, features):
        self.fails, self.firsts = drafter.fails, [prompt[0] for prompt in prompts]
        self.ask("begin")
        self.session = drafter.drafter.begin(prompts, features)

    def ask(self, method):
        if self.fails(method, self.firsts):
            raise OSError("the drafter's own")

    def propose(self, step):
        self.ask("propose")
        return self.session.propose(step)

    def commit(self, tokens, features):
        self.ask("commit")
        self.session.commit(tokens, features)

    def select(self, slots):
        self.ask("select")
        self.session.select(slots)
        self.firsts = [self.firsts[slot] for slot in slots]

    def join(self, other):
        self.ask("join")
        self.session.join(other.session)
        self.firsts += other.firsts


#: Prompts that a drafter cannot begin with: the first, one between others, and the last.
WITHOUT = (0, 2, 5)


def drafter_of(model, name, fails=lambda method, firsts: False):
    return Faulty(drafters(model, lambda seed, vocab=VOCAB: steady(tiny(seed, vocab=vocab)))[name], fails)


def cannot_begin(method, firsts):
    return method == "begin" and firsts[0] in [PROMPTS[index][0] for index in WITHOUT]


def outcome(submission):
    """A text, and what became of its drafts."""
    tokens = submission.result().tokens
    return tokens, submission.acceptance.proposed, submission.acceptance.accepted


@pytest.mark.brief(kept=lambda parameters: parameters["name"] in SESSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_a_drafter_cannot_begin_with_costs_its_own_drafts(model, name):
    """All others have theirs, whoever runs beside them, under the rule whose text does not depend on the drafts."""
    scheduler = Scheduler(
        TransformersTarget(model), drafter_of(model, name, cannot_begin), max_requests=3, rule="coupled"
    )
    with pytest.warns(RuntimeWarning) as warned:
        submissions = one_after_the_other(scheduler)
    assert {str(each.message) for each in warned} == {
        "the drafter failed in begin, and requests go on without drafts: OSError: the drafter's own"
    }
    assert len(warned) == len(WITHOUT)
    for index, submission in enumerate(submissions):
        assert submission.result().tokens == alone(model, index, rule="coupled")
    drafts = [submission.acceptance.proposed for submission in submissions]
    assert [drafts[index] for index in WITHOUT] == [0, 0, 0]
    assert sum(drafts) > 0


@pytest.mark.parametrize("name", ["model", "feature", "small vocabulary", "first of", "tree", "feature tree", "medusa"])
def test_drafts_are_those_of_requests_alone_beside_some_without(model, name):
    """Chains and trees, greedy and drawn: texts, drafts and what was accepted; a greedy text without drafts too."""
    found = []
    for most, fails in ((1, lambda *_: False), (6, cannot_begin), (2, cannot_begin)):
        scheduler = Scheduler(TransformersTarget(model), drafter_of(model, name, fails), max_requests=most)
        submissions = [submitted(scheduler, index) for index in range(len(PROMPTS))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            scheduler.run()
        assert outcome(submissions[0])[0] == alone(model, 0)
        found.append([outcome(submissions[index]) for index in range(len(PROMPTS)) if index not in WITHOUT])
    assert found[0] == found[1] == found[2]
    assert sum(accepted for _, _, accepted in found[0]) > 0


def test_costs_are_those_of_passes_that_were_made(model, monkeypatch):
    """Of all their requests, those without a drafter too; and what these gain counts where drafts are weighed."""
    booked, weighed = [], []
    book, best = adaptive.Costs.proposed, adaptive.AdaptiveDrafter.best

    def proposed(self, batch, rows):
        booked.append((batch, scheduler.running))
        book(self, batch, rows)

    def noted(self, most, acceptance, batch=None):
        weighed.append((len(most), batch))
        return best(self, most, acceptance, batch)

    monkeypatch.setattr(adaptive.Costs, "proposed", proposed)
    monkeypatch.setattr(adaptive.AdaptiveDrafter, "best", noted)
    drafter = Faulty(adaptive.AdaptiveDrafter(ModelDrafter(tiny(2))), cannot_begin)
    scheduler = Scheduler(TransformersTarget(model), drafter)
    for index in range(len(PROMPTS)):
        submitted(scheduler, index)
    with pytest.warns(RuntimeWarning, match="failed in begin"):
        scheduler.run()
    assert len({batch for batch, _ in booked}) > 2
    assert all(batch == running for batch, running in booked)
    assert max(batch - own for own, batch in weighed) == len(WITHOUT)


@pytest.mark.parametrize("name", ["model", "tree"])
@pytest.mark.parametrize("where", ["propose", "commit", "select", "join"])
def test_a_failing_drafter_costs_its_drafts(model, where, name):
    """Of those that it drafted for, from then on; who comes while they run has drafts, as alone."""
    fail_next = set()
    drafter = drafter_of(model, name, lambda method, firsts: method in fail_next and not fail_next.discard(method))
    scheduler = Scheduler(TransformersTarget(model), drafter)
    first, _ = submitted(scheduler, 0, max_new_tokens=70), submitted(scheduler, 1, max_new_tokens=9)
    scheduler.step()
    fail_next.add(where)
    if where == "join":
        joining = submitted(scheduler, 2, sampling=GREEDY)

    def until_it_failed():
        while fail_next:
            scheduler.step()

    with pytest.warns(RuntimeWarning, match=rf"failed in {where}, .* without drafts: OSError: the drafter's own"):
        until_it_failed()
    proposed = scheduler.statistics.requests[first.request.index].proposed
    assert proposed > 0
    later = [submitted(scheduler, index) for index in (3, 4)]
    scheduler.run()
    assert first.result().tokens == alone(model, 0, max_new_tokens=70)
    assert first.acceptance.proposed == proposed
    if where == "join":
        assert outcome(joining)[:2] == (alone(model, 2, greedy=True), 0)
    for index, submission in zip((3, 4), later, strict=True):
        by_itself = Scheduler(TransformersTarget(model), drafter)
        assert outcome(submission) == outcome(submitted(by_itself, index))
        assert submission.acceptance.proposed > 0


def test_a_failing_target_ends_what_ran():
    model = tiny(1)
    scheduler = Scheduler(TransformersTarget(model), max_requests=2)
    ran = [scheduler.submit([1, 2], max_new_tokens=5) for _ in range(2)]
    waiting = scheduler.submit([1, 2], max_new_tokens=3)
    scheduler.step()
    hook = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
    scheduler.step()
    hook.remove()
    for submission in ran:
        with pytest.raises(MemoryError, match="no memory"):
            submission.result()
    assert len(waiting.result().tokens) == 3


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["target", "reading", "join", "stop_when", "drafter"])
def test_an_interrupted_step_ends_what_it_was_about(model, where, interrupt, monkeypatch):
    """Since half of it may be done; who waits goes on."""
    interrupted = set()

    def interruption(place):
        if place in interrupted:
            interrupted.discard(place)
            raise interrupt

    def stop_when(index, tokens):
        interruption("stop_when")
        return False

    drafter = Faulty(NGramDrafter(1), lambda method, firsts: method == "propose" and interruption("drafter"))
    slots = 3 if where in ("reading", "join") else 2
    scheduler = Scheduler(TransformersTarget(model), drafter, max_requests=slots, chunk=2, rule="coupled")
    ran = [submitted(scheduler, index, stop_when=stop_when, max_new_tokens=60) for index in (0, 1)]
    while scheduler.running < 2:
        scheduler.step()
    about = [*ran, submitted(scheduler, 2)] if slots == 3 else ran
    if where == "join":
        monkeypatch.setattr(RaggedCache, "join", lambda *_: interruption("join"))
    waiting = submitted(scheduler, 3)
    interrupted.add(where)
    place = where if where in ("target", "reading") else "no pass of the target"
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: interruption(place))
    with pytest.raises(interrupt):
        scheduler.run()
    hook.remove()
    monkeypatch.undo()
    for submission in about:
        with pytest.raises(RuntimeError, match=rf"the request was ended by {interrupt.__name__}\(\)"):
            submission.result()
    assert waiting.result().tokens == alone(model, 3, rule="coupled")


@pytest.mark.parametrize("taken", [False, True])
def test_an_interrupted_step_loses_no_request(model, taken, monkeypatch):
    """Right before or behind its being taken out of the queue: its reader would wait for ever."""
    scheduler, pop = Scheduler(TransformersTarget(model)), heapq.heappop

    def interrupted(waiting):
        if taken:
            pop(waiting)
        raise KeyboardInterrupt

    first, second = submitted(scheduler, 0), submitted(scheduler, 1)
    monkeypatch.setattr(heapq, "heappop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    monkeypatch.undo()
    assert first.done
    assert scheduler.waiting == 1
    with pytest.raises(RuntimeError, match=r"the request was ended by KeyboardInterrupt\(\)"):
        first.result()
    assert second.result().tokens == alone(model, 1)


def test_a_join_that_fails_ends_what_ran(model, monkeypatch):
    """Of which half may have joined."""
    scheduler = Scheduler(TransformersTarget(model))
    first = submitted(scheduler, 0)
    scheduler.step()
    monkeypatch.setattr(RaggedCache, "join", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
    second, third = submitted(scheduler, 1), submitted(scheduler, 2)
    scheduler.run()
    for submission in (first, second):
        with pytest.raises(MemoryError, match="no memory"):
            submission.result()
    assert third.result().tokens == alone(model, 2)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_cancellation_that_fails_ends_what_ran(model, error, monkeypatch):
    """Whoever cancels is told of nothing but what interrupts, and the cancelled request has what there was."""
    scheduler = Scheduler(TransformersTarget(model))
    ran = [submitted(scheduler, index) for index in range(3)]
    scheduler.step()
    monkeypatch.setattr(RaggedCache, "select", lambda *_: (_ for _ in ()).throw(error("no memory")))
    with pytest.raises(error) if error is KeyboardInterrupt else nullcontext():
        ran[0].cancel()
    monkeypatch.undo()
    waiting = submitted(scheduler, 3)
    scheduler.run()
    assert ran[0].result().tokens == alone(model, 0)[:1]
    for submission in ran[1:]:
        with pytest.raises(Exception, match="no memory"):
            submission.result()
    assert waiting.result().tokens == alone(model, 3)


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, KeyError])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_looks_like_no_end(model, error, asynchronous):
    """And a result tells of it every time."""
    scheduler = Scheduler(TransformersTarget(model))

    def fails(index, tokens):
        if len(tokens) == 2:
            raise error("mine")
        return False

    submission = scheduler.submit([1, 2], max_new_tokens=9, stop_when=fails)

    async def collect():
        return [token async for token in submission]

    expected = KeyError if error is KeyError else RuntimeError
    with pytest.raises(expected, match="mine"):
        asyncio.run(asyncio.wait_for(collect(), 60)) if asynchronous else list(submission)
    assert list(submission) == []
    for _ in range(2):
        with pytest.raises(expected, match="mine"):
            submission.result()


@pytest.mark.parametrize("who", range(3))
@pytest.mark.parametrize("where", ["stop_when", "grammar", "drafter"])
def test_cancelled_within_a_step(model, where, who):
    """By a callback of the second request: of itself, of one before and of one behind it."""
    submissions, calls = [], []

    def called(place):
        if place == where:
            calls.append(place)
            if len(calls) == 3:
                submissions[who].cancel()

    def grammar(history):
        called("grammar")
        return torch.full((1,), 2**VOCAB - 1, dtype=torch.int32)

    def propose(history, count):
        if history[0] == PROMPTS[1][0]:
            called("drafter")
        return [history[-1]] * count

    scheduler = Scheduler(TransformersTarget(model), CallableDrafter(propose))
    for index in range(3):
        options = {"stop_when": lambda *_: bool(called("stop_when"))} if index == 1 else {}
        sampling = Sampling(temperature=0.0, grammar=grammar if index == 1 else None)
        submissions.append(submitted(scheduler, index, sampling=sampling, **options))
    scheduler.run()
    for index, submission in enumerate(submissions):
        result, whole = submission.result(), alone(model, index, greedy=True)
        assert result.tokens == (whole[: len(result.tokens)] if index == who else whole)
        assert result.finished == ("" if index == who else "length")


@pytest.mark.parametrize("call", ["step", "run", "result", "next"])
def test_a_step_within_a_step_is_an_error_of_who_wants_it(model, call):
    scheduler = Scheduler(TransformersTarget(model))

    def stop_when(index, tokens):
        calls = {"step": scheduler.step, "run": scheduler.run, "result": other.result, "next": lambda: list(other)}
        calls[call]()

    wrong = submitted(scheduler, 0, stop_when=stop_when)
    other = submitted(scheduler, 1)
    scheduler.run()
    with pytest.raises(RuntimeError, match="a step of the scheduler cannot be made within a step"):
        wrong.result()
    assert other.result().tokens == alone(model, 1)


def test_a_failing_drafter_where_warnings_are_errors(model):
    def propose(history, count):
        raise OSError("the drafter's own")

    scheduler = Scheduler(TransformersTarget(model), CallableDrafter(propose))
    submissions = [submitted(scheduler, index) for index in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.run()
    assert [submission.result().tokens for submission in submissions] == [alone(model, index) for index in range(3)]


def test_invalid_rows_end_one_request(model):
    other = steady(tiny(1, layers=2))
    with torch.no_grad():
        other.model.embed_tokens.weight[10] = torch.nan
    scheduler = Scheduler(TransformersTarget(other, check=False))
    bad, good = (
        scheduler.submit([10, 0], max_new_tokens=4),
        submitted(scheduler, 0, sampling=Sampling(logit_bias={10: -torch.inf})),
    )
    scheduler.run()
    assert bad.result().finished == "invalid"
    assert good.result().finished == "length"


def test_asynchronous_use(model):
    async def collect(submission):
        return [token.token async for token in submission]

    async def main():
        scheduler = Scheduler(TransformersTarget(model), max_requests=3)
        return await asyncio.gather(*(collect(submitted(scheduler, index)) for index in range(6)))

    assert asyncio.run(main()) == [alone(model, index) for index in range(6)]


def test_no_token_is_lost_where_waiting_for_it_is_cancelled(model):
    async def main():
        submission, found = submitted(Scheduler(TransformersTarget(model)), 0), []
        while True:
            try:
                found.append((await asyncio.wait_for(anext(submission), 0.002)).token)
            except TimeoutError:
                timeouts.append(len(found))
            except StopAsyncIteration:
                return found

    timeouts: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        assert asyncio.run(main()) == alone(model, 0)
    finally:
        hook.remove()
    assert timeouts


def test_tasks_that_wait_share_steps(model):
    """Whose request is decoded has its tokens as they come, though others wait, and were there before."""
    scheduler, ended = Scheduler(TransformersTarget(model), max_requests=1), []
    submissions = [submitted(scheduler, index) for index in range(3)]

    async def collect(submission):
        first = await anext(submission)
        ended.append(submission.done)
        return [first.token, *[token.token async for token in submission]]

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        return await asyncio.gather(*map(collect, reversed(submissions)))

    assert asyncio.run(main()) == [alone(model, index) for index in (2, 1, 0)]
    assert ended == [False] * 3


def test_who_is_cancelled_leaves_one_step_behind(model):
    """And those who wait for the same one have it."""
    scheduler, begun, let = Scheduler(TransformersTarget(model), max_requests=1), threading.Event(), threading.Event()
    first = submitted(scheduler, 0, stop_when=lambda *_: begun.set() or not let.wait(60))
    second = submitted(scheduler, 1)

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        gone = [asyncio.ensure_future(anext(second)) for _ in range(3)]
        reader = asyncio.ensure_future(anext(first))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        let.set()
        await asyncio.to_thread(lambda: None)  # once the one thread is free
        assert len(first._tokens) == 1
        assert (await reader).token == alone(model, 0)[0]
        return [token.token async for token in second]

    assert asyncio.run(main()) == alone(model, 1)


def test_an_asynchronous_reader_has_the_tokens_of_the_step_that_fails(model):
    """Whenever in that step it looks: here before the step is done."""
    scheduler, found = Scheduler(TransformersTarget(model)), []

    async def read():
        with suppress(KeyError):
            while True:
                found.append((await anext(failing)).token)
        found.append("error")

    thread = threading.Thread(target=lambda: asyncio.run(read()))

    def fails(index, tokens):
        raise KeyError("mine")

    def stop_when(index, tokens):
        if len(tokens) == 1:
            thread.start()
            while thread.is_alive() and not scheduler._lock._turn.locked():  # until it has read, or waits
                time.sleep(0.001)
        return False

    failing = submitted(scheduler, 0, stop_when=fails)
    submitted(scheduler, 1, stop_when=stop_when)
    scheduler.run()
    thread.join()
    assert found == [alone(model, 0)[0], "error"]


def test_who_waits_is_let_in_between_two_steps(model):
    """However soon the next one begins."""
    scheduler, seen = Scheduler(TransformersTarget(model)), []
    thread = threading.Thread(target=lambda: submitted(scheduler, 1))

    def stop_when(index, tokens):
        seen.append(scheduler.running)
        if len(tokens) == 1:
            thread.start()
            while not scheduler._lock._turn.locked():  # until it waits
                time.sleep(0.001)
        return False

    submitted(scheduler, 0, stop_when=stop_when)
    scheduler.run()
    thread.join()
    assert seen[:3] == [1, 2, 2]


def test_many_threads(model):
    scheduler = Scheduler(TransformersTarget(model), max_requests=3)
    found = {}

    def read(index):
        found[index] = submitted(scheduler, index).result().tokens

    threads = [threading.Thread(target=read, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: alone(model, index) for index in range(6)}


def test_rows_of_a_step_are_bounded(model):
    most = []

    def noted(draft, step):
        most.append((len(step.num_draft), max(step.num_draft)))
        return draft

    inner = CallableDrafter(lambda history, count: [1] * count)
    drafter = Altered(inner, noted)
    begin = drafter.begin

    def joinable(prompts, features):
        session, own = begin(prompts, features), inner.begin(prompts, features)
        session.propose = lambda step: noted(own.propose(step), step)
        session.commit, session.select = own.commit, own.select
        session.own, session.join = own, lambda other: own.join(other.own)
        return session

    drafter.begin = joinable
    scheduler = Scheduler(TransformersTarget(model), drafter, num_draft=6, max_rows=8, max_requests=6)
    for index in range(6):
        submitted(scheduler, index, max_new_tokens=30)
        scheduler.step()
    scheduler.run()
    assert {batch: max(own for size, own in most if size == batch) for batch, _ in most} == {
        1: 6, 2: 3, 3: 1, 4: 1, 5: 0, 6: 0,
    }  # fmt: skip


def test_nothing_is_kept_of_what_has_ended(model):
    scheduler = Scheduler(TransformersTarget(model), ModelDrafter(steady(tiny(2))), max_requests=2)
    submissions = [submitted(scheduler, index) for index in range(6)]
    scheduler.run()
    assert scheduler.statistics.requests == {}
    assert sum(s.acceptance.accepted for s in submissions) == scheduler.statistics.accepted > 0
    ended = [weakref.ref(submission) for submission in submissions[:-2]]
    del submissions
    assert [own() for own in ended] == [None] * 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_requests": 0}, ValueError, "max_requests must be at least 1, got 0"),
        ({"max_rows": True}, TypeError, "max_rows must be an int, got True"),
        ({"chunk": 1.5}, TypeError, "chunk must be an int, got 1.5"),
        ({"num_draft": -1}, ValueError, "num_draft must be at least 0"),
        ({"rule": "best"}, ValueError, "rule must be one of"),
        ({"logprobs": 1}, TypeError, "logprobs must be True or False, got 1"),
        ({"drafter": "ngram"}, TypeError, "drafter must be a Drafter, such as"),
    ],
)
def test_bad_schedulers(model, options, error, message):
    with pytest.raises(error, match=message):
        Scheduler(TransformersTarget(model), **options)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"prompt": []}, ValueError, "must not be empty"),
        ({"prompt": [VOCAB]}, ValueError, "must hold token ids in"),
        ({"prompt": [1], "sampling": {"temperature": 1.0}}, TypeError, "sampling must be a Sampling, got dict"),
        ({"prompt": [1], "priority": float("nan")}, TypeError, "priority must be a number, got nan"),
        ({"prompt": [1], "max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"prompt": [1], "prompt_logprobs": 1}, TypeError, "prompt_logprobs must be True or False, got 1"),
        ({"prompt": [1], "stop_when": 3}, TypeError, "stop_when must be a function of .* got 3"),
        ({"prompt": [1], "seeds": 3}, TypeError, "seeds must be a list of seeds, got 3"),
        ({"prompt": [1], "seeds": [1, 2], "stop_when": len}, TypeError, "stop_when must be a list of functions"),
        ({"prompt": [1], "seeds": [1, 2], "stop_when": [len]}, ValueError, "one entry for each of the 2 seeds, got 1"),
    ],
)
def test_bad_requests(model, named, error, message):
    scheduler = Scheduler(TransformersTarget(model))
    with pytest.raises(error, match=message):
        (scheduler.submit_samples if "seeds" in named else scheduler.submit)(**named)
    assert not scheduler.step()


def test_drafters_that_nothing_can_join(model):
    session = SimpleNamespace(propose=None, commit=None, select=None)
    drafter = SimpleNamespace(feature_layers=(), begin=lambda prompts, features: session)
    scheduler = Scheduler(TransformersTarget(model), drafter)
    with pytest.raises(TypeError, match="must have a method `join` for later requests, got SimpleNamespace"):
        submitted(scheduler, 0).result()
    assert scheduler.running == scheduler.waiting == 0


@pytest.mark.parametrize("drafter", [None, "lookup", "model", "static", "feature", "tree", "medusa"])
def test_steps_of_static_shapes(model, drafter):
    """Requests join while others run, with more tokens than there were columns, and read their prompts in pieces."""
    drafter = drafters(model, lambda seed, vocab=VOCAB: steady(tiny(seed, vocab=vocab)))[drafter] if drafter else None
    scheduler = Scheduler(StaticTarget(model, 4), drafter, max_requests=3, rule="coupled", chunk=11)
    submissions = []
    for index in range(len(PROMPTS)):
        submissions.append(submitted(scheduler, index))
        scheduler.step()
    long = [index % VOCAB for index in range(70)]
    submissions.append(scheduler.submit(long, sampling=GREEDY, max_new_tokens=9))
    scheduler.run()
    whole = generate(TransformersTarget(model), [long], temperature=0, max_new_tokens=9)[0].tokens
    for index, submission in enumerate(submissions):
        assert submission.result().tokens == (alone(model, index, rule="coupled") if index < len(PROMPTS) else whole)


@pytest.mark.parametrize("target", ["static", "windows"])
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_prompts_are_read_in_pieces_that_a_target_takes(target, with_logprobs):
    """However long the pieces may be: these would go beyond a cache of static shapes, and beyond a window."""
    model = steady(tiny(1, max_position_embeddings=512))
    targets = {"static": StaticTarget(model, 2), "windows": TransformersTarget(model, fixed_rows=4)}
    scheduler = Scheduler(targets[target], chunk=129)
    prompt = [7 * index * index % 10 for index in range(259)]
    submission = scheduler.submit(prompt, sampling=GREEDY, max_new_tokens=2, prompt_logprobs=with_logprobs)
    assert submission.result().tokens == slow_greedy(model, prompt, 2)
    if with_logprobs:
        rows = model(torch.tensor([prompt[:-1]])).logits[0].log_softmax(-1)
        known = rows.gather(1, torch.tensor(prompt)[1:, None]).flatten().tolist()
        assert submission.prompt_logprobs[1:] == pytest.approx(known, abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 8, 70])
def test_a_step_reads_a_chunk_of_prompts_and_no_more(model, chunk):
    """In as many passes as it takes, of as many prompts as it is enough for."""
    scheduler = Scheduler(StaticTarget(model, 3), chunk=chunk)
    submissions = [scheduler.submit([1] * 20, max_new_tokens=1) for _ in range(4)]
    steps = 0
    while not submissions[-1].done:
        scheduler.step()
        steps += 1
    assert steps == -(-4 * 19 // chunk)


@pytest.mark.filterwarnings("ignore:requests are not decoded together")
def test_windows_begin_with_the_whole_prompt():
    """Whatever was read in the same step before: what is read as a session begins is rounded otherwise than windows."""
    target, begun = TransformersTarget(tiny(1, max_position_embeddings=512), fixed_rows=8), []
    begin = target.begin

    def noted(prompts, *arguments):
        begun.append(len(prompts[0]))
        return begin(prompts, *arguments)

    target.begin = noted
    scheduler = Scheduler(target, chunk=50)
    for length in (40, 100):
        scheduler.submit(counted_prompt(length), max_new_tokens=2)
    scheduler.run()
    assert begun == [40, 100]


@pytest.mark.parametrize("kind", [StaticTarget, TransformersTarget])
def test_trees_are_as_long_as_the_longest_that_joined(model, kind, monkeypatch):
    """Which some models take only up to a length."""
    longest = []
    monkeypatch.setattr(model_facts, "check_tree_lengths", lambda model, length: longest.append(length))
    target = kind(model)
    target.try_out("trees")
    session = target.begin([[1, 2]], [3])
    session.join(target.begin([[1] * 20], [30]))
    session.score_tree(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[-1, 0], [-1, 0]]))
    assert longest[-1] == 50


def test_targets_that_nothing_can_join(model):
    class Closed(TransformersTarget):
        def begin(self, *arguments):
            session = super().begin(*arguments)
            names = ("score", "commit", "select", "max_rows", "features")
            return SimpleNamespace(**{name: getattr(session, name) for name in names})

    with pytest.raises(TypeError, match="must have a method `join` for later requests, got SimpleNamespace"):
        Scheduler(Closed(model)).submit([1, 2], max_new_tokens=3).result()
    scheduler = Scheduler(TransformersTarget(tiny(1), fixed_rows=4))
    first, second = (scheduler.submit([1, 2], sampling=GREEDY, max_new_tokens=6) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="but wait: fixed_rows needs a batch of one prompt"):
        second.result()
    assert second.result().tokens == first.result().tokens
    assert len(first.result().tokens) == 6
    for submission in scheduler.submit_samples([1, 2], [3, 4], max_new_tokens=6):
        with pytest.raises(ValueError, match="fixed_rows needs a batch of one prompt, which no other can join"):
            submission.result()


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
ORIGINAL = {"original_max_position_embeddings": 24}
LONGROPE = Architecture("phi3", {"rope_parameters": {"rope_type": "longrope", **FACTORS, **ORIGINAL}, **ORIGINAL})
WINDOWS = Architecture("gpt_neo", {**LOCAL, "window_size": 8})

#: By a target's class and an architecture: lengths of prompts, with four tokens more; how many are decoded together.
APART = [
    (TransformersTarget, LONGROPE, [8, 30, 5, 27, 30, 6], 2),
    (StaticTarget, LONGROPE, [8, 30, 5, 27, 30, 6], 2),
    (TransformersTarget, WINDOWS, [2, 3, 9, 12, 4, 2], 2),
]


def counted_prompt(length):
    return [7 * index * index % 10 for index in range(length)]


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize(("kind", "architecture", "lengths", "most"), APART)
def test_what_cannot_be_scored_together_waits(kind, architecture, lengths, most, chunk):
    """As in a batch that is refused: texts are those of requests alone, and all of them end."""
    target = kind(steady(build(architecture, 1, "eager")))
    scheduler, together = Scheduler(target, NGramDrafter(1), max_requests=3, chunk=chunk), set()
    prompts = [counted_prompt(length) for length in lengths]
    submissions = [scheduler.submit(prompt, sampling=GREEDY, max_new_tokens=4) for prompt in prompts]

    def run():
        while scheduler.step():
            together.add(scheduler.running)

    with pytest.warns(RuntimeWarning, match="requests are not decoded together, but wait: prompts must be") as told:
        run()
    assert len(told) == 1
    assert max(together) == most
    for prompt, submission in zip(prompts, submissions, strict=True):
        assert submission.result().tokens == generate(target, [prompt], temperature=0.0, max_new_tokens=4)[0].tokens


def test_what_waits_where_warnings_are_errors():
    """Whoever makes the step has the error, once; no request ends with it."""
    model = steady(tiny(1))
    scheduler = Scheduler(TransformersTarget(model, fixed_rows=4))
    submissions = [scheduler.submit([1, index], sampling=GREEDY, max_new_tokens=3) for index in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="requests are not decoded together, but wait: fixed_rows"):
            scheduler.run()
        scheduler.run()
    for index, submission in enumerate(submissions):
        assert submission.result().tokens == slow_greedy(model, [1, index], 3)


def test_a_drafter_in_a_thread_of_its_own_may_cancel(model):
    """The step waits for it, so it does not wait for the step."""
    submissions = []

    def propose(history, count):
        if len(history) > 5:
            submissions[0].cancel()
        return [history[-1]] * count

    scheduler = Scheduler(TransformersTarget(model), AsyncDrafter(CallableDrafter(propose)))
    submissions += [submitted(scheduler, index) for index in range(2)]
    scheduler.run()
    assert submissions[0].result().finished == ""
    assert submissions[1].result().tokens == alone(model, 1)


@pytest.mark.parametrize(("kind", "architecture", "lengths", "most"), APART)
def test_a_join_is_refused_before_anything_changes(kind, architecture, lengths, most):
    target = kind(steady(build(architecture, 1, "eager")))
    short, long = (target.begin([counted_prompt(length)], [4]) for length in (min(lengths), max(lengths)))
    before = [session.score(torch.tensor([[3]]), [1]).logits for session in (short, long)]
    for session in (short, long):
        session.commit([0])
    for session, other in ((short, long), (long, short)):
        with pytest.raises(ValueError, match=r"prompts must be (all within the original length|one at a time)"):
            session.join(other)
    for session, logits in zip((short, long), before, strict=True):
        torch.testing.assert_close(session.score(torch.tensor([[3]]), [1]).logits, logits)


def test_samples_that_cannot_be_scored_together_end():
    scheduler = Scheduler(TransformersTarget(build(WINDOWS, 1, "eager")))
    for submission in scheduler.submit_samples(counted_prompt(9), [1, 2], max_new_tokens=4):
        with pytest.raises(ValueError, match="one at a time beyond the local window of 8 tokens"):
            submission.result()
    assert len(scheduler.submit(counted_prompt(9), max_new_tokens=4).result().tokens) == 4


@pytest.mark.parametrize("with_logprobs", [False, True])
def test_what_is_wrong_with_a_prompt_is_said_of_all_of_it(model, with_logprobs):
    """Not of the piece that is read first."""
    submission = Scheduler(TransformersTarget(model), chunk=4).submit(
        [1] * 100, max_new_tokens=50, prompt_logprobs=with_logprobs
    )
    with pytest.raises(ValueError, match="got 149 for prompt 0 of 100 tokens"):
        submission.result()
    submission = Scheduler(TransformersTarget(build(LONGROPE, 1, "eager")), chunk=4).submit(
        counted_prompt(30), max_new_tokens=4, prompt_logprobs=with_logprobs
    )
    if with_logprobs:
        with pytest.raises(ValueError, match="needs a prompt that can be read in pieces, got one of 30"):
            submission.result()
    else:
        assert len(submission.result().tokens) == 4


@pytest.mark.parametrize("kind", [TransformersTarget, StaticTarget])
@pytest.mark.parametrize("prompt", [[4], PROMPTS[0]])
def test_samples_are_those_of_requests_alone(model, kind, prompt):
    """Also beside others, and in the cache of another stream."""
    target = kind(model)
    for others in ((), (1, 2)):
        scheduler = Scheduler(target, NGramDrafter(1), rule="coupled")
        beside = [submitted(scheduler, index) for index in others]
        samples = scheduler.submit_samples(prompt, [5, 6, 7], max_new_tokens=9)
        for seed, submission in zip((5, 6, 7), samples, strict=True):
            known = generate(TransformersTarget(model), [prompt], seed=seed, rule="coupled", max_new_tokens=9)
            assert submission.result().tokens == known[0].tokens
        for index, submission in zip(others, beside, strict=True):
            assert submission.result().tokens == alone(model, index, rule="coupled")


@pytest.mark.parametrize("cancelled", [[0], [1, 2]])
@pytest.mark.parametrize("kind", [TransformersTarget, StaticTarget])
def test_samples_that_are_cancelled_while_they_wait(kind, cancelled):
    """For the end of what they cannot be scored together with; of all that are left, one too, texts are those alone."""
    target, options = kind(steady(build(LONGROPE, 1, "eager"))), {"max_new_tokens": 4}
    scheduler = Scheduler(target, NGramDrafter(1), rule="coupled")
    first = scheduler.submit(counted_prompt(8), sampling=GREEDY, **options)
    samples = scheduler.submit_samples(counted_prompt(30), [5, 6, 7], **options)
    with pytest.warns(RuntimeWarning, match="but wait: prompts must be"):
        scheduler.step()
    for index in cancelled:
        samples[index].cancel()
    scheduler.run()
    assert first.result().finished == "length"
    for index, submission in enumerate(samples):
        known = generate(target, [counted_prompt(30)], seed=5 + index, rule="coupled", **options)[0].tokens
        assert submission.result().tokens == ([] if index in cancelled else known)


@pytest.mark.parametrize("error", [KeyError, MemoryError])
def test_nothing_is_kept_of_requests_that_the_target_failed(model, error):
    scheduler = Scheduler(TransformersTarget(model), NGramDrafter(1))
    ran = [submitted(scheduler, index) for index in range(3)]
    for _ in range(3):
        scheduler.step()
    hook = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error("no memory")))
    scheduler.step()
    hook.remove()
    assert scheduler.statistics.requests == {}
    for submission in ran:
        with pytest.raises(error, match="no memory"):
            submission.result()
        assert submission.acceptance.request_steps == 3


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_caches_of_requests_that_failed_are_given_back(model, error):
    """At once, not when the next request is read."""
    target, sessions = TransformersTarget(model), weakref.WeakSet()
    begin = target.begin

    def noted(*arguments):
        sessions.add(session := begin(*arguments))
        return session

    def fails(*_):
        raise error

    target.begin = noted
    scheduler = Scheduler(target)
    submissions = [submitted(scheduler, index) for index in range(2)]
    scheduler.step()
    assert sessions
    raised = pytest.raises(error) if error is KeyboardInterrupt else nullcontext()
    with raised, model.register_forward_pre_hook(fails):
        scheduler.run()
    del raised
    assert scheduler.running == 0
    del submissions  # with their errors, which have the step in their tracebacks
    gc.collect()
    assert not sessions


#: Seconds at least; `make soak` is an hour.
SOAK_REQUESTS, SOAK_SECONDS = 160, float(os.environ.get("SPECDEC_SOAK_SECONDS", "0"))


def test_soak():
    """Of everything that can come to a request something comes, and nothing is lost, wrong or kept."""
    soak = Soak(quiet_every=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        soak.run(SOAK_REQUESTS, SOAK_SECONDS)
    report = soak.report
    assert report.problems() == []
    assert report.refused > 0
    assert report.accepted > 0
    assert {ending.split(":")[0] for ending in report.endings} == set(KINDS)
    assert report.endings["cancelled: cancelled"] > 0
    assert set(report.faults) == {"target", "function", "drafting model"}
