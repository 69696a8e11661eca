"""Verification inside vLLM 0.33, Model Runner V2: a plugin of ``vllm.general_plugins`` that comes with this package.

vLLM prepares a float32 copy of all logits for its rejection sampler (temperature, filters, biases) and reads that. Here
:func:`specdec_kernels.verify_chain` reads the rows as the model wrote them, the parameters inside.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec_kernels.integrations.plugins import draft_rows, fits
from specdec_kernels.ops import LogitBias, RuleName, verify_chain

VERSIONS = ("0.33.0",)
"""The releases whose interface this was written against."""

#: vLLM's ``rejection_sample_method``, and the rule it is.
_RULES: dict[str, RuleName] = {"standard": "token", "block": "block"}

_logger = logging.getLogger(__name__)


def register() -> None:
    """Put the operators in the place of vLLM's rejection sampler: vLLM calls this in each of its processes.

    With a release that is not one of :data:`VERSIONS`, or where only the PyTorch reference runs, nothing is changed,
    and a warning says so.
    """
    _register()


@functools.cache  # vLLM may load plugins more than once in a process
def _register() -> None:
    if not fits("vllm", VERSIONS):
        return
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu import model_states

    model_states.resolve_model_state_cls = _with_sampler(model_states.resolve_model_state_cls)
    _admit(SamplingParams, InputProcessor)


def _refusal(config: Any) -> str | None:
    """Why vLLM's own rejection sampler stays with this ``VllmConfig``; None where it is replaced."""
    method = config.speculative_config.rejection_sample_method
    if method not in _RULES:
        return (
            f"rejection_sample_method must be one of {sorted(_RULES)} to keep the target's distribution, got {method!r}"
        )
    if config.watermark_config is not None:
        return "watermarks are drawn with vLLM's own noise"
    return None


def _with_sampler(resolve: Callable[[Any, Any], type]) -> Callable[[Any, Any], type]:
    """``resolve_model_state_cls``, whose classes name a rejection sampler of ours unless the model has its own."""

    @functools.wraps(resolve)
    def resolve_model_state_cls(config: Any, model: Any) -> type:
        theirs = resolve(config, model)

        def custom_sampler(self: Any, sampler: Any) -> tuple[Any, Any] | None:
            own: tuple[Any, Any] | None = theirs.custom_sampler(self, sampler)  # type: ignore[attr-defined]
            if own is not None or config.speculative_config is None:
                return own
            if reason := _refusal(config):
                _logger.warning("vLLM's own rejection sampler is used: %s", reason)
                return None
            return sampler, _rejection_sampler(sampler, config.speculative_config, self.device)

        return type(theirs.__name__, (theirs,), {"custom_sampler": custom_sampler, "__module__": theirs.__module__})

    return resolve_model_state_cls


def _rejection_sampler(sampler: Any, config: Any, device: torch.device) -> Any:
    """vLLM's ``RejectionSampler`` with :func:`verify` for its verification; log-probabilities and the rest are vLLM's.

    Args:
        sampler: vLLM's ``Sampler``.
        config: its ``SpeculativeConfig``; see ``_refusal``.
        device: where the logits are.
    """
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    made = RejectionSampler(sampler, config, device)
    made._verify = functools.partial(
        verify, sampler, _RULES[config.rejection_sample_method], config.num_speculative_tokens
    )
    return made


def verify(
    sampler: Any,
    rule: RuleName,
    num_drafts: int,
    logits: Tensor,
    draft_logits: Tensor | None,
    draft_sampled: Tensor,
    pos: Tensor,
    cu_num_logits: Tensor,
    idx_mapping: Tensor,
    idx_mapping_np: np.ndarray,
    expanded_idx_mapping: Tensor,
    expanded_local_pos: Tensor,
    seq_lens_upper_bound_np: np.ndarray,
    verify_draft_sampled: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``RejectionSampler._verify`` by :func:`specdec_kernels.verify_chain`, in its ragged form.

    A request's noise is a function of its seed and position alone, whether the operator reads the model's
    logits, with the parameters inside, or, where ``_needs_copy``, vLLM's float32 copy.

    Args:
        sampler: vLLM's ``Sampler``, which has the parameters of each request.
        rule: as of :func:`specdec_kernels.verify_chain`.
        num_drafts: K, the most drafts of a request.
        logits: [N, V], the rows of all B requests.
        draft_logits: [max_num_reqs, K, Vd], before temperature, or None where drafts are argmaxes or n-grams. Where
            Vd < V, what is outside has draft probability 0 and the target's mass there stays.
        draft_sampled: int32 [N], the token that was fed at each row.
        pos: int64 [N], its position in the request.
        cu_num_logits: int32 [B+1].
        idx_mapping, idx_mapping_np, expanded_idx_mapping: the slot of each request, and of each row.
        expanded_local_pos, seq_lens_upper_bound_np: as vLLM's processors want them.
        verify_draft_sampled: as ``draft_sampled``, -1 where a request's drafts end before.

    Returns:
        The rows that were verified [N, V]; sampled ids int64 [B, K+1], -1 behind the last; their number int32 [B].
    """
    states = sampler.sampling_states
    own = idx_mapping, idx_mapping_np
    temperature = states.temperature.gpu[idx_mapping]
    inside: dict[str, Any] = {"temperature": temperature}
    if _needs_copy(sampler, idx_mapping_np):
        logits = sampler.apply_sampling_params(
            logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, draft_sampled, expanded_local_pos,
            seq_lens_upper_bound_np,
        )  # fmt: skip
        inside = {"temperature": (temperature > 0).float()}
    else:
        inside |= {
            "top_k": _used(states.top_k, states.vocab_size, *own),
            "top_p": _used(states.top_p, 1.0, *own),
            "min_p": _used(states.min_p, 0.0, *own),
            "logit_bias": _logit_bias(sampler.logits_processors[0], *own),
        }
    if draft_logits is not None:
        inside |= {**draft_rows(_of_slots(draft_logits, *own), logits.shape[1]), "draft_temperature": temperature}
    first = cu_num_logits[:-1].long()
    slots = first[:, None] + torch.arange(1, num_drafts + 1, device=first.device)
    verified = verify_chain(
        logits,
        verify_draft_sampled[slots.clamp(max=len(verify_draft_sampled) - 1)],
        seed=states.seeds.gpu[idx_mapping],
        position=pos[first] + 1,
        cu_rows=cu_num_logits,
        rule=rule,
        **inside,
    )
    return logits, verified.tokens, verified.num_emitted


def _needs_copy(sampler: Any, requests: np.ndarray) -> bool:
    """Whether something is wanted of these requests that only vLLM's own kernels do, in a float32 copy of all rows.

    Penalties, bad words, allowed ids, least lengths, thinking budgets, processors of users; min-p with top-p, which
    vLLM applies in this order and the operators in the other; sampling masks; log-probabilities of processed logits.
    """
    states, (bias, penalties, bad_words, *others) = sampler.sampling_states, sampler.logits_processors
    budget, min_p = sampler.thinking_budget_state, states.min_p.np[requests] > 0
    return bool(
        others
        or sampler.return_sampling_mask
        or (sampler.logprobs_mode.startswith("processed") and states.max_num_logprobs(requests) >= 0)
        or penalties.use_penalty[requests].any()
        or bad_words.num_bad_words.np[requests].any()
        or bias.num_allowed_token_ids.np[requests].any()
        or bias.num_stop_token_ids.np[requests].any()
        or (budget.enabled and budget.use_thinking_budget[requests].any())
        or (min_p & (states.top_p.np[requests] < 1)).any()
    )


def _used(state: Any, off: float, slots: Tensor, slots_np: np.ndarray) -> Tensor | None:
    """A parameter of each request, None where no request has it on."""
    return state.gpu[slots] if (state.np[slots_np] != off).any() else None


def _logit_bias(state: Any, slots: Tensor, slots_np: np.ndarray) -> LogitBias | None:
    """The biases of vLLM's ``LogitBiasState``."""
    most = int(state.num_logit_bias.np[slots_np].max())
    if most == 0:
        return None
    # Behind a request's own are those of whoever had the slot before.
    none = torch.arange(most, device=slots.device) >= state.num_logit_bias.gpu[slots][:, None]
    ids, values = (table.gpu[slots, :most] for table in (state.logit_bias_token_ids, state.logit_bias))
    return LogitBias(ids, values.masked_fill(none, 0.0))


def _of_slots(rows: Tensor, slots: Tensor, slots_np: np.ndarray) -> Tensor:
    """The rows that the drafts of each request were drawn from; a view where the slots follow each other."""
    first = int(slots_np[0])
    together = bool((np.diff(slots_np) == 1).all())
    return rows[first : first + len(slots_np)] if together else rows[slots]


#: Whether the request that is being checked goes to Model Runner V2.
_for_runner_v2: ContextVar[bool] = ContextVar("_for_runner_v2", default=False)


def _admit(params: type, processor: type) -> None:
    """Let ``min_p`` and ``logit_bias`` through where they are honoured: vLLM refuses them with any speculation, since
    Model Runner V1 drops them. V2 applies both to every row, and so does :func:`verify`."""
    checked: Any = params
    refuse, validate = checked._validate_spec_decode, processor._validate_params  # type: ignore[attr-defined]

    @functools.wraps(refuse)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not _for_runner_v2.get():
            refuse(self, speculative_config)

    @functools.wraps(validate)
    def _validate_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _for_runner_v2.set(self.vllm_config.use_v2_model_runner)
        try:
            return validate(self, *args, **kwargs)
        finally:
            _for_runner_v2.reset(token)

    checked._validate_spec_decode = _validate_spec_decode
    processor._validate_params = _validate_params  # type: ignore[attr-defined]
