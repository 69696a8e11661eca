"""Verification from hidden states: the LM head inside the operation."""

from __future__ import annotations

from torch import Tensor

from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import BackendName, function
from specdec_kernels.ops.results import Verified


def verify_chain_lm_head(
    hidden: Tensor,
    weight: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None = None,
    draft_stats: Tensor | None = None,
    *,
    seed: Tensor | int,
    position: Tensor | int,
    draft_temperature: Tensor | float | None = None,
    num_draft: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    backend: BackendName | None = None,
) -> Verified:
    """:func:`verify_chain` with rule ``"token"`` from the target's last hidden states: its logits are never written.

    A first kernel multiplies hidden states and weights and keeps two numbers of every 128 logits; the second decides,
    and makes anew the few logits that it looks at: those of the drafts, and about 128 for the draw at the end. That
    saves writing and reading back ``[B, K+1, V]``. Logits are float32 here, so tokens are those of logits that were
    never rounded to bfloat16. Filters, penalties and masks ask for whole rows: there ``verify_chain`` is the function.
    Triton; on a CPU the reference makes the logits.

    Args:
        hidden: float32, bfloat16 or float16 [B, K+1, H], what the LM head is applied to; any row stride.
        weight: of the same dtype [V, H], the LM head's; any row stride.
        draft_tokens, draft_logits, draft_stats, draft_temperature, seed, position, num_draft: as in
            :func:`verify_chain`.
        temperature: float32 [B] or float, at least 0; 0 is greedy.
        backend: ``None`` follows the device; a name forces that backend.

    Returns:
        :class:`Verified`, without log-probabilities. Triton cannot tell ties from rounding where the largest logit of a
        row is 2^20 temperatures or more (greedy aside): there the row counts as not usable, and ``valid`` is False.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the backend that was asked for cannot run, with the reason.

    Equivalent to::

        verify_chain(torch.nn.functional.linear(hidden.float(), weight.float()), draft_tokens, ...)

    Example:
        >>> import torch
        >>> hidden = torch.eye(4)[[1, 2, 3]][None] * 50
        >>> verify_chain_lm_head(hidden, torch.eye(4), torch.tensor([[1, 0]]), seed=1, position=7).tokens.tolist()
        [[1, 2, -1]]

    Source: Leviathan et al., arXiv:2211.17192, algorithm 1; a softmax's statistics from tiles of the product, as in
    Wijmans et al., Cut Your Losses, arXiv:2411.09009.
    """
    tokens = validate.draft_tokens(draft_tokens)
    batch, longest = tokens.shape
    states = validate.rows("hidden", hidden, validate.LOGIT_DTYPES, "B, K+1, H", (batch, longest + 1, None))
    head = validate.rows("weight", weight, (states.dtype,), "V, H", (None, states.shape[-1]))
    validate.some_tokens("weight", head, head.shape[0])
    device = states.device
    heat_of_drafts = validate.draft_temperature(draft_temperature, draft_logits, draft_stats)
    drafts = validate.drafts(
        tokens, head.shape[0], device, draft_logits, draft_stats, heat_of_drafts, seed, position, num_draft
    )
    sampling, heat, *_ = validate.sampling(batch, "B", device, temperature, None, None, None)
    validate.same_device(
        "hidden",
        states,
        weight=head,
        draft_tokens=tokens,
        draft_logits=drafts.logits,
        draft_stats=drafts.stats,
        draft_temperature=drafts.temperatures,
        seed=drafts.seed,
        position=drafts.position,
        num_draft=drafts.num_draft,
        sampling=sampling,
    )
    return Verified(*function("verify_chain_lm_head", backend, device)(states, head, tokens, *drafts, sampling, heat))
