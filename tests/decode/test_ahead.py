"""Drafts made while the target checks are those made afterwards, whatever came; and nothing is left of the others."""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections import Counter
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import CONV, MIXED, WINDOW, Architecture, build
from decoding import PROMPTS, drafted, drafters, exact_distribution
from distributions import g_test, limit
from forms import some
from tiny import VOCAB, Altered, steady, tiny

from specdec_kernels.decode import Draft, Scheduler, Statistics, TransformersTarget, generate, stream
from specdec_kernels.decode.drafters import (
    AdaptiveDrafter,
    AsyncDrafter,
    CallableDrafter,
    DraftConfig,
    FallbackDrafter,
    ModelDrafter,
    NGramDrafter,
    StaticDrafter,
    TreeDrafter,
)
from specdec_kernels.decode.drafters import ahead as module
from specdec_kernels.decode.drafts import Step
from specdec_kernels.decode.protocols import revertible

INNER = ["model", "small vocabulary", "self", "lookup", "rule", "first of", "confident"]


@pytest.fixture(scope="module")
def model():
    return steady(tiny(1, layers=2))


@pytest.fixture
def used(monkeypatch):
    """Of every step that could have had drafts made ahead, whether it had; those ahead are made to the end, as beside a
    slow target."""
    found, fitting = [], module._Ahead.fitting
    never = SimpleNamespace(set=lambda: None, is_set=lambda: False)
    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=lambda: never))

    def watched(ahead, wanted):
        draft = fitting(ahead, wanted)
        found.append(draft is not None)
        return draft

    monkeypatch.setattr(module._Ahead, "fitting", watched)
    return found


def alike(model):
    """Makes models that are often of the target's opinion."""

    @torch.no_grad()
    def made(seed, **named):
        if named:
            return steady(tiny(seed, **named))
        other = copy.deepcopy(model)
        torch.manual_seed(seed)
        other.get_output_embeddings().weight.add_(0.1 * torch.randn(VOCAB, 32))
        return other

    return made


#: Each drafter, and each rule with one that is often right.
BRIEF = {
    *product(["model"], ["token", "block", "coupled"], [1]), ("self", "token", 3), ("small vocabulary", "block", 3),
    ("lookup", "token", 3), ("rule", "coupled", 3), ("first of", "block", 1), ("confident", "coupled", 3),
}  # fmt: skip


@pytest.mark.brief(kept=lambda parameters: tuple(parameters[name] for name in ("name", "rule", "outcomes")) in BRIEF)
@pytest.mark.parametrize(("name", "rule", "outcomes"), list(product(INNER, ["token", "block", "coupled"], [1, 3])))
def test_text_and_drafts_are_those_of_the_drafter_alone(model, name, rule, outcomes, used):
    """In batches whose requests end at different steps, greedy ones among them, and of one request."""
    for prompts, lengths, heats in (
        (PROMPTS, [20, 7, 13, 30], [0.9, 0.0, 0.4, 0.7]),
        (PROMPTS[2:3], [40], [0.9]),
        (PROMPTS[:2], [25, 15], [0.0, 0.0]),
    ):
        found = []
        for made in (lambda inner: inner, lambda inner: AsyncDrafter(inner, outcomes)):
            drafts = []

            def noted(draft, step, drafts=drafts):
                drafts.append(drafted(draft))
                return draft

            drafter = Altered(made(drafters(model, alike(model))[name]), noted)
            statistics = Statistics()
            results = generate(
                TransformersTarget(model, check=False), prompts, drafter=drafter, num_draft=3, max_new_tokens=lengths,
                temperature=heats, top_k=[6, 0, 0, 4][: len(prompts)], rule=rule,
                seed=[3, 4, 5, 6][: len(prompts)], statistics=statistics,
            )  # fmt: skip
            found.append((results, drafts, statistics.accepted))
        assert repr(found[0]) == repr(found[1])  # log-probabilities are nan
    assert len(used) > 20
    assert any(used) or name not in ("self", "model", "confident", "first of")
    assert not all(used) or name == "self"


def test_joint_distribution_of_what_is_drafted_ahead(used):
    """Three tokens of requests that are each alone, so that drafts ahead are used: the texts are those of the drafter
    alone, and their joint distribution is the target's."""
    model, small = tiny(7, vocab=3, sharp=0.8), tiny(8, vocab=3, sharp=0.8)
    target, count = TransformersTarget(model), some(300, 600)
    options = {"num_draft": 1, "max_new_tokens": 3, "temperature": 0.8}
    seen = Counter()
    drafter = AsyncDrafter(ModelDrafter(small))
    for seed in range(count):
        (result,) = generate(target, [[1, 2]], drafter=drafter, seed=seed, **options)
        seen[tuple(result.tokens)] += 1
    plain = generate(target, [[1, 2]] * count, drafter=ModelDrafter(small), seed=list(range(count)), **options)
    assert seen == Counter(tuple(result.tokens) for result in plain)
    assert sum(used) > count / 6
    distribution = exact_distribution(model, [1, 2], 0.8, 3)
    statistic, freedom = g_test(
        np.array([float(seen[sequence]) for sequence in distribution]), np.array(list(distribution.values()))
    )
    assert statistic < limit(freedom)


@pytest.mark.parametrize("rule", ["token", "coupled"])
def test_a_drafter_that_is_its_target_is_always_ahead(model, rule, used):
    """Greedy, and where both hold the same race, every outcome is foreseen; greedily among others that the drafter
    finds likelier, since it is not sure of itself, and of each request at another place."""
    drafter = AsyncDrafter(ModelDrafter(model), outcomes=4)
    for temperature in (0.0, 0.9) if rule == "coupled" else (0.0,):
        used.clear()
        generate(
            TransformersTarget(model), PROMPTS, drafter=drafter, num_draft=3, max_new_tokens=[21, 7, 13, 30], seed=1,
            temperature=temperature, rule=rule,
        )  # fmt: skip
        assert len(used) >= 6
        assert all(used)


def test_a_rejection_is_foreseen(model, used):
    """The drafter's second choice is the target's: nothing of that is foreseen with one outcome, all with two."""
    right = []

    class SecondBest:
        """The target's own logits, the likeliest id of the first draft below the next."""

        def __init__(self, session):
            self.session = session
            for name in ("commit", "select", "trial"):
                setattr(self, name, getattr(session, name))

        def propose(self, step):
            draft = self.session.propose(step)
            if draft.logits is None:
                return draft
            best, index = draft.logits[:, :1].topk(2, -1)
            logits = draft.logits.scatter(2, index.flip(-1), best)
            tokens = draft.tokens.clone()
            tokens[:, 0] = index[:, 0, 1]
            right.append(index[0, 0, 0])
            return module.replace(draft, tokens=tokens, logits=logits, stats=None, temperature=1.0)

    inner = ModelDrafter(model)
    drafter = SimpleNamespace(feature_layers=(), begin=lambda *arguments: SecondBest(inner.begin(*arguments)))
    share = {}
    for outcomes in (1, 4):
        used.clear()
        generate(
            TransformersTarget(model), PROMPTS[:1], drafter=AsyncDrafter(drafter, outcomes), num_draft=3,
            max_new_tokens=40, temperature=0.0,
        )  # fmt: skip
        share[outcomes] = sum(used) / len(used)
    assert right
    assert share[4] == 1.0 > share[1]


def test_the_drafter_drafts_while_the_target_checks(model, monkeypatch):
    """Without a clock: in every step with drafts the two meet, the target as it scores and the drafter's thread as it
    begins to draft ahead."""
    together, caller, met = threading.Barrier(2, timeout=60), threading.current_thread(), []
    drafted_ahead = module._drafted_ahead

    def ahead_together(*arguments):
        assert threading.current_thread() is not caller
        met.append(together.wait())
        return drafted_ahead(*arguments)

    monkeypatch.setattr(module, "_drafted_ahead", ahead_together)

    class Waiting(TransformersTarget):
        def begin(self, *arguments, **named):
            session = super().begin(*arguments, **named)
            score = session.score

            def score_together(tokens, counts):
                if counts != [1]:  # the last step has no drafts, and nothing is drafted ahead of it
                    together.wait()
                return score(tokens, counts)

            session.score = score_together
            return session

    steps = Statistics()
    generate(
        Waiting(model, check=False), PROMPTS[:1], drafter=AsyncDrafter(CallableDrafter(lambda _, count: [1] * count)),
        num_draft=2, max_new_tokens=9, temperature=0.0, statistics=steps,
    )  # fmt: skip
    assert steps.steps - len(met) <= 1
    assert len(met) > 3


def test_what_is_given_out_is_not_written_to_again(model):
    """A session proposes the same tensors every time."""
    session = AsyncDrafter(ModelDrafter(tiny(2)), 3).begin(PROMPTS[:1], None)
    keys = torch.tensor([5])
    draft = session.propose(Step([3], keys, keys, 0.0, greedy=True))
    seen = draft.logits.clone()
    session._thread.wait()  # three more have been drafted
    assert torch.equal(draft.logits, seen)
    assert len(session._ahead.drafts.result()) >= 2
    stored = [ahead.logits.clone() for _, ahead in session._ahead.drafts.result()]
    assert not torch.equal(stored[0], stored[1])


@pytest.mark.parametrize("where", ["propose", "commit", "select"])
def test_errors_arrive_where_drafts_are_asked_for(model, where):
    """Of drafts ahead, and of what the thread is told."""

    class Session(SimpleNamespace):
        def trial(self):
            return nullcontext()

    def fail(*_):
        raise KeyError(f"of {where}")

    calls = {name: lambda *_: None for name in ("commit", "select")}
    calls |= {"propose": lambda step: Draft.point_masses([[1] * count for count in step.num_draft]), where: fail}
    if where == "propose":
        history = [3]
        calls["commit"] = lambda tokens, features: history.append(len(tokens[0]))
        calls["propose"] = lambda step: fail() if len(history) > 1 else Draft.point_masses([[1]] * len(step.num_draft))
    drafter = SimpleNamespace(feature_layers=(), begin=lambda *_: Session(**calls))
    tokens = stream(
        TransformersTarget(model), PROMPTS[:2], drafter=AsyncDrafter(drafter), num_draft=2, max_new_tokens=[3, 20],
        temperature=0.0,
    )  # fmt: skip
    with pytest.raises(KeyError, match=f"of {where}"):
        list(tokens)


def test_a_failing_drafter_costs_its_drafts_in_a_scheduler(model):
    def propose(history, count):
        if len(history) > 8:
            raise KeyError("of the drafter")
        return [1] * count

    scheduler = Scheduler(TransformersTarget(model), AsyncDrafter(CallableDrafter(propose)))
    submission = scheduler.submit([1, 2, 3], max_new_tokens=20, seed=1)
    with pytest.warns(RuntimeWarning, match="requests go on without drafts: KeyError"):
        assert len(submission.result().tokens) == 20


def threads():
    gc.collect()
    return [thread for thread in threading.enumerate() if thread.name.startswith("specdec-drafter")]


def ended(before):
    """Whether all threads that are new since have ended, or do so soon."""
    left = [thread for thread in threads() if thread not in before]
    for thread in left:
        thread.join(30)
    return not any(thread.is_alive() for thread in left)


def test_the_thread_ends_with_the_stream(model):
    drafter = AsyncDrafter(ModelDrafter(tiny(2)))
    before = threads()
    options = {"drafter": drafter, "max_new_tokens": 30, "temperature": 0.9}
    generate(TransformersTarget(model), PROMPTS, **options)
    assert ended(before)
    tokens = stream(TransformersTarget(model), PROMPTS, **options)
    next(tokens)
    assert len([thread for thread in threads() if thread not in before]) == 1
    tokens.close()
    del tokens
    assert ended(before)
    with pytest.raises(RuntimeError, match="of the target"):
        failing(model, drafter)
    assert ended(before)


def failing(model, drafter):
    target = TransformersTarget(model, check=False)
    begin = target.begin

    def begun(*arguments):
        session = begin(*arguments)
        session.score = lambda *_: (_ for _ in ()).throw(RuntimeError("of the target"))
        return session

    target.begin = begun
    generate(target, PROMPTS, drafter=drafter, max_new_tokens=9)


def test_the_thread_ends_with_the_last_request(model):
    """Of a scheduler that goes on: finished, or cancelled between two steps."""
    before = threads()
    scheduler = Scheduler(TransformersTarget(model), AsyncDrafter(ModelDrafter(tiny(2))))
    scheduler.submit([1, 2], max_new_tokens=5).result()
    assert ended(before)
    submissions = [scheduler.submit([1, 2 + each], max_new_tokens=50) for each in range(2)]
    for _ in range(3):
        scheduler.step()
    assert any(thread not in before for thread in threads())
    for submission in submissions:
        submission.cancel()
    assert ended(before)
    assert len(scheduler.submit([1, 2], max_new_tokens=5).result().tokens) == 5


def test_what_cannot_be_drafted_ahead_is_refused(model):
    made = drafters(model)
    with pytest.raises(ValueError, match=r"reads its hidden states \(feature_layers=\[-1\]\)"):
        AsyncDrafter(made["feature"])
    with pytest.raises(ValueError, match="must draft chains to draft ahead of the target, got siblings=1"):
        AsyncDrafter(made["siblings"])
    with pytest.raises(ValueError, match="outcomes must be at least 1, got 0"):
        AsyncDrafter(made["model"], 0)
    with pytest.raises(TypeError, match="outcomes must be an int, got True"):
        AsyncDrafter(made["model"], True)
    adaptive = AdaptiveDrafter(made["model"])
    for inner, session in (
        (made["static"], "StaticDraftSession"), (made["tree"], "TreeSession"), (adaptive, "AdaptiveSession"),
        (FallbackDrafter(NGramDrafter(), StaticDrafter(model)), "StaticDraftSession"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"must have sessions with a method `trial`, got {session}"):
            AsyncDrafter(inner).begin(PROMPTS, None)
    trees = TreeDrafter(ModelDrafter(model)).begin(PROMPTS, None)
    trees.trial = NGramDrafter().begin(PROMPTS, None).trial
    drafter = AsyncDrafter(SimpleNamespace(feature_layers=(), begin=lambda *_: trees))
    with pytest.raises(TypeError, match="got a drafter of trees"):
        generate(TransformersTarget(model), PROMPTS, drafter=drafter, max_new_tokens=9)


MODELS = {
    "whole": lambda: tiny(1, layers=2),
    "window": lambda: build(Architecture("mistral", WINDOW), 1, "eager"),
    "mixed": lambda: build(Architecture("gemma3_text", MIXED), 1, "eager"),
    "states": lambda: build(Architecture("lfm2", CONV), 1, "eager"),
}


@pytest.mark.parametrize("kind", [*MODELS, "lookup", "rule", "first of"])
def test_nothing_is_left_of_a_trial(model, kind):
    """However much was committed, drafted and squeezed out in it: the drafts are those of a session without trials."""
    drafter = ModelDrafter(MODELS[kind]()) if kind in MODELS else drafters(model)[kind]
    sessions = [drafter.begin(PROMPTS, None) for _ in range(2)]
    choose = random.Random(0)
    position = [len(prompt) for prompt in PROMPTS]
    slots = 4

    def tokens(count):
        return [[choose.randrange(VOCAB) for _ in range(choose.randint(1, 1 + count))] for _ in range(slots)]

    def step():
        return Step([3] * slots, torch.arange(slots), torch.tensor(position), 0.9)

    compared = 0
    for turn in range(12):
        for _ in range(2):
            with torch.inference_mode(), revertible(sessions[1]).trial():
                for _ in range(choose.randint(1, 3)):
                    sessions[1].commit(tokens(9), None)
                    sessions[1].propose(step())
        with torch.inference_mode():
            drafts = [session.propose(step()) for session in sessions]
        assert drafted(drafts[0]) == drafted(drafts[1])
        if drafts[0].logits is not None:
            torch.testing.assert_close(drafts[0].logits, drafts[1].logits, atol=1e-4, rtol=1e-4)
        compared += sum(map(len, drafted(drafts[0])))
        new = tokens(5)
        position = [before + len(own) for before, own in zip(position, new, strict=True)]
        with torch.inference_mode():
            for session in sessions:
                session.commit(new, None)
        if turn == 6:
            for session in sessions:
                session.select([2, 0, 3])
            position, slots = [position[slot] for slot in (2, 0, 3)], 3
    assert compared > 20


def test_more_than_was_wanted_is_drafted_anew(model, used):
    """Drafts ahead are as many as the last time: where fewer are wanted the first of them are used, where more none."""
    drafter, history = ModelDrafter(model), list(PROMPTS[0])
    session = AsyncDrafter(drafter, outcomes=5).begin([history], None)

    def step(count):
        return Step([count], torch.tensor([5]), torch.tensor([len(history)]), 0.0, greedy=True)

    with torch.inference_mode():
        for count in (4, 4, 2, 3, 1, 1):
            draft = session.propose(step(count))
            assert drafted(draft) == drafted(drafter.begin([history], None).propose(step(count)))
            (right,) = drafter.begin([history], None).propose(step(count + 1)).tokens.tolist()
            session.commit([right], None)
            history += right
    assert used == [True, True, False, True, True]


def test_steps_in_which_nothing_is_asked(model, used):
    """As an adaptive drafter does: what was foreseen of the step before is not what comes now, even if it looks so."""
    drafter, history = ModelDrafter(model), list(PROMPTS[0])
    session = AsyncDrafter(drafter).begin([history], None)

    def step():
        return Step([2], torch.tensor([5]), torch.tensor([len(history)]), 0.0, greedy=True)

    with torch.inference_mode():
        session.propose(step())
        session._thread.wait()
        (((guess,), _),) = session._ahead.drafts.result()
        for new in ([0], guess):  # the second time without drafts
            session.commit([new], None)
            history += new
        assert drafted(session.propose(step())) == drafted(drafter.begin([history], None).propose(step()))
        session.select([0])  # while the outcome is not known
        session.commit([guess], None)
        history += guess
        assert drafted(session.propose(step())) == drafted(drafter.begin([history], None).propose(step()))
    assert not any(used)


def test_confident_drafts_are_cut_where_they_were():
    """A drafter that stops where it is unsure drafts ahead as many as it would have."""
    model = steady(tiny(2))
    sure = DraftConfig(min_confidence=0.5)
    counts = []
    for made in (lambda x: x, AsyncDrafter):
        own = []

        def noted(draft, step, own=own):
            own.append(list(draft.counts))
            return draft

        generate(
            TransformersTarget(model), PROMPTS[:1], drafter=Altered(made(ModelDrafter(model, config=sure)), noted),
            num_draft=5, max_new_tokens=40, temperature=0.0,
        )  # fmt: skip
        counts.append(own)
    assert counts[0] == counts[1]
    assert len({count for (count,) in counts[0]}) > 2
