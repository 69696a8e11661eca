"""vLLM's own files, imported on a CPU with Triton's interpreter; and the same names of ours, to be had everywhere."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
import vllm_stand_in
from peers import LIBDEVICE, files, imported

GPU = "vllm.v1.worker.gpu"
OWN = {
    "vllm.envs", "vllm.utils.math_utils", "vllm.v1.sample.ops.topk_topp_sampler", "vllm.v1.spec_decode.fly",
    "vllm.v1.watermarking.prfs.philox",
    *(
        f"{GPU}.{name}"
        for name in (
            "buffer_utils", "input_batch", "model_states", "sample.bad_words", "sample.gumbel", "sample.logit_bias",
            "sample.logits_processor.interface", "sample.logprob", "sample.min_p", "sample.output", "sample.penalties",
            "sample.sampler", "sample.states", "sample.thinking_budget", "sample.trace_replay", "sample.watermark",
            "spec_decode.rejection_sampler", "spec_decode.rejection_sampler_utils", "states",
        )
    ),
}  # fmt: skip


class _Logger(logging.Logger):
    warning_once = info_once = logging.Logger.debug


def _no(*_: Any, **__: Any) -> bool:
    return False


def _stubs() -> dict[str, dict[str, Any]]:
    cpu = SimpleNamespace(device_type="cpu", is_cpu=lambda: True, is_cuda=_no, is_rocm=_no, is_xpu=_no)
    return {
        "vllm.config.model": {
            "PROCESSED_LOGPROBS_MODES": ("processed_logprobs", "processed_logits"),
            "LogprobsMode": str,
        },
        "vllm.logger": {"init_logger": _Logger},
        "vllm.platforms": {"current_platform": cpu},
        "vllm.sampling_params": {"MAX_LOGPROB_TOKEN_IDS": 128, "SamplingParams": vllm_stand_in.SamplingParams},
        "vllm.triton_utils": {"HAS_TRITON": False, "tl": tl, "tldevice": LIBDEVICE, "triton": triton},
        "vllm.utils.platform_utils": {"is_uva_available": _no},
        "vllm.utils.torch_utils": {
            "async_tensor_h2d": lambda data, dtype, device: torch.tensor(data, dtype=dtype, device=device)
        },
        "vllm.v1.engine.input_processor": {"InputProcessor": vllm_stand_in.InputProcessor},
    }


@contextlib.contextmanager
def vllm(source: str) -> Iterator[SimpleNamespace]:
    """What the tests use of vLLM, from its own files (``source="peer"``) or of ours (``"stand-in"``)."""
    peer = source == "peer"
    with imported(
        files("vllm") if peer else Path(), "vllm", OWN if peer else set(),
        _stubs() if peer else vllm_stand_in.MODULES,
    ):  # fmt: skip
        yield _names()


def _names() -> SimpleNamespace:
    def at(module: str) -> Any:
        return importlib.import_module(module)

    return SimpleNamespace(
        model_states=at(f"{GPU}.model_states"),
        rejection_sampler=at(f"{GPU}.spec_decode.rejection_sampler"),
        Sampler=at(f"{GPU}.sample.sampler").Sampler,
        RequestState=at(f"{GPU}.states").RequestState,
        SamplingParams=at("vllm.sampling_params").SamplingParams,
        InputProcessor=at("vllm.v1.engine.input_processor").InputProcessor,
    )
