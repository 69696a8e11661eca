"""The law of every backend: exactly, by seeds that put each random number into a chosen cell, and by statistics."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from specdec_kernels import oracle
from specdec_kernels.contract import TILE, Level, Purpose
from specdec_kernels.ops import BACKENDS

F = Fraction
CELLS = 4
LENGTH = 2

# Two tokens, probabilities in quarters, acceptance ratios in quarters: with one coin and one race number in each
# cell of a grid of quarters, counting requests *is* the law. Rows by prefix; a residual has one token only.
TARGET = {(): (1, 3), (0,): (3, 1), (1,): (1, 3), (0, 0): (1, 3), (0, 1): (2, 2), (1, 0): (3, 1), (1, 1): (1, 3)}
DRAFTS = {
    "dense": {(): (2, 2), (0,): (2, 2), (1,): (2, 2)},
    "statistics": {(): (2, 2), (0,): (2, 2), (1,): (2, 2)},
    "point mass": {(): (4, 0), (0,): (0, 4), (1,): (4, 0)},
}


def quarters(weights):
    return [F(w, CELLS) for w in weights]


def logits_of(weights):
    return torch.tensor([w / CELLS for w in weights], dtype=torch.float64).log().float()


def race_number(noise, row):
    """A uniform that decides a race between two tokens: the first wins iff it is below its probability."""
    first, second = noise.exponentials(Purpose.TARGET, Level.TOKEN, row, 2)
    return first / (first + second)


@pytest.fixture(scope="module")
def seeds():
    """For each (coin cell, coin cell, race cell): a seed whose numbers lie in the middle half of those cells."""
    found: dict[tuple[int, ...], int] = {}
    for seed in range(2**20):
        noise = oracle.Noise(seed, 11)
        numbers = [noise.coin(row) for row in range(LENGTH)]
        cells = [int(u * CELLS) for u in numbers]
        if any(abs(u * CELLS - cell - 0.5) > 0.25 for u, cell in zip(numbers, cells, strict=True)):
            continue
        races = [race_number(noise, row) for row in range(LENGTH + 1)]
        race_cells = {int(u * CELLS) for u in races}
        if len(race_cells) > 1 or any(abs(u * CELLS % 1 - 0.5) > 0.4 for u in races):
            continue
        found.setdefault((*cells, race_cells.pop()), seed)
        if len(found) == CELLS ** (LENGTH + 1):
            return found
    raise AssertionError("too few seeds")


def law_by_counting(verify_chain, seeds, kind, drawn_from=None):
    """The law of LENGTH + 1 tokens: every draft, every cell, continued by the target."""
    draft = DRAFTS[kind]
    masses, prefixes, cells = [], [], []
    for tokens in product(range(2), repeat=LENGTH):
        mass = F(1)
        for i, token in enumerate(tokens):
            mass *= quarters((drawn_from or draft)[tokens[:i]])[token]
        if mass:
            for cell in seeds:
                masses.append(mass / len(seeds))
                prefixes.append(tokens)
                cells.append(seeds[cell])
    target = torch.stack([torch.stack([logits_of(TARGET[t[:i]]) for i in range(LENGTH + 1)]) for t in prefixes])
    logits = torch.stack([torch.stack([logits_of(draft[t[:i]]) for i in range(LENGTH)]) for t in prefixes])
    stats = torch.tensor([1.0, -torch.inf, 0.0]).expand(len(prefixes), LENGTH, 3)
    verified = verify_chain(
        target,
        torch.tensor(prefixes),
        None if kind == "point mass" else logits,
        stats if kind == "statistics" else None,
        seed=torch.tensor(cells),
        position=11,
    )
    law: oracle.Law = {}

    def add(prefix, mass):
        if mass and len(prefix) == LENGTH + 1:
            law[prefix] = law.get(prefix, F(0)) + mass
        elif mass:
            for token, prob in enumerate(quarters(TARGET[prefix])):
                add((*prefix, token), mass * prob)

    for row, mass in zip(verified.tokens.tolist(), masses, strict=True):
        add(tuple(token for token in row if token >= 0), mass)
    return law


def exact_target():
    return oracle.target_law(lambda prefix: quarters(TARGET[prefix]), LENGTH)


@pytest.mark.parametrize("kind", DRAFTS)
def test_the_law_is_exact(verify_chain, seeds, kind):
    assert oracle.total_variation(law_by_counting(verify_chain, seeds, kind), exact_target()) == 0


@pytest.mark.parametrize("kind", ["dense", "statistics"])
def test_a_wrong_draft_law_is_seen(verify_chain, seeds, kind):
    """Case 3: drafts from another law than the declared one change the text."""
    other = dict.fromkeys(DRAFTS[kind], (1, 3))
    law = law_by_counting(verify_chain, seeds, kind, drawn_from=other)
    assert oracle.total_variation(law, exact_target()) > F(1, 50)


def g_test(counts, probs):
    """G statistic against probabilities, cells with few expected counts pooled, and its degrees of freedom."""
    expected = counts.sum() * probs
    small = expected < 8
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    seen = counts > 0
    return 2 * float((counts[seen] * np.log(counts[seen] / expected[seen])).sum()), int((expected > 0).sum()) - 1


def limit(freedom):
    """Where a chi-square is exceeded less than once in ten million times (Wilson-Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 5.4 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.fixture
def fast(backend):
    """20,000 requests take the Triton interpreter minutes; there the exact tests above have to do."""
    if backend == "triton" and BACKENDS[backend].device == "cpu":
        pytest.skip("interpreted")


@pytest.mark.usefixtures("fast")
def test_residual_noise_is_not_the_drafts(sample, verify_chain):
    """Case 6: the joint law of (draft, emitted) over many requests, across tiles."""
    vocab, count = TILE + 3, 20_000
    generator = torch.Generator().manual_seed(4)
    draft, target = torch.full((2, vocab), -torch.inf)
    ids = torch.tensor([0, 1, TILE, TILE + 2])
    draft[ids], target[ids] = torch.randn(4, generator=generator), torch.randn(4, generator=generator)
    seed = torch.arange(count)
    drawn = sample(draft.expand(count, vocab), seed=seed, position=5)
    rows = torch.stack([target, target]).expand(count, 2, vocab)
    verified = verify_chain(
        rows, drawn.tokens[:, None], draft.expand(count, 1, vocab), drawn.stats[:, None], seed=seed, position=5
    )
    p, q = target.double().softmax(-1).numpy(), draft.double().softmax(-1).numpy()
    residual = np.maximum(p - q, 0)
    joint = np.zeros((vocab, vocab, vocab))
    for x in ids.tolist():
        accept = min(1.0, p[x] / q[x])
        for y in ids.tolist():
            joint[x, x, y] += q[x] * accept * p[y]
            joint[x, y, 0] += q[x] * (1 - accept) * residual[y] / residual.sum()
    second = verified.tokens[:, 1].clamp(min=0)
    counts = np.zeros_like(joint)
    np.add.at(counts, (drawn.tokens.numpy(), verified.tokens[:, 0].numpy(), second.numpy()), 1)
    statistic, freedom = g_test(counts.ravel(), joint.ravel())
    assert statistic < limit(freedom)


def test_noise_tail(backend, sample):
    """Case 10: a large vocabulary, logit gaps of 18 and 20, the tail drawn as often as it should be."""
    if backend != "cpu":
        pytest.skip("100,000 rows of 129,280 are for the fast backend")
    vocab, draws = 129_280, 100_000
    row = torch.full((vocab,), -18.0)
    row[1::2] = -20.0
    row[777] = 0.0
    probability = 1 - float(row.double().softmax(-1)[777])
    drawn = sample(row.expand(draws, vocab), seed=torch.arange(draws), position=1)
    tail = int((drawn.tokens != 777).sum())
    assert abs(tail - draws * probability) < 4 * (draws * probability) ** 0.5


@pytest.mark.usefixtures("fast")
def test_two_steps_in_a_row_are_independent(verify_chain):
    """The noise of one step says nothing of the next: the joint law of two bonus draws."""
    count = 20_000
    target = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(count, 1, 3)
    empty = torch.empty((count, 0), dtype=torch.int64)
    first, second = (
        verify_chain(target, empty, seed=torch.arange(count), position=position).tokens[:, 0] for position in (7, 8)
    )
    counts = np.zeros((3, 3))
    np.add.at(counts, (first.numpy(), second.numpy()), 1)
    probs = np.array([0.5, 0.3, 0.2])
    statistic, freedom = g_test(counts.ravel(), np.outer(probs, probs).ravel())
    assert statistic < limit(freedom)
