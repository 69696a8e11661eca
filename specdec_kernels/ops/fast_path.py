"""Calls of operators that check their arguments once, in C++, and not in Python.

The C++ (csrc/native/fast_path.cpp) refuses what it could not read as it is, so the functions that draw and verify may
pass it their arguments at once. Where it returns None, Python checks: it says what is wrong, or brings it into shape
and goes through PyTorch's dispatcher, which takes as long to start as a row to read.

Triton's launchers are in Python; there the C++ checks, and makes the results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler

from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF
from specdec_kernels.ops.backends import BACKENDS, Backend
from specdec_kernels.ops.processing import NO_ADJUSTMENTS
from specdec_kernels.ops.results import DrawnChildren, Sample, Verified, VerifiedTree
from specdec_kernels.ops.validate import one_or_each


class FastPath(NamedTuple):
    """The functions with their public arguments, where there are neither penalties nor bias. None where an argument is
    not one that the operators accept as it is."""

    verify_chain: Callable[..., Verified | None]
    """(target_logits, draft_tokens, draft_logits, draft_stats, target_to_draft, draft_temperature, seed, position,
    num_draft, cu_rows, temperature, top_k, top_p, min_p, bitmask, number of the rule, logprobs, count_independent,
    workspace)."""
    verify_tree: Callable[..., VerifiedTree | None]
    """(target_logits, draft_tokens, parents, draft_logits, draft_stats, target_to_draft, draft_temperature, seed,
    position, temperature, top_k, top_p, min_p, bitmask, number of the rule, siblings with replacement, logprobs)."""
    sample: Callable[..., Sample | None]
    """(logits, target_to_draft, seed, position, row, temperature, top_k, top_p, min_p, bitmask, coupled)."""
    sample_children: Callable[..., DrawnChildren | None]
    """(logits, target_to_draft, seed, position, row, temperature, top_k, top_p, min_p, bitmask, count, number of the
    method)."""


def connect(entries: int, device: str, results_by_torch: bool) -> FastPath:
    """The functions of a library by the address of its entries; 0: they check, and return results yet to be written."""
    from specdec_kernels import _native

    functions = _native.connect(
        tensor=Tensor,
        exchange=Tensor.__dlpack_c_exchange_api__,
        entries=entries,
        on_cuda=device == "cuda",
        off=(1.0, TOP_K_OFF, TOP_P_OFF, MIN_P_OFF),
        results=(Verified, VerifiedTree, Sample, DrawnChildren),
        empty_strided=torch.empty_strided if results_by_torch else None,
        dtypes=(torch.int64, torch.int32, torch.bool, torch.float32),
    )
    return FastPath(*functions)


def _of_library(backend: Backend) -> FastPath | None:
    """What a backend in C++ offers, where its library, this Python and this PyTorch have what it takes."""
    try:
        entries = ctypes.CDLL(str(backend.library)).specdec_entries
        entries.restype = ctypes.c_void_p
        return connect(entries(), backend.device, backend.name == "cuda")
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError):
        return None  # another Python, an older PyTorch, or a library for tests


def _of_launchers(backend: Backend) -> FastPath | None:
    """The same of launchers in Python, which have the arguments of the operators."""
    try:
        checked = connect(0, backend.device, True)
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return None
    launch = backend.functions

    def verify_chain(
        target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, draft_stats: Tensor | None,
        target_to_draft: Tensor | None, heat: Any, seed: Tensor, position: Tensor, num_draft: Tensor | None,
        cu_rows: Tensor | None, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
        bitmask: Tensor | None, rule: int, logprobs: bool, independent: bool, workspace: Tensor | None,
    ) -> Verified | None:  # fmt: skip
        out = checked.verify_chain(
            target_logits, draft_tokens, draft_logits, draft_stats, target_to_draft, heat, seed, position, num_draft,
            cu_rows, temperature, top_k, top_p, min_p, bitmask, rule, logprobs, independent, workspace,
        )  # fmt: skip
        if out is not None:
            launch["verify_chain"](
                target_logits, draft_tokens, draft_logits, draft_stats, target_to_draft, *one_or_each(heat, 1.0), seed,
                position, num_draft, cu_rows, None, temperature, *_filters(top_k, top_p, min_p), bitmask,
                *NO_ADJUSTMENTS, rule, logprobs, independent, workspace, out=out,
            )  # fmt: skip
        return out

    def verify_tree(*arguments: Any) -> VerifiedTree | None:
        out = checked.verify_tree(*arguments)
        if out is not None:
            *tree, heat, seed, position, temperature, top_k, top_p, min_p, bitmask, rule, iid, logprobs = arguments
            launch["verify_tree"](
                *tree, *one_or_each(heat, 1.0), seed, position, None, temperature, *_filters(top_k, top_p, min_p),
                bitmask, *NO_ADJUSTMENTS, rule, iid, logprobs, out=out,
            )  # fmt: skip
        return out

    def drawn(op: str, results: Callable[..., Any]) -> Callable[..., Any]:
        def draw(*arguments: Any) -> Any:
            out = results(*arguments)
            if out is not None:
                logits, table, seed, position, row, temperature, top_k, top_p, min_p, bitmask, *rest = arguments
                launch[op](
                    logits, table, seed, position, row, None, temperature, *_filters(top_k, top_p, min_p), bitmask,
                    *NO_ADJUSTMENTS, *rest, out=out,
                )  # fmt: skip
            return out

        return draw

    sample, children = drawn("sample", checked.sample), drawn("sample_children", checked.sample_children)
    return FastPath(verify_chain, verify_tree, sample, children)


def _filters(top_k: int | None, top_p: float | None, min_p: float | None) -> tuple[int, float, float]:
    return (
        TOP_K_OFF if top_k is None else top_k,
        TOP_P_OFF if top_p is None else top_p,
        MIN_P_OFF if min_p is None else min_p,
    )


_PATHS: dict[str, dict[str | None, FastPath | None]] = {"cpu": {}, "cuda": {}}
for _name, _path in (("cuda", _of_library), ("triton", _of_launchers), ("cpu", _of_library)):
    _backend = BACKENDS[_name]
    if not _backend.reason:
        _PATHS[_backend.device][_name] = _path(_backend)
# Whom the dispatcher would choose.
_PATHS["cpu"][None] = _PATHS["cpu"].get("cpu")
_PATHS["cuda"][None] = next(iter(_PATHS["cuda"].values()), None)

# Names of this module: each dot is another dictionary. It is not `is_compiling`, which asks the scripts of TorchScript
# first; tracers other than Dynamo pass tensors of their own, or watch what is dispatched.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_on_cpu, _on_cuda = _PATHS["cpu"], _PATHS["cuda"]


def find_fast_path(backend: str | None, logits: object) -> FastPath | None:
    """What may be called at once for such logits, if anything: not where somebody watches what is dispatched."""
    if type(logits) is not Tensor or _is_compiling() or _dispatch_modes() or profiler._is_profiler_enabled:
        return None
    if logits.is_cpu:
        return _on_cpu.get(backend)
    return _on_cuda.get(backend) if logits.is_cuda else None
