"""How much scratch the kernels take, which callers may hand in so that verification allocates nothing.

`workspace_bytes` in csrc/common/ops.h is the same.
"""

from __future__ import annotations

from specdec_kernels.checks import whole
from specdec_kernels.contract import TILE

#: Every part begins at a multiple of ALIGNMENT. PLACE_BYTES is what a backend keeps of a judged row, at most.
ALIGNMENT, PLACE_BYTES = 256, 128
#: One counter a row (programs that have finished it), two a request, and one bit a row in 32-bit words (where Triton,
#: which has no bits, has a third counter).
COUNTER_BYTES, COUNTERS_A_REQUEST, COUNTER_BITS = 4, 2, 32
#: The tables of a row, for target and draft: Triton has 5 numbers for each tile, tiles rounded up to a power of two, at
#: least 16; CUDA has 40 for every 8 tiles.
NUMBERS_A_TILE, LEAST_TILES, TILES_A_SPAN, NUMBERS_A_SPAN, NUMBER_BYTES = 5, 16, 8, 40, 4
#: Bytes of state a row for each CUDA block that shares a request. Such blocks are at most MOST_BLOCKS, or one a request
#: where there are more requests.
STATE_BYTES, MOST_BLOCKS = 48, 1024


def power_of_two(least: int) -> int:
    """The first that is not below ``least``. Triton's own function takes as long as a tensor to make."""
    return 1 << (least - 1).bit_length()


def entries(vocab: int) -> int:
    """Tiles that there is room for in Triton's tables of a row."""
    return max(power_of_two(-(-vocab // TILE)), LEAST_TILES)


def verify_chain_workspace(batch: int, num_draft: int, vocab: int) -> int:
    """Bytes of scratch that :func:`specdec_kernels.verify_chain` needs for so many requests, drafts and tokens, on any
    backend.

    A workspace is zeroed once, before its first use. Calls that follow each other on one stream may share it, smaller
    ones too; calls that may run side by side, such as graphs on different streams, need their own.

    Args:
        batch: requests, at most.
        num_draft: drafts of a request, at most.
        vocab: tokens of the vocabulary.

    Example:
        >>> import torch
        >>> size = verify_chain_workspace(64, 4, 151_936)
        >>> workspace = torch.zeros(size, dtype=torch.uint8)  # on the GPU: device="cuda"
        >>> size
        13395968
    """
    for name, value, least in (("batch", batch, 0), ("num_draft", num_draft, 0), ("vocab", vocab, 1)):
        whole(name, value, least)
    rows, tiles = batch * (num_draft + 1), -(-vocab // TILE)
    counters = rows + (COUNTERS_A_REQUEST + -(-(num_draft + 1) // COUNTER_BITS)) * batch
    spans = -(-tiles // TILES_A_SPAN)
    numbers = max(NUMBERS_A_TILE * entries(vocab), NUMBERS_A_SPAN * spans)
    states = min(batch * spans, max(batch, MOST_BLOCKS)) * (num_draft + 1)
    parts = (counters * COUNTER_BYTES, rows * PLACE_BYTES, states * STATE_BYTES, rows * numbers * NUMBER_BYTES)
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in parts)
