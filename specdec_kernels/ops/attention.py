"""Attention of a tree's nodes over the text and over their own ancestors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import BackendName, function


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Scaled-dot-product attention of N tree nodes over a context of L tokens and over their ancestors and themselves.

    No mask is written: the ancestors' bits are applied to the scores as they are made. Triton splits the context over
    as many programs as it takes to fill the GPU, so the last bits depend on the batch and the device; there is no C++
    backend, on a CPU the reference hands the work to PyTorch's own attention.

    Args:
        query: float32, bfloat16 or float16 [B, Hq, N, D].
        key, value: [B, Hk, S, D], a cache: tokens 0 to L - 1 of request b are its context, L to L + N - 1 the tree's
            own, in the order of its nodes; what is behind is not read. Hk divides Hq: query head h reads head ``h * Hk
            // Hq``.
        packed: int32 [B, N, ceil(N/32)], as ``tree_mask(parents, "packed")`` gives it; the same for all layers.
        context_lens: int64 or int32 [B]: L of each request. Checked on the CPU; elsewhere lengths beyond S - N give
            rows of no meaning.
        scale: what scores are multiplied by; None is ``D ** -0.5``.
        backend: ``None`` follows the device; a name forces that backend.

    Returns:
        [B, Hq, N, D], of the query's dtype. Rows behind the last node of a request attend to the context and
        themselves.

    Equivalent to::

        mask = tree_mask(parents, "dense", context_lens=context_lens)
        scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], enable_gqa=True)

    Example:
        >>> from specdec_kernels import tree_mask
        >>> packed = tree_mask(torch.tensor([[-1, 0, 0]]), "packed")
        >>> x = torch.zeros(1, 2, 3, 4)
        >>> tree_attention(x, x[:, :1], x[:, :1] + 1, packed, torch.tensor([0])).unique().tolist()
        [1.0]

    Source: tree attention, Miao et al., arXiv:2305.09781; splitting over keys, Dao et al., Flash-Decoding, 2023.
    """
    check = validate.ArgumentChecker("query", query)
    q = check.tensor("query", query, validate.LOGIT_DTYPES, "B, Hq, N, D")
    k = check.tensor("key", key, (q.dtype,), "B, Hk, S, D")
    v = check.tensor("value", value, (q.dtype,), "B, Hk, S, D")
    heads, nodes, width = q.shape[1:]
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"key must have a number of heads that divides the query's {heads}, got {k.shape[1]}")
    check.sizes["ceil(N/32)"] = -(-nodes // 32)
    words = check.tensor("packed", packed, (torch.int32,), "B, N, ceil(N/32)").contiguous()
    lens, most = check.ids("context_lens", context_lens, "B").long(), k.shape[2] - nodes
    validate.within("context_lens", lens, 0, most, f"in [0, S - N] = [0, {most}]")
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be None or finite, got {scale!r}")
    attend = function("tree_attention", backend, q.device)
    out: Tensor = attend(q, k, v, words, lens, max(width, 1) ** -0.5 if scale is None else float(scale))
    return out
