"""The noise contract (docs/noise.md) in Triton."""

# Triton kernels are compiled, not run: annotations of their arguments would be noise.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import Level, Purpose
from specdec_kernels.workspace import power_of_two

ACCEPT = tl.constexpr(int(Purpose.ACCEPT))
TOKEN_LEVEL = tl.constexpr(int(Level.TOKEN) << 8)
FLAT_RACE = tl.constexpr(int(Purpose.COUPLED) | int(Level.TOKEN) << 8)

# log1p(f) = f - f^2 / 2 + f^3 P(f) on [-1/4, 1/2], to 5e-9; the fit of csrc/cpu/polynomials.h.
_P0 = tl.constexpr(3.333344912e-1)
_P1 = tl.constexpr(-2.500009583e-1)
_P2 = tl.constexpr(1.999086086e-1)
_P3 = tl.constexpr(-1.664731234e-1)
_P4 = tl.constexpr(1.447840050e-1)
_P5 = tl.constexpr(-1.316119653e-1)
_P6 = tl.constexpr(1.046299571e-1)
_P7 = tl.constexpr(-4.507446709e-2)
_LN2 = tl.constexpr(0.6931471805599453)
_THREE_QUARTERS = tl.constexpr(0x3F400000)  # its bits


@triton.jit
def counter_words(seed, position, tag, index):
    """The four words of the counters ``index`` (uint32, any shape)."""
    zero = index * 0
    low = (position & 0xFFFFFFFF).to(tl.uint32) + zero
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    return tl.philox(seed, index, low, high, tag.to(tl.uint32) + zero)


@triton.jit
def exponentials(seed, position, tag, entry):
    """Standard exponentials of the race entries ``entry``: -log1p(-u), u = (word + 1/2) / 2^32. Four that follow each
    other in the last dimension do so in the race, and share their words."""
    even, _odd = tl.split(tl.reshape(entry, (entry.numel // 4, 2, 2)))
    first, _third = tl.split(even)
    w0, w1, w2, w3 = counter_words(seed, position, tag, first.to(tl.uint32) // 4)
    word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), entry.shape)
    small = word < 0x80000000
    half = (tl.where(small, word, word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    # The logarithm of x = 2^exponent (1 + f). Near u = 0, where winners are, 1 - u has no relative precision left.
    x = tl.where(small, 1.0 - half, half)
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _THREE_QUARTERS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(small & (half < 0.25), -half, f)
    # Every kernel has to find the same bits, so what is fused is said.
    series = tl.fma(f, _P7, _P6)
    series = tl.fma(series, f, _P5)
    series = tl.fma(series, f, _P4)
    series = tl.fma(series, f, _P3)
    series = tl.fma(series, f, _P2)
    series = tl.fma(series, f, _P1)
    series = tl.fma(series, f, _P0)
    log1p = tl.fma(f * f, tl.fma(f, series, -0.5), f)
    return tl.fma(exponent.to(tl.float32), -_LN2, -log1p)


@triton.jit
def uniform(seed, position, row):
    """The uniform in [0, 1) that decides on acceptance: float64, 53 bits."""
    tag = tl.full([], ACCEPT, tl.int64) | (row.to(tl.int64) << 16)
    w0, w1, _w2, _w3 = counter_words(seed, position, tag, tl.full([], 0, tl.uint32))
    return (((w0.to(tl.uint64) << 32) | w1.to(tl.uint64)) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit(do_not_specialize=["tag", "first", "counters"])
def noise_words_kernel(seed_ptr, position_ptr, out_ptr, tag, first, counters, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    w0, w1, w2, w3 = counter_words(seed, position, tag, (first + index).to(tl.uint32))
    out = out_ptr + row * counters * 4 + index * 4
    tl.store(out, w0.to(tl.int64), mask=index < counters)
    tl.store(out + 1, w1.to(tl.int64), mask=index < counters)
    tl.store(out + 2, w2.to(tl.int64), mask=index < counters)
    tl.store(out + 3, w3.to(tl.int64), mask=index < counters)


def noise_words(seed: Tensor, position: Tensor, tag: int, first: int, counters: int) -> Tensor:
    """Words of the counters ``first, first + 1, ...`` of each stream: int64 ``[R, 4 * counters]``."""
    out = seed.new_empty((seed.shape[0], 4 * counters))
    if out.numel():
        # As they are in 32 bits: Triton's interpreter takes an int from 2^31 on for a negative one of 64.
        tag, first = ((x ^ 1 << 31) - (1 << 31) for x in (tag, first))
        noise_words_kernel[(seed.shape[0],)](seed, position, out, tag, first, counters, BLOCK=power_of_two(counters))
    return out
