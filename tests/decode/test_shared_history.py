"""Texts that later requests are drafted from: bounded, saved, and never of the same noise."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from decoding import exact_distribution
from distributions import g_test, limit
from small_tokenizers import of_tokens
from tiny import VOCAB, slow_greedy, steady, tiny

from specdec_kernels import verify_chain
from specdec_kernels.decode import Scheduler, Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import (
    AsyncDrafter,
    CallableDrafter,
    MergedDrafter,
    NGramDrafter,
    SharedHistory,
    TranslatedDrafter,
    Translation,
)
from specdec_kernels.decode.drafters import shared_history as module
from specdec_kernels.decode.drafts import Step
from specdec_kernels.decode.protocols import revertible


@pytest.fixture(scope="module")
def model():
    return steady(tiny(1, layers=2))


def found(history, tokens, count=9, seed=-1, any_seed=True):
    """What a request that has written this is drafted; nothing is left of it."""
    text = history.begin([], seed).fork()
    text.origin = None
    text.extend(tokens)
    return text.find(count, any_seed)


def check(history):
    """What is kept is bounded, and everything that leads into it is of it."""
    assert len(history) == sum(len(block.tokens) for block in history._blocks) <= history.max_tokens
    assert all(place.block in history._blocks for place in history._places.values())
    assert len(history._places) <= 2 * history.max_tokens
    for key, (block, offset) in history._places.items():
        assert offset < len(block.tokens)
        assert key in block.keys


def test_what_followed_a_run_the_last_time():
    history = SharedHistory()
    history.begin([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 0)
    history.begin([0, 5, 6, 7, 8, 20, 21], 1)
    assert found(history, [5, 6, 7, 8]) == (4, [20, 21])
    assert found(history, [1, 2, 3, 4, 5, 6, 7, 8]) == (8, [9, 10, 11])  # the longer run
    assert found(history, [9, 2, 3, 4, 5, 6, 7, 8], count=1) == (4, [20])
    assert found(history, [6, 7, 8]) == (0, [])
    assert found(history, [7, 8, 20, 21]) == (0, [])  # nothing followed
    check(history)


def test_a_request_writes_as_it_goes():
    """Across blocks, beside another one that does, and is not drafted its own text."""
    history = SharedHistory()
    first, second = history.begin([], 1), history.begin([], 2)
    for token in range(3 * module.BLOCK):
        first.extend([token])
        second.extend([1000 + token])
    for start in (0, module.BLOCK - 6, module.BLOCK - 4, module.BLOCK - 1):
        run = list(range(start, start + 4))
        assert found(history, run, 99) == (4, list(range(start + 4, start + 103))[:99])
        assert found(history, [1000 + token for token in run], 9)[1][0] == 1004 + start
    for token in range(4):
        first.extend([token])
    assert first.find(5, True) == (0, [])
    check(history)


def test_the_oldest_are_forgotten_first():
    history = SharedHistory(max_tokens=4 * module.BLOCK)
    slow = history.begin([9000, 9001, 9002, 9003, 9004], 0)
    for start in range(0, 20 * module.BLOCK, 100):
        history.begin(list(range(start, start + 100)), start)
        check(history)
    assert found(history, [9000, 9001, 9002, 9003]) == (0, [])
    assert found(history, [100, 101, 102, 103]) == (0, [])
    latest = 20 * module.BLOCK // 100 * 100
    assert found(history, list(range(latest, latest + 4)), 3) == (4, list(range(latest + 4, latest + 7)))
    slow.extend([9005, 9006])  # goes on, though its beginning is gone
    check(history)
    assert found(history, [9001, 9002, 9003, 9004]) == (4, [9005, 9006])


def test_saved_and_loaded(tmp_path):
    history = SharedHistory(tokenizer="a")
    texts = {seed: random.Random(seed).choices(range(50), k=150) for seed in (3, -4, 1 << 62)}
    for seed, text in texts.items():
        history.begin(text, seed)
    history.begin([1, 2, 3, 4, 5])  # never decoded: its seed is not known
    path = tmp_path / "history"
    history.save(path)
    history.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["history"]
    loaded = SharedHistory.load(path, tokenizer="a")
    assert len(loaded) == len(history) == 455
    for seed, text in texts.items():
        for start in range(0, 140, 13):
            run = text[start : start + 8]
            for other in (seed, 7):
                assert found(loaded, run, 9, other, False) == found(history, run, 9, other, False)
            assert found(loaded, run, 9, 7, False)[1]
    assert found(loaded, [1, 2, 3, 4], 1, 7, False) == (0, [])
    few = SharedHistory.load(path, max_tokens=module.BLOCK, tokenizer="a")
    check(few)
    assert found(few, [1, 2, 3, 4]) == (4, [5])
    SharedHistory().save(path)
    assert len(SharedHistory.load(path)) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_the_texts_and_go_on_alone(copied):
    history = SharedHistory(max_tokens=400, tokenizer="a")
    texts = {seed: random.Random(seed).choices(range(50), k=150) for seed in (3, None)}
    for seed, text in texts.items():
        history.begin(text, seed)
    other = copied(NGramDrafter(3, shared=history)).shared
    check(other)
    assert (len(other), other.max_tokens, other.tokenizer) == (300, 400, "a")
    for text in texts.values():
        for seed in (3, 7):
            run = text[20:28]
            assert found(other, run, 9, seed, False) == found(history, run, 9, seed, False)
    assert found(other, texts[3][20:28])[1] == texts[3][28:37]
    other.begin([60, 61, 62, 63, 64])
    assert found(other, [60, 61, 62, 63]) == (4, [64])
    assert found(history, [60, 61, 62, 63]) == (0, [])


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "history"
    SharedHistory(tokenizer="a").save(path)
    with pytest.raises(ValueError, match="must be of the tokenizer 'b', got 'a'"):
        SharedHistory.load(path, tokenizer="b")
    with pytest.raises(OSError):
        SharedHistory.load(tmp_path / "nothing")
    path.write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"must be of a file that SharedHistory\.save wrote"):
        SharedHistory.load(path)
    with path.open("wb") as file:
        np.savez(file, tokens=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"must be of a file that SharedHistory\.save wrote"):
        SharedHistory.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(
        ValueError, match=r"must be of a file that SharedHistory\.save wrote, got .* \(an array alone\)"
    ):
        SharedHistory.load(path)
    arrays = {"lengths": [4], "seeds": [0], "seeded": [True], "tokenizer": ""}
    for tokens, message in (([1, 2, -3, 4], r"token ids in \[0"), ([1, 2, 3], "must have 4 tokens, got 3")):
        with path.open("wb") as file:
            np.savez(file, tokens=np.array(tokens), **arrays)
        with pytest.raises(ValueError, match=message):
            SharedHistory.load(path)


def test_damaged_files_are_refused(tmp_path):
    """Wherever a byte is wrong: zlib, zipfile and NumPy each raise errors of their own."""
    path = tmp_path / "history"
    history = SharedHistory()
    history.begin(list(range(200)), 0)
    history.save(path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            SharedHistory.load(path)
        except ValueError:
            refused += 1
    assert refused > 50


def test_a_file_is_written_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "history"
    history = SharedHistory()
    history.begin([1, 2, 3, 4, 5], 0)
    history.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        history.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("named", "error", "message"), [
    ({"max_tokens": 63}, ValueError, "max_tokens must be at least 64, got 63"),
    ({"max_tokens": 1e5}, TypeError, "max_tokens must be an int, got 100000.0"),
])  # fmt: skip
def test_bad_histories(named, error, message):
    with pytest.raises(error, match=message):
        SharedHistory(**named)


def test_what_is_no_history():
    with pytest.raises(TypeError, match="shared must be a SharedHistory, got list"):
        NGramDrafter(shared=[])


# --- the distribution -------------------------------------------------------------------------------------------------


def test_a_text_drafted_for_its_own_seed_gives_a_wrong_distribution():
    """Why texts of the same seed are left out: what was drawn with the same noise depends on the uniforms that verify
    it. With another seed, and by the rule "coupled", it may be drafted."""
    count, distribution = 20_000, [0.5, 0.3, 0.2]
    logits = torch.tensor(distribution).log().expand(count, 2, 3).contiguous()

    def third(rule, seeds):
        """A text drafted from one that was drafted from one."""
        written = torch.zeros(count, dtype=torch.int64)
        for seed in seeds:
            written = verify_chain(logits, written[:, None], seed=seed, position=7, rule=rule).tokens[:, 0].long()
        return g_test(written.bincount(minlength=3).double().numpy(), np.array(distribution))

    same = torch.arange(count)
    for rule, seeds, right in (
        ("token", [same, same], False), ("block", [same, same], False), ("coupled", [same, same], True),
        ("token", [same, same + count], True), ("token", [same, same + count, same + 2 * count], True),
    ):  # fmt: skip
        statistic, freedom = third(rule, seeds)
        assert (statistic < limit(freedom)) == right, (rule, right)


def step(count, seed, **named):
    keys = torch.tensor([seed])
    return Step([count], keys, torch.tensor([4]), 0.8, **named)


def test_texts_of_the_same_seed_are_left_out_at_a_temperature():
    history = SharedHistory()
    drafter = NGramDrafter(shared=history)
    written = drafter.begin([[1, 2, 3, 4]], None)
    written.propose(step(1, 5))
    written.commit([[6, 7]], None)
    for seed, named, expected in (
        (5, {}, []), (6, {}, [6, 7]), (5, {"same_text": True}, [6, 7]), (5, {"greedy": True}, []),
    ):  # fmt: skip
        other = NGramDrafter(shared=history).begin([[9, 9]], None)
        other.commit([[1, 2, 3, 4]], None)
        (text,) = other._texts
        text.block.keys.clear()  # what it wrote itself is not in the way of the next
        history._places = {key: place for key, place in history._places.items() if place.block.text is not text}
        assert other.propose(step(2, seed, **named)).tokens.tolist() == [expected]
    unknown = SharedHistory()
    NGramDrafter(shared=unknown).begin([[1, 2, 3, 4, 6]], None)  # was not asked yet: whose noise will it have?
    assert NGramDrafter(shared=unknown).begin([[1, 2, 3, 4]], None).propose(step(1, 5)).tokens.tolist() == [[]]


def other_ids():
    """From the tokens of the model to the same ones by other ids."""
    names = "abcdefghijk"[:VOCAB]
    return Translation(of_tokens(names), of_tokens(names[::-1]))


AROUND = {
    "alone": lambda drafter: drafter,
    "merged": lambda drafter: MergedDrafter(CallableDrafter(lambda history, count: []), drafter),
    "translated": lambda drafter: TranslatedDrafter(drafter, other_ids(), VOCAB),
}


@pytest.mark.parametrize("around", AROUND)
def test_so_they_are_where_another_drafter_wants_the_likeliest_drafts(model, around):
    """Which says how to draft, and not that nothing is drawn."""

    def proposed(seeds, temperature=1.0, rule="token"):
        """Drafts for the last of requests that write one after the other."""
        drafter = AROUND[around](NGramDrafter(8, shared=SharedHistory()))
        for seed in seeds:
            statistics = Statistics()
            generate(
                TransformersTarget(model), [[5, 6, 7, 8, 9, 10, 1, 2]], drafter=drafter, num_draft=3, seed=seed,
                max_new_tokens=20, temperature=temperature, rule=rule, statistics=statistics,
            )  # fmt: skip
        return statistics.proposed

    for rule in ("token", "block"):
        assert proposed([5, 5], rule=rule) == 0
        assert proposed([5, 6], rule=rule) > 0
    assert proposed([5, 5], rule="coupled") > 9
    assert proposed([5, 5], temperature=0.0) > 9


@pytest.mark.parametrize("ahead", [False, True])
def test_joint_distribution_with_the_others_texts(ahead):
    """Four tokens of requests that are drafted what others write and wrote, whose seeds are all others."""
    model, count, batch, length, prompt = tiny(7, vocab=3, sharp=0.8), 8_000, 2_000, 3, [1, 2, 0, 1]
    distribution = exact_distribution(model, prompt, 0.8, length)
    drafter = NGramDrafter(shared=SharedHistory(max_tokens=8 * batch))
    seen, statistics = Counter(), Statistics()
    for start in range(0, count, batch):
        results = generate(
            TransformersTarget(model), [prompt] * batch, drafter=AsyncDrafter(drafter) if ahead else drafter,
            num_draft=1, max_new_tokens=length, temperature=0.8, seed=list(range(start, start + batch)),
            statistics=statistics,
        )  # fmt: skip
        seen.update(tuple(result.tokens) for result in results)
    assert statistics.accepted > 1000
    statistic, freedom = g_test(
        np.array([float(seen[sequence]) for sequence in distribution]), np.array(list(distribution.values()))
    )
    assert statistic < limit(freedom)


# --- in the loop ------------------------------------------------------------------------------------------------------


def test_what_was_written_once_is_drafted_the_next_time(model, tmp_path):
    """By another stream, after a restart, and ahead of the target."""
    prompt, right = [5, 6, 7, 8, 9, 10], slow_greedy(model, [5, 6, 7, 8, 9, 10], 40)
    options = {"max_new_tokens": 40, "num_draft": 5, "temperature": 0.0}

    def rate(drafter):
        statistics = Statistics()
        (result,) = generate(TransformersTarget(model), [prompt], drafter=drafter, statistics=statistics, **options)
        assert result.tokens == right
        return statistics.tokens_per_step

    history = SharedHistory()
    alone = rate(NGramDrafter(4))
    assert rate(NGramDrafter(4, shared=history)) == alone
    assert rate(NGramDrafter(4, shared=history)) > 5 > alone
    history.save(tmp_path / "history")
    loaded = SharedHistory.load(tmp_path / "history")
    assert rate(AsyncDrafter(NGramDrafter(4, shared=loaded))) > 5


def test_requests_of_a_scheduler_share_it(model):
    """Joined and left; what each wrote is there as one text."""
    history = SharedHistory()
    drafter = NGramDrafter(4, shared=history)
    scheduler = Scheduler(TransformersTarget(model), drafter, max_requests=2, num_draft=3)
    prompts = [[1, 2, 3, 4, 5], [5, 4, 3], [2, 2, 2, 2, 7], [1, 2, 3, 4, 5]]
    submissions = [
        scheduler.submit(prompt, max_new_tokens=20 + index, seed=index) for index, prompt in enumerate(prompts)
    ]
    scheduler.run()
    texts = Counter()
    for block in history._blocks:
        texts[block.text.seed, id(block.text)] += len(block.tokens)
    assert sorted((seed, length) for (seed, _), length in texts.items()) == [
        (index, len(prompt) + len(submission.result().tokens))
        for index, (prompt, submission) in enumerate(zip(prompts, submissions, strict=True))
    ]
    check(history)


def test_a_trial_writes_nothing():
    history = SharedHistory()
    session = NGramDrafter(shared=history).begin([[1, 2, 3, 4], [7, 8]], None)
    before = len(history), dict(history._places)
    with revertible(session).trial():
        session.commit([[5, 6, 7, 8, 9], [9]], None)
        session.propose(Step([2, 2], torch.tensor([1, 2]), torch.tensor([9, 3]), 0.8))
    assert (len(history), history._places) == before
    assert [text.latest for text in session._texts] == [[1, 2, 3, 4], [7, 8]]
    assert [text.seed for text in session._texts] == [1, 2]


def test_many_threads_write_and_look():
    history, errors = SharedHistory(max_tokens=500), []

    def work(seed):
        choose = random.Random(seed)
        try:
            for _ in range(30):
                text = history.begin([choose.randrange(3) for _ in range(10)], seed)
                for _ in range(10):
                    text.extend([choose.randrange(3) for _ in range(choose.randint(0, 9))])
                    text.find(5, choose.random() < 0.5)
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    check(history)
