"""What a call passes and what it leaves out: a kernel is compiled once for both. A pointer to what is missing is not
followed; one number of the launch says which those are."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

_NAMES = (
    "sampling", "bitmask", "draft_logits", "draft_stats", "draft_temperatures", "num_draft", "cu_rows", "logprobs",
    "count_independent", "replacement", "reduced",
)  # fmt: skip
_BITS = {name: 1 << index for index, name in enumerate(_NAMES)}
SAMPLING, BITMASK, DRAFT_LOGITS, DRAFT_STATS, DRAFT_TEMPERATURES, NUM_DRAFT, CU_ROWS, LOGPROBS, COUNT_INDEPENDENT, \
    REPLACEMENT, REDUCED = (tl.constexpr(bit) for bit in _BITS.values())  # fmt: skip


def flags_of(**named: object) -> int:
    """The number that says which of ``named`` a call passes or wants."""
    bits = 0
    for name, value in named.items():
        if value is not None and value is not False:
            bits |= _BITS[name]
    return bits


def instead(pointer: Tensor | None, other: Tensor) -> Tensor:
    """What is passed for a pointer, of the same type whether there is one or not."""
    return other if pointer is None else pointer


def processing_arguments(
    bitmask: Tensor | None, adjusted_ids: Tensor | None, id_counts: Tensor | None, id_bias: Tensor | None, penalties:
    Tensor | None, int32: Tensor, float32: Tensor,
) -> tuple[Tensor | int, ...]:  # fmt: skip
    """(mask, ids, counts, bias, penalties, adjustments a request); what is missing points to other tensors."""
    ids_or_other = instead(adjusted_ids, int32), instead(id_counts, int32)
    floats = instead(id_bias, float32), instead(penalties, float32)
    return instead(bitmask, int32), *ids_or_other, *floats, 0 if adjusted_ids is None else adjusted_ids.shape[1]
