"""How much scratch the kernels take, which callers may hand in so that verification allocates nothing.

`workspace_bytes` in csrc/common/ops.h is the same.
"""

from __future__ import annotations

from specdec_kernels.checks import whole
from specdec_kernels.contract import TILE

#: What each part begins at a multiple of, and bytes that a backend keeps of a row, at most.
ALIGNMENT, PLACE_BYTES = 256, 128
#: Of each row the programs that came; of each request two counters, and a bit for each row
#: (Triton has a third counter there).
COUNTER_BYTES, COUNTERS_A_REQUEST, COUNTER_BITS = 4, 2, 32
#: Tables of a row, of target and draft: in Triton five numbers of every tile, up to a power of two of them, no fewer
#: than sixteen; in CUDA twenty for each of every eight tiles.
NUMBERS_A_TILE, LEAST_TILES, TILES_A_SPAN, NUMBERS_A_SPAN, NUMBER_BYTES = 5, 16, 8, 40, 4
#: Bytes that each block of CUDA keeps of a row, where blocks share requests; and how many blocks do at most, if it is
#: not one for each request.
STATE_BYTES, MOST_BLOCKS = 48, 1024


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
    of_triton = NUMBERS_A_TILE << (max(tiles, LEAST_TILES) - 1).bit_length()
    numbers = max(of_triton, NUMBERS_A_SPAN * spans)
    states = min(batch * spans, max(batch, MOST_BLOCKS)) * (num_draft + 1)
    parts = (counters * COUNTER_BYTES, rows * PLACE_BYTES, states * STATE_BYTES, rows * numbers * NUMBER_BYTES)
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in parts)
