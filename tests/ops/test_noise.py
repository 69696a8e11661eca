"""The noise contract: known answers, bit-equality of the backends, and the vectors of docs/noise.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from specdec_kernels import noise_words, oracle, selftest
from specdec_kernels.contract import Level, Purpose, counter_tag
from specdec_kernels.reference.noise import exponentials

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "noise.md"


def test_known_answers(backend, device):
    assert selftest.known_answers(backend, device)


def test_oracle_known_answers():
    for counter, key, words in selftest.KNOWN_ANSWERS:
        assert oracle.philox(np.array(counter), key).tolist() == list(words)


def test_bit_equal_to_the_oracle(backend, device):
    generator = torch.Generator().manual_seed(1)
    seed = torch.randint(-(2**62), 2**62, (5,), generator=generator)
    position = torch.tensor([0, 1, 2**31, 2**32 + 7, 2**55 + 3])
    tag = counter_tag(Purpose.TARGET, Level.TOKEN, 65535)
    first = 2**32 - 3  # wraps
    words = noise_words(seed.to(device), position.to(device), tag, first=first, counters=33, backend=backend).cpu()
    for row in range(5):
        expected = oracle.noise_words(int(seed[row]), int(position[row]), tag, first, 33)
        assert words[row].tolist() == expected.tolist()


def test_documented_vectors(backend, device):
    """Each row of the table in docs/noise.md: seed, position, purpose, level, row, index, four words."""
    rows = re.findall(r"^\|" + r"\s*(-?\d+)\s*\|" * 6 + r"\s*`([0-9a-f ]+)`\s*\|$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) >= 8
    for *numbers, words in rows:
        seed, position, purpose, level, row, index = (int(x) for x in numbers)
        got = noise_words(
            torch.tensor([seed], device=device),
            torch.tensor([position], device=device),
            counter_tag(purpose, level, row),
            first=index,
            backend=backend,
        )
        assert [f"{w:08x}" for w in got[0].tolist()] == words.split()


def test_a_different_stream_gives_different_words():
    def words(seed=1, position=2, tag=3):
        return noise_words(torch.tensor([seed]), torch.tensor([position]), tag).tolist()

    assert len({str(words()), str(words(seed=2)), str(words(position=3)), str(words(tag=4))}) == 4


def test_exponentials_are_finite_and_positive_at_both_ends():
    """Case 2: the largest word maps below 1."""
    words = torch.tensor([0, 2**32 - 1], dtype=torch.float64)
    ends = -torch.log1p(-(words + 0.5) * 2.0**-32)
    assert ends.isfinite().all()
    assert (ends > 0).all()


def test_uniform_and_exponential_distributions_of_the_oracle():
    """Coarse: 2^16 draws, mean within five standard errors."""
    noise = exponentials(torch.tensor([5]), torch.tensor([6]), Purpose.TARGET, Level.TILE, torch.tensor([0]), 2**16)
    assert abs(float(noise.mean()) - 1) < 5 / 256
    drawn = [oracle.Noise(seed, 3).uniform(0) for seed in range(2**12)]
    assert abs(np.mean(drawn) - 0.5) < 5 * 12**-0.5 / 64
    assert max(drawn) < 1
