"""``verify_chain_lm_head``: logits are made where they are asked for, and never written. Semantics:
:mod:`specdec_kernels.ops.head`.

The first kernel multiplies hidden states and weights, and keeps of each tile of 128 logits its two entries in the
row's table. The second is ``verify_chain``'s own, which begins with judging rows whose tables are made; the few tiles
that it looks at, it multiplies again.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF, Rule
from specdec_kernels.triton_kernels.launch import entries
from specdec_kernels.triton_kernels.laws import sampling_of, table_scale
from specdec_kernels.triton_kernels.rows import DEPTH, TILE, tables_of, tile_sums
from specdec_kernels.triton_kernels.verify import verify_chain

#: Rows a program multiplies with one tile of the weights, at least and at most.
LEAST_ROWS, MOST_ROWS = 16, 128
#: Products that are asked for before the first is there, and one: what fits the shared memory of small GPUs too.
STAGES = tl.constexpr(3)


@triton.jit(do_not_specialize=["rows", "rows_a_request"])
def head_tables_kernel(
    hidden_ptr, weight_ptr, sampling_ptr, temperature, tables_ptr, hidden_request_stride, hidden_row_stride,
    weight_row_stride, rows, rows_a_request, vocab, width, ENTRIES: tl.constexpr, ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Programs of one tile of the weights follow each other, so that it is read from memory once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    b = (tl.where(there, row, 0) // rows_a_request).to(tl.int64)
    hidden = hidden_ptr + b * hidden_request_stride + (row % rows_a_request).to(tl.int64) * hidden_row_stride
    tile = tl.program_id(1).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    weights = weight_ptr + token * weight_row_stride
    logits = tl.zeros([ROWS, TILE], tl.float32)
    for first in tl.range(0, width, DEPTH, num_stages=STAGES):
        entry = first + tl.arange(0, DEPTH)
        inside = entry < width
        state = tl.load(hidden[:, None] + entry[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weights[:, None] + entry[None, :], mask=(token < vocab)[:, None] & inside[None, :], other=0.0)
        if UPCAST:  # the interpreter's dot is wrong in bfloat16
            state, weight = state.to(tl.float32), weight.to(tl.float32)
        logits = tl.dot(state, tl.trans(weight), logits, input_precision="ieee")
    scale, _top_k, _top_p, _min_p = sampling_of(sampling_ptr, temperature, 0, 1.0, 0.0, b)
    scales = table_scale(scale) + tl.zeros([ROWS], tl.float32)
    maxima, sums = tile_sums(tl.where((token < vocab)[None, :], logits, float("-inf")), scales[:, None])
    table = tables_of(tables_ptr, row.to(tl.int64), ENTRIES) + tile
    tl.store(table, maxima, mask=there)
    tl.store(table + ENTRIES, sums, mask=there)


def rows_and_warps(rows: int) -> tuple[int, int]:
    """Of a program, for so many rows of hidden states in all."""
    together = min(max(triton.next_power_of_2(rows), LEAST_ROWS), MOST_ROWS)
    return together, 8 if together == MOST_ROWS else 4


def verify_chain_lm_head(
    hidden: Tensor,
    weight: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    draft_temperatures: Tensor | None,
    draft_temperature: float,
    seed: Tensor,
    position: Tensor,
    num_draft: Tensor | None,
    sampling: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, rows, width), vocab = hidden.shape, weight.shape[0]
    places = entries(vocab)
    tables = hidden.new_empty((batch * rows, 4 * places), dtype=torch.float32)
    if batch:
        together, warps = rows_and_warps(batch * rows)
        head_tables_kernel[(triton.cdiv(batch * rows, together), triton.cdiv(vocab, TILE.value))](
            hidden, weight, sampling, temperature, tables, *hidden.stride()[:2], weight.stride(0), batch * rows, rows,
            vocab, width, ENTRIES=places, ROWS=together, UPCAST=hidden.device.type == "cpu", num_warps=warps,
        )  # fmt: skip
    return verify_chain(
        hidden, draft_tokens, draft_logits, draft_stats, draft_temperatures, draft_temperature, seed, position,
        num_draft, None, sampling, temperature, TOP_K_OFF, TOP_P_OFF, MIN_P_OFF, None, None, None, None, None,
        int(Rule.TOKEN), False, False,
        weight=weight, tables=tables,
    )  # fmt: skip
