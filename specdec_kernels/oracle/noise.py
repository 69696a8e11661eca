"""The noise contract (docs/noise.md) in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec_kernels.contract import PHILOX_INCREMENTS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, Purpose, counter_tag

Floats = NDArray[np.float64]
Words = NDArray[np.uint32]


def philox(counter: NDArray[Any], key: tuple[int, int]) -> Words:
    """Philox4x32-10 of counters ``[..., 4]`` under a key of two words; four words each."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(counter)[..., i].astype(np.uint64) for i in range(4)]
    k = [key[0], key[1]]
    for _ in range(PHILOX_ROUNDS):
        a, b = c[0] * np.uint64(PHILOX_MULTIPLIERS[0]), c[2] * np.uint64(PHILOX_MULTIPLIERS[1])
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[i] + PHILOX_INCREMENTS[i]) & 0xFFFFFFFF for i in range(2)]
    return np.stack(c, -1).astype(np.uint32)


def noise_words(seed: int, position: int, tag: int, first: int, counters: int) -> Words:
    """The words of counters ``first, first + 1, ...`` of one request's stream, four a counter."""
    counter = np.zeros((counters, 4), np.uint64)
    counter[:, 0] = (first + np.arange(counters)) & 0xFFFFFFFF
    counter[:, 1] = position & 0xFFFFFFFF
    counter[:, 2] = (position >> 32) & 0xFFFFFFFF
    counter[:, 3] = tag
    return philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).reshape(-1)


@dataclass
class Noise:
    """The noise of one step of one request; tests subclass it to inject uniforms and exponentials."""

    seed: int
    position: int

    def uniform(self, row: int) -> float:
        """A uniform in [0, 1): 64 bits, of which a double keeps the first 53."""
        words = noise_words(self.seed, self.position, counter_tag(Purpose.ACCEPT, 0, row), 0, 1)
        return float((int(words[0]) << 32 | int(words[1])) >> 11) * 2.0**-53

    def exponentials(self, purpose: int, level: int, row: int, count: int) -> Floats:
        """Standard exponentials ``-log1p(-u)``, ``u = (word + 1/2) / 2^32``."""
        tag = counter_tag(purpose, level, row)
        words = noise_words(self.seed, self.position, tag, 0, -(-count // 4))[:count].astype(np.float64)
        return -np.log1p(-(words + 0.5) * 2.0**-32)

    def at(self, row: int) -> Noise:
        """The noise of the coupled rule, which is keyed on the absolute position of a token."""
        return replace(self, position=self.position + row)
