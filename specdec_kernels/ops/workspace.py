"""Scratch that callers hand in, so that verification allocates nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.contract import TILE
from specdec_kernels.ops import validate

#: What each part begins at a multiple of, and bytes that a backend keeps of a row, at most.
ALIGNMENT, PLACE_BYTES = 256, 128
#: Of each row the programs that came; of each request two counters, and a bit for each row
#: (Triton has a third counter there).
COUNTER_BYTES, COUNTERS_A_REQUEST, COUNTER_BITS = 4, 2, 32
#: Tables of a row, of target and draft: in Triton two numbers of every tile, up to a power of two of them; in CUDA
#: twenty of every eight tiles.
NUMBERS_A_TILE, TILES_A_SPAN, NUMBERS_A_SPAN, NUMBER_BYTES = 4, 8, 40, 4


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
        10528768
    """
    for name, value, least in (("batch", batch, 0), ("num_draft", num_draft, 0), ("vocab", vocab, 1)):
        validate.whole(name, value, least)
    rows, tiles = batch * (num_draft + 1), -(-vocab // TILE)
    counters = rows + (COUNTERS_A_REQUEST + -(-(num_draft + 1) // COUNTER_BITS)) * batch
    numbers = max(NUMBERS_A_TILE << (tiles - 1).bit_length(), NUMBERS_A_SPAN * -(-tiles // TILES_A_SPAN))
    parts = (counters * COUNTER_BYTES, rows * PLACE_BYTES, rows * numbers * NUMBER_BYTES)
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in parts)


def checked(check: validate.ArgumentChecker, workspace: object, num_draft: int) -> Tensor:
    """A workspace that is large enough."""
    given = check.tensor("workspace", workspace, (torch.uint8,), "bytes")
    size = verify_chain_workspace(check.sizes["B"], num_draft, check.sizes["V"])
    if given.shape[0] < size:
        raise ValueError(f"workspace must have at least {size} bytes, got {validate.describe(given)}")
    if not torch.compiler.is_compiling() and (not given.is_contiguous() or given.storage_offset() % ALIGNMENT):
        raise ValueError(
            f"workspace must be contiguous from a multiple of {ALIGNMENT} bytes on, got strides "
            f"{list(given.stride())} from {given.storage_offset()} on"
        )
    return given
