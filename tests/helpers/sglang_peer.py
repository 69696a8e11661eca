"""SGLang's own files, imported on a CPU with Triton's interpreter; and a stand-in with its interface, written anew."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from peers import LIBDEVICE, files, imported
from torch import Tensor

BLOCKWISE = "sglang.kernels.ops.speculative.dspark.blockwise_rejection"
CHAINS = "sglang.kernels.ops.speculative.reject_sampling"
EAGLE = "sglang.srt.speculative.eagle_utils"
HOOKS = "sglang.srt.plugins.hook_registry"
SPEC_UTILS = "sglang.srt.speculative.spec_utils"
OWN = {BLOCKWISE, CHAINS, EAGLE, HOOKS, "sglang.kernels.ops.speculative.dspark.dispatch"}


class Group:
    """Ranks that share a model; records what is sent."""

    world_size = 1

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self.sent.append(tensor)


class _Struct:
    """A record with the fields that its annotations name."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Takes options such as ``frozen=True``."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class HookType(Enum):
    REPLACE, AROUND = "replace", "around"


class HookRegistry:
    hooks: ClassVar[dict[str, tuple[Any, HookType]]] = {}

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType) -> None:
        cls.hooks[target] = hook, hook_type

    @classmethod
    def apply_hooks(cls) -> None:
        for target, (hook, kind) in cls.hooks.items():
            module, _, name = target.rpartition(".")
            own = importlib.import_module(module)
            replaced = hook if kind is HookType.REPLACE else _around(hook, getattr(own, name))
            setattr(own, name, replaced)

    @classmethod
    def reset(cls) -> None:
        cls.hooks.clear()


def _around(hook: Any, original: Any) -> Any:
    return lambda *args, **kwargs: hook(original, *args, **kwargs)


def eagle_sample(
    verify_input: Any, batch: Any, logits_output: Any, grammar_mask: Any = None, uno_target_max_top_k: Any = None,
    *, watermark_state: Any = None, watermark_full_mask: bool = True,
) -> str:  # fmt: skip
    return "SGLang's own"


def blockwise_rejection_triton(**_: Any) -> str:
    return "SGLang's own"


def filtered(kind: str) -> Any:
    """``top_k_renorm_prob`` and ``top_p_renorm_prob``: what stays of each row, normalised."""

    def renorm(probs: Tensor, limits: Tensor) -> Tensor:
        ordered, order = probs.sort(-1, descending=True)
        rank = torch.arange(probs.shape[1])
        stays = rank < limits[:, None] if kind == "top_k" else ordered.cumsum(-1) - ordered < limits[:, None]
        probs = torch.zeros_like(probs).scatter(1, order, ordered * stays)
        return probs / probs.sum(-1, keepdim=True)

    return renorm


def _softmax(logits: Tensor, temperatures: Tensor) -> Tensor:
    return (logits / temperatures).softmax(-1)


def _scale(logits: Tensor, penalties: Tensor) -> None:
    logits.copy_(torch.where(logits > 0, logits / penalties, logits * penalties))


def _greedy(*, is_all_greedy: bool, **_: Any) -> bool:
    return is_all_greedy


def _no(*_: Any, **__: Any) -> bool:
    return False


def _stubs(spec: Any, group: Any) -> dict[str, dict[str, Any]]:
    return {
        BLOCKWISE: {"blockwise_rejection_triton": blockwise_rejection_triton},
        EAGLE: {
            "eagle_sample": eagle_sample, "_is_cpu": False, "_is_hip": False, "_is_xpu": False,
            "_verify_uses_greedy": _greedy, "_can_use_sparse_uno_tree_target_sampling": lambda limit, info: bool(limit),
        },
        HOOKS: {"HookRegistry": HookRegistry, "HookType": HookType},
        "msgspec": {"Struct": _Struct},
        "sglang.kernels.ops.sampling": {"softmax": _softmax},
        "sglang.kernels.ops.sampling.renorm": {
            "top_k_renorm_prob": filtered("top_k"), "top_p_renorm_prob": filtered("top_p")
        },
        "sglang.kernels.ops.speculative.spec_tree": {"TreeMaskMode": SimpleNamespace(FULL_MASK=0, QLEN_ONLY=1)},
        "sglang.srt.layers.dp_attention": {"is_dp_attention_enabled": _no},
        "sglang.srt.runtime_context": {
            "get_spec": lambda: spec, "get_parallel": lambda: SimpleNamespace(tp_group=group, attn_tp_group=None)
        },
        "sglang.srt.sampling.penaltylib.repetition_penalty": {"apply_scaling_penalties": _scale},
        SPEC_UTILS: {
            "SIMULATE_ACC_LEN": -1, "SIMULATE_ACC_TOKEN_MODE": "fixed", "generate_simulated_accept_index": None
        },
        "sglang.srt.utils": dict.fromkeys(("is_cpu", "is_cuda", "is_hip", "is_xpu"), _no),
        "sglang.srt.utils.async_probe": {
            name: lambda logits, msg: None for name in ("maybe_detect_nan", "maybe_detect_oob", "sanitize_nan_logits")
        },
    }  # fmt: skip


@contextlib.contextmanager
def sglang(source: str) -> Iterator[SimpleNamespace]:
    """What the tests use of SGLang, from its own files (``source="peer"``) or of ours (``"stand-in"``)."""
    peer = source == "peer"
    spec, group = SimpleNamespace(), Group()
    with imported(files("sglang") if peer else Path(), "sglang", OWN if peer else set(), _stubs(spec, group)):
        eagle, blockwise = importlib.import_module(EAGLE), importlib.import_module(BLOCKWISE)
        if peer:
            eagle.chain_speculative_sampling_triton = importlib.import_module(CHAINS).chain_speculative_sampling_triton
            blockwise.libdevice = LIBDEVICE
        yield SimpleNamespace(
            source=source, spec=spec, group=group, eagle=eagle, blockwise=blockwise,
            hooks=importlib.import_module(HOOKS), spec_utils=importlib.import_module(SPEC_UTILS),
        )  # fmt: skip
