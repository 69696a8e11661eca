"""vLLM's interface as its plugin meets it, written anew and in plain PyTorch: names, shapes and who calls whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Backed:
    """A parameter of each slot, on the host (``np``) and, once written, on the device (``gpu``)."""

    def __init__(self, slots: int, dtype: torch.dtype, value: float = 0) -> None:
        self.gpu = torch.full((slots,), value, dtype=dtype)
        self.np = self.gpu.numpy().copy()

    def write(self) -> None:
        self.gpu = torch.from_numpy(self.np.copy())


class Table:
    """Rows of each slot, on the device."""

    def __init__(self, slots: int, columns: int, dtype: torch.dtype) -> None:
        self.gpu = torch.zeros((slots, columns), dtype=dtype)


class SamplingParams(SimpleNamespace):
    def __init__(self, **given: Any) -> None:
        off = {
            "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None, "logprobs": None,
            "logit_bias": None, "min_tokens": 0, "allowed_token_ids": None, "all_stop_token_ids": set(),
            "bad_words_token_ids": None, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
            "thinking_token_budget": None, "logprob_token_ids": None,
        }  # fmt: skip
        super().__init__(**off | given)

    def _validate_spec_decode(self, speculative_config: object) -> None:
        if speculative_config is not None and (self.min_p or self.logit_bias):
            raise ValueError("min_p and logit_bias")


class InputProcessor:
    def __init__(self, speculative_config: object, use_v2_model_runner: bool) -> None:
        self.vllm_config = SimpleNamespace(use_v2_model_runner=use_v2_model_runner)
        self.speculative_config = speculative_config

    def _validate_params(self, params: SamplingParams, supported_tasks: tuple[str, ...]) -> None:
        params._validate_spec_decode(self.speculative_config)


class RequestState:
    def __init__(
        self, max_num_reqs: int, max_model_len: int, max_num_batched_tokens: int, num_speculative_steps: int,
        vocab_size: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.max_num_reqs, self.vocab_size, self.device = max_num_reqs, vocab_size, device
        self.all_token_ids = Table(max_num_reqs, max_model_len, torch.int32)
        self.prompt_len, self.prefill_len = (Backed(max_num_reqs, torch.int32) for _ in range(2))
        self._free = list(range(max_num_reqs))
        self.req_id_to_index: dict[str, int] = {}

    def add_request(
        self, req_id: str, prompt_len: int, all_token_ids: list[int], num_computed_tokens: int, max_tokens: int
    ) -> None:
        slot = self.req_id_to_index[req_id] = self._free.pop()
        self.prompt_len.np[slot], self.prefill_len.np[slot] = prompt_len, len(all_token_ids)
        self.all_token_ids.gpu[slot, : len(all_token_ids)] = torch.tensor(all_token_ids, dtype=torch.int32)

    def apply_staged_writes(self) -> None:
        self.prompt_len.write()
        self.prefill_len.write()


class SamplingStates:
    def __init__(self, slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.temperature, self.min_p = (Backed(slots, torch.float32) for _ in range(2))
        self.top_p = Backed(slots, torch.float32, 1)
        self.top_k = Backed(slots, torch.int32, vocab_size)
        self.seeds = Backed(slots, torch.int64)
        self.num_logprobs = np.full(slots, -1)

    def max_num_logprobs(self, slots: np.ndarray) -> int:
        return int(self.num_logprobs[slots].max())


class Sampler:
    """Parameters of the requests in their slots, and :meth:`apply_sampling_params`."""

    def __init__(
        self, vllm_config: object, max_num_reqs: int, vocab_size: int, device: torch.device, req_states: RequestState,
        logprobs_mode: str = "raw_logprobs", return_sampling_mask: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        slots = max_num_reqs
        self.req_states, self.logprobs_mode, self.return_sampling_mask = req_states, logprobs_mode, return_sampling_mask
        self.sampling_states = SamplingStates(slots, vocab_size)
        zeros = np.zeros(slots, dtype=bool)
        bias = SimpleNamespace(
            num_allowed_token_ids=Backed(slots, torch.int32),
            num_stop_token_ids=Backed(slots, torch.int32),
            num_logit_bias=Backed(slots, torch.int32),
            logit_bias_token_ids=Table(slots, 1024, torch.int32),
            logit_bias=Table(slots, 1024, torch.float32),
        )
        penalties = SimpleNamespace(use_penalty=zeros.copy(), presence_penalty=Backed(slots, torch.float32))
        bad_words = SimpleNamespace(num_bad_words=Backed(slots, torch.int32))
        self.logits_processors = [bias, penalties, bad_words]
        self.thinking_budget_state = SimpleNamespace(enabled=False)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        slot, params = req_idx, sampling_params
        states, (bias, penalties, _) = self.sampling_states, self.logits_processors
        states.temperature.np[slot], states.top_p.np[slot] = params.temperature, params.top_p
        states.min_p.np[slot], states.top_k.np[slot] = params.min_p, params.top_k or states.vocab_size
        states.seeds.np[slot] = np.random.randint(1 << 62) if params.seed is None else params.seed
        states.num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        biases = params.logit_bias or {}
        bias.num_logit_bias.np[slot] = len(biases)
        bias.logit_bias_token_ids.gpu[slot, : len(biases)] = torch.tensor(list(biases), dtype=torch.int32)
        bias.logit_bias.gpu[slot, : len(biases)] = torch.tensor(list(biases.values()))
        penalties.use_penalty[slot] = params.presence_penalty != 0
        penalties.presence_penalty.np[slot] = params.presence_penalty

    def apply_staged_writes(self) -> None:
        states, (bias, penalties, _) = self.sampling_states, self.logits_processors
        for written in (
            states.temperature, states.top_k, states.top_p, states.min_p, states.seeds, bias.num_logit_bias,
            penalties.presence_penalty,
        ):  # fmt: skip
            written.write()

    def apply_sampling_params(
        self, logits: Tensor, expanded_idx_mapping: Tensor, idx_mapping: Tensor, idx_mapping_np: np.ndarray,
        pos: Tensor, input_ids: Tensor, expanded_local_pos: Tensor, seq_lens_upper_bound_np: np.ndarray,
    ) -> Tensor:  # fmt: skip
        """A float32 copy: biases, presence of this step's drafts, temperature, min-p, top-k, top-p, in this order."""
        states, (bias, penalties, _) = self.sampling_states, self.logits_processors
        logits = logits.float().clone()
        for row, slot in enumerate(expanded_idx_mapping.tolist()):
            count = int(bias.num_logit_bias.gpu[slot])
            logits[row, bias.logit_bias_token_ids.gpu[slot, :count].long()] += bias.logit_bias.gpu[slot, :count]
            local = int(expanded_local_pos[row])
            drafts = input_ids[row - local + 1 : row + 1].unique().long()
            logits[row, drafts] -= penalties.presence_penalty.gpu[slot]
            if (temperature := float(states.temperature.gpu[slot])) > 0:
                logits[row] /= temperature
            probs = logits[row].softmax(0)
            logits[row, probs < states.min_p.gpu[slot] * probs.max()] = -torch.inf
            logits[row, logits[row] < logits[row].topk(int(states.top_k.gpu[slot])).values[-1]] = -torch.inf
            if (top_p := float(states.top_p.gpu[slot])) < 1:
                ordered, order = logits[row].softmax(0).sort(descending=True)
                logits[row, order[ordered.cumsum(0) - ordered >= top_p]] = -torch.inf
        return logits


class RejectionSampler:
    def __init__(self, sampler: Sampler, spec_config: Any, device: torch.device) -> None:
        self.sampler = sampler

    def _verify(self, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("the stand-in has no verification of its own")

    def __call__(
        self, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None, invalid_drafts: Tensor | None = None
    ) -> Any:
        batch = input_batch
        drafts, pos = batch.input_ids[batch.logits_indices], batch.positions[batch.logits_indices]
        judged = drafts if invalid_drafts is None else drafts.masked_fill(invalid_drafts, -1)
        _, sampled, num_sampled = self._verify(
            logits, draft_logits, drafts, pos, batch.cu_num_logits, batch.idx_mapping, batch.idx_mapping_np,
            batch.expanded_idx_mapping, batch.expanded_local_pos, batch.seq_lens_cpu_upper_bound.numpy(), judged,
        )  # fmt: skip
        return SimpleNamespace(sampled_token_ids=sampled, num_sampled=num_sampled)


def resolve_model_state_cls(vllm_config: object, model: Any) -> type:
    cls: type = model.get_model_state_cls()
    return cls


_GPU = "vllm.v1.worker.gpu"
MODULES: dict[str, dict[str, Any]] = {
    "vllm.sampling_params": {"SamplingParams": SamplingParams},
    "vllm.v1.engine.input_processor": {"InputProcessor": InputProcessor},
    f"{_GPU}.model_states": {"resolve_model_state_cls": resolve_model_state_cls},
    f"{_GPU}.sample.sampler": {"Sampler": Sampler},
    f"{_GPU}.spec_decode.rejection_sampler": {"RejectionSampler": RejectionSampler},
    f"{_GPU}.states": {"RequestState": RequestState},
}
