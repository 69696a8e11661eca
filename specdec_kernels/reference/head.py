"""``verify_chain_lm_head`` by making the logits. Shapes and semantics: :mod:`specdec_kernels.ops.head`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF, Rule
from specdec_kernels.reference.verify import verify_chain


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
    logits = functional.linear(hidden.float(), weight.float())
    return verify_chain(
        logits, draft_tokens, draft_logits, draft_stats, draft_temperatures, draft_temperature, seed, position,
        num_draft, None, sampling, temperature, TOP_K_OFF, TOP_P_OFF, MIN_P_OFF, None, None, None, None, None,
        int(Rule.TOKEN), False, False,
    )  # fmt: skip
