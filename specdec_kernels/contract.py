"""The constants of the noise contract and of a distribution's scalars: one place for every Python implementation.

The normative text is docs/noise.md; the C++ has its own copy in `csrc/cpu/`, held to this one by known-answer vectors.
"""

from __future__ import annotations

from enum import IntEnum

#: Consecutive token ids that the tile race of the two-level race treats as one entry.
TILE = 128

#: Below it a temperature is greedy. Float32 scalars cannot carry a distribution much colder than this: 65,504 (the
#: largest float16) times the scale still fits the two floats of a logsumexp to 1e-5.
MIN_TEMPERATURE = 1e-5

#: Where ``scale * largest logit`` reaches it a row is steep (docs/noise.md): from 2^31 on no other float32 is so near
#: to the largest logit that it would have any weight, and two floats could not hold the logsumexp to 1e-5.
STEEP = 2.0**31

#: What turns a filter off, where requests of a batch differ; None does for all of them.
TOP_K_OFF, TOP_P_OFF, MIN_P_OFF = 0, 1.0, 0.0

#: The parameters of penalties, in the order of the operators.
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

#: Seeds, from the least on: any 64 bits, as PyTorch has them in an int64.
SEEDS = (-(1 << 63), 1 << 63)

#: Rows of one step: the row has 16 bits of the Philox counter.
MAX_ROWS = 1 << 16

#: What siblings leave of a draft's distribution, one minus their probabilities, is summed anew below this: a difference
#: of large numbers would have no digits left.
LEAST_DIFFERENCE = 0.25

#: A share of a draft's distribution below this counts as nothing when siblings are drawn and verified: float32 ends not
#: far below.
NOTHING_LEFT = 2.0**-60

#: Philox4x32-10 multipliers and key increments (Salmon et al., SC 2011).
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


class Purpose(IntEnum):
    """What a random number decides. Numbers of different purposes are independent."""

    DRAFT = 0
    ACCEPT = 1
    TARGET = 2
    COUPLED = 3


class Rule(IntEnum):
    """How drafts are verified; the operators take the number, the public functions the name."""

    TOKEN = 0
    BLOCK = 1
    COUPLED = 2


class TreeRule(IntEnum):
    """How a tree of drafts is verified."""

    WALK = 0
    RECURSIVE = 1
    TRAVERSAL = 2
    COUPLED = 3


class Children(IntEnum):
    """How the children of a node are chosen."""

    TOP = 0
    IID = 1
    WITHOUT_REPLACEMENT = 2
    RACE = 3


def numbers_of(kinds: type[IntEnum]) -> dict[str, int]:
    """The numbers that the operators take, from 0 on, by the names that the public functions take."""
    return {kind.name.lower(): int(kind) for kind in kinds}


class MaskFormat(IntEnum):
    """How a kernel lays out a tree mask; the public formats are shapes and dtypes of these."""

    PACKED = 0
    """A bit a node, in words of the output's dtype."""
    DENSE = 1
    """An element a key, the same number of them in every row."""
    FLAT = 2
    """An element a key, request after request without gaps."""
    FLAT_BITS = 3
    """A bit a key, request after request, each from a byte of its own."""


class Level(IntEnum):
    """Which race of the two-level race the noise belongs to."""

    TILE = 0
    TOKEN = 1


def counter_tag(purpose: int, level: int = 0, row: int = 0) -> int:
    """The last word of the Philox counter: ``purpose | level << 8 | row << 16``."""
    return purpose | level << 8 | row << 16
