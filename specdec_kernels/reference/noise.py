"""Philox4x32-10 and the noise contract in PyTorch (docs/noise.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.contract import PHILOX_INCREMENTS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, Purpose, counter_tag

_LOW = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in int64 without overflowing it."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, (middle << 16 | low & 0xFFFF) & _LOW


def noise_words(seed: Tensor, position: Tensor, tag: int, first: int, counters: int) -> Tensor:
    """Words of the counters ``first, first + 1, ...`` of each stream: int64 ``[R, 4 * counters]``, in [0, 2^32)."""
    return _words(seed, position, torch.full_like(seed, tag), first, counters)


def _words(seed: Tensor, position: Tensor, tag: Tensor, first: int, counters: int) -> Tensor:
    """The same with a tag ``[R]`` for each stream."""
    rows = seed.shape[0]
    index = (torch.arange(counters, device=seed.device) + first) & _LOW

    def spread(x: Tensor) -> Tensor:
        return x.reshape(-1, 1).expand(rows, counters)

    c = [index.expand(rows, counters), spread(position & _LOW), spread(position >> 32 & _LOW), spread(tag)]
    k = [(seed & _LOW)[:, None], (seed >> 32 & _LOW)[:, None]]
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = _multiply(c[0], PHILOX_MULTIPLIERS[0])
        high_b, low_b = _multiply(c[2], PHILOX_MULTIPLIERS[1])
        c = [high_b ^ c[1] ^ k[0], low_b, high_a ^ c[3] ^ k[1], low_a]
        k = [(k[i] + PHILOX_INCREMENTS[i]) & _LOW for i in range(2)]
    return torch.stack(c, -1).reshape(rows, 4 * counters)


def uniform_of(words: Tensor) -> Tensor:
    """Uniforms in [0, 1), float64 ``[R]`` of 53 bits, from the first two words of each stream ``[R, 4]``."""
    return (words[:, 0] << 21 | words[:, 1] >> 11).double() * 2.0**-53


def exponential_of(words: Tensor) -> Tensor:
    """Standard exponentials, float64, one from each word."""
    return -torch.log1p(-(words.double() + 0.5) * 2.0**-32)


def uniforms(seed: Tensor, position: Tensor, row: Tensor) -> Tensor:
    """The uniform in [0, 1) that decides on acceptance: float64 ``[R]``, 53 bits."""
    return uniform_of(_words(seed, position, Purpose.ACCEPT | row << 16, 0, 1))


def exponentials(seed: Tensor, position: Tensor, purpose: int, level: int, row: Tensor, count: int) -> Tensor:
    """Standard exponentials of a race: float64 ``[R, count]``."""
    return exponential_of(_words(seed, position, counter_tag(purpose, level) | row << 16, 0, -(-count // 4))[:, :count])
