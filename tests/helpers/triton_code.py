"""What the machine code of the Triton kernels costs, read from it without a GPU.

    python tests/helpers/triton_code.py sm_90  # a line of JSON a kernel

What the launchers launch is compiled for GPUs that are not here: tensors are on "meta", a stand-in driver answers for
the GPU, and every launch only compiles, so signatures are those of real calls, and what is compiled lies in Triton's
cache for them. It must run without ``TRITON_INTERPRET``, in a process of its own: the stand-in stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import budget
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from specdec_kernels import triton_kernels as kernels
from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF, Children, MaskFormat, Rule, TreeRule
from specdec_kernels.triton_kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BATCH, DRAFTS, NODES, VOCAB, REDUCED = 3, 4, 64, 128_256, 32_000
#: What is known of the draft: how many logits a row, or None, and whether ``sample`` handed its scalars over.
POINT_MASS, DENSE, STATISTICS, OF_REDUCED = (None, False), (VOCAB, False), (VOCAB, True), (REDUCED, False)
Draft = tuple[int | None, bool]
BF16, FP16, FP32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64


@dataclass(frozen=True)
class Usage:
    """What a kernel of a call takes on one target. ``spills``: instructions of loops on local memory (a frame that none
    touches costs nothing), on AMD's GPUs registers, wherever; ``widest_load_bits`` is None where no tool here can tell.
    Calls with the same ``variant`` share a kernel."""

    call: str
    kernel: str
    target: str
    variant: str
    registers: int
    spills: int
    instructions: int
    widest_load_bits: int | None


def _tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sampling(full: bool, requests: int, rows: int) -> tuple[Any, ...]:
    """Sampling parameters and processing of logits as launchers take them: a temperature, or everything."""
    plain = None, 0.7, TOP_K_OFF, TOP_P_OFF, MIN_P_OFF
    if not full:
        return *plain, None, None, None, None, None
    adjusted = _tensor(I32, requests, 20), _tensor(I32, requests, 20, 2), _tensor(FP32, requests, 20)
    bitmask = _tensor(I32, rows, VOCAB // 32)
    return _tensor(FP32, requests, 4), *plain[1:], bitmask, *adjusted, _tensor(FP32, requests, 3)


def _drafts(known: Draft, dtype: torch.dtype, batch: int, drafts: int) -> tuple[Any, ...]:
    """Logits, scalars, the table of a reduced vocabulary and temperatures of drafts."""
    size, stats = known
    logits = None if size is None else _tensor(dtype, batch, drafts, size)
    scalars = _tensor(FP32, batch, drafts, 3) if stats else None
    return logits, scalars, _tensor(I32, VOCAB) if size not in (None, VOCAB) else None, None, 1.0


def _keys(requests: int) -> tuple[Tensor, Tensor]:
    return _tensor(I64, requests), _tensor(I64, requests)


def _rows(dtype: torch.dtype, size: int) -> tuple[Any, ...]:
    """Logits, the table of a reduced vocabulary, keys and rows of a step."""
    table = None if size == VOCAB else _tensor(I32, VOCAB)
    return _tensor(dtype, BATCH, size), table, *_keys(BATCH), _tensor(I64, BATCH)


def _sample(dtype: torch.dtype, full: bool, size: int = VOCAB) -> None:
    kernels.sample(*_rows(dtype, size), *_sampling(full, BATCH, BATCH), full)


def _sample_children(method: Children, size: int = VOCAB) -> None:
    kernels.sample_children(*_rows(BF16, size), *_sampling(True, BATCH, BATCH), DRAFTS, int(method))


def _verify_chain(dtype: torch.dtype, rule: Rule, known: Draft, full: bool) -> None:
    """``full``: ragged, with everything that can be given and asked for."""
    rows = BATCH * (DRAFTS + 1)
    target = _tensor(dtype, rows, VOCAB) if full else _tensor(dtype, BATCH, DRAFTS + 1, VOCAB)
    ragged = (_tensor(I32, BATCH), _tensor(I64, BATCH + 1)) if full else (None, None)
    kernels.verify_chain(
        target, _tensor(I64, BATCH, DRAFTS), *_drafts(known, dtype, BATCH, DRAFTS), *_keys(BATCH), *ragged,
        *_sampling(full, BATCH, rows), int(rule), full, full and rule != Rule.BLOCK, None,
    )  # fmt: skip


def _verify_tree(rule: TreeRule, known: Draft, full: bool) -> None:
    tree = _tensor(I64, BATCH, NODES), _tensor(I64, BATCH, NODES)
    kernels.verify_tree(
        _tensor(BF16, BATCH, NODES, VOCAB), *tree, *_drafts(known, BF16, BATCH, NODES), *_keys(BATCH),
        *_sampling(full, BATCH, BATCH * NODES), int(rule), False, full,
    )  # fmt: skip


def _noise_words() -> None:
    kernels.noise_words(*_keys(BATCH), 1, 0, 128)


def _tree_mask(form: MaskFormat, element: torch.dtype) -> None:
    packed = form == MaskFormat.PACKED
    size = BATCH * NODES * (2 if packed else 100)
    kernels.tree_mask(_tensor(element, size), _tensor(I64, BATCH, NODES), None if packed else _tensor(I64, BATCH), form)


def _tree_attention() -> None:
    query, cache = _tensor(BF16, BATCH, 32, NODES, 128), _tensor(BF16, BATCH, 8, 2048, 128)
    kernels.tree_attention(query, cache, cache, _tensor(I32, BATCH, NODES, 2), _tensor(I64, BATCH), 0.1)


def _compact_kv() -> None:
    pages = [_tensor(BF16, 99, 16, 8, 128)] * 64
    kernels.compact_kv(pages, _tensor(I64, BATCH, NODES), _tensor(I64, BATCH), _tensor(I64, BATCH, 33))


#: The largest kernels, which show what a compiler or a GPU cannot do.
LARGEST: dict[str, Callable[[], None]] = {
    "noise_words": _noise_words,
    "tree_mask packed": partial(_tree_mask, MaskFormat.PACKED, I32),
    "tree_mask dense": partial(_tree_mask, MaskFormat.DENSE, FP32),
    "tree_mask flat_bits": partial(_tree_mask, MaskFormat.FLAT_BITS, torch.uint8),
    "tree_attention": _tree_attention,
    "compact_kv paged": _compact_kv,
    "sample bf16": partial(_sample, BF16, False),
    "sample bf16 full": partial(_sample, BF16, True),
    "sample_children without_replacement full": partial(_sample_children, Children.WITHOUT_REPLACEMENT),
    "sample_children race full": partial(_sample_children, Children.RACE),
    "verify_chain token bf16 statistics": partial(_verify_chain, BF16, Rule.TOKEN, STATISTICS, False),
    "verify_chain token bf16 statistics full": partial(_verify_chain, BF16, Rule.TOKEN, STATISTICS, True),
    "verify_chain block bf16 statistics full": partial(_verify_chain, BF16, Rule.BLOCK, STATISTICS, True),
    "verify_chain coupled bf16 full": partial(_verify_chain, BF16, Rule.COUPLED, POINT_MASS, True),
    "verify_tree walk full": partial(_verify_tree, TreeRule.WALK, POINT_MASS, True),
    "verify_tree coupled full": partial(_verify_tree, TreeRule.COUPLED, POINT_MASS, True),
    "verify_tree recursive dense": partial(_verify_tree, TreeRule.RECURSIVE, DENSE, False),
    "verify_tree traversal statistics full": partial(_verify_tree, TreeRule.TRAVERSAL, STATISTICS, True),
}
#: With the other dtypes of logits, and the other kinds of drafts.
CALLS: dict[str, Callable[[], None]] = LARGEST | {
    "sample bf16 reduced": partial(_sample, BF16, False, REDUCED),
    "sample_children race full reduced": partial(_sample_children, Children.RACE, REDUCED),
    "sample fp32": partial(_sample, FP32, False),
    "sample fp16": partial(_sample, FP16, False),
    "verify_chain token fp32 statistics": partial(_verify_chain, FP32, Rule.TOKEN, STATISTICS, False),
    "verify_chain token fp16 statistics": partial(_verify_chain, FP16, Rule.TOKEN, STATISTICS, False),
    "verify_chain token bf16 point mass": partial(_verify_chain, BF16, Rule.TOKEN, POINT_MASS, False),
    "verify_chain token bf16 dense": partial(_verify_chain, BF16, Rule.TOKEN, DENSE, False),
    "verify_chain token bf16 reduced": partial(_verify_chain, BF16, Rule.TOKEN, OF_REDUCED, False),
    "verify_chain block bf16 statistics": partial(_verify_chain, BF16, Rule.BLOCK, STATISTICS, False),
    "verify_chain block bf16 dense": partial(_verify_chain, BF16, Rule.BLOCK, DENSE, False),
    "verify_chain coupled bf16": partial(_verify_chain, BF16, Rule.COUPLED, POINT_MASS, False),
    "verify_tree recursive reduced": partial(_verify_tree, TreeRule.RECURSIVE, OF_REDUCED, False),
    "verify_tree walk": partial(_verify_tree, TreeRule.WALK, POINT_MASS, False),
}


class _Absent:
    """The driver of a GPU that is not here. Each target is a device of its own, since compiled kernels are kept by
    device."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]


_run = JITFunction.run


def compiled_by(call: Callable[[], None], target: str) -> list[Any]:
    """The kernels that ``call`` launches, compiled for ``target`` and not launched."""
    found = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        found.append(_run(self, *args, grid=grid, warmup=True, **named))
        return found[-1]

    driver.set_active(_Absent(target))
    launch.PLATFORM = TARGETS[target].backend
    JITFunction.run = compile_only
    call()
    return found


def usage(call: str, target: str) -> list[Usage]:
    """Compile, and look at the machine code."""
    return [_usage(call, target, kernel) for kernel in compiled_by(CALLS[call], target)]


def _usage(call: str, target: str, compiled: Any) -> Usage:
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.findall(rf"\.vgpr_{x}count:\s+(\d+)", text)[0]) for x in ("", "spill_"))
        count = len(re.findall(r"^\t[a-z]", text, re.M))
        return Usage(call, compiled.name, target, compiled.hash, registers, spilled, count, None)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = budget.machine_code(cubin)
    loads = re.findall(r"ld\.global(?:\.\w+)*\.v(\d)\.b(\d+)", compiled.asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x(\w+)", compiled.asm["ptx"])
    widths = [int(count) * int(bits) for count, bits in loads] + [8 * int(size, 16) for size in copies]
    spills, count = len(kernel.spilled_in_loops), len(kernel.code)
    return Usage(call, compiled.name, target, compiled.hash, kernel.registers, spills, count, max(widths, default=None))


def usages(calls: Iterable[str], targets: Iterable[str], processes: int) -> Iterator[Usage]:
    """The same of several, side by side; what they compiled lies in Triton's cache."""
    pairs = itertools.product(calls, targets)
    if processes == 1:
        yield from itertools.chain.from_iterable(itertools.starmap(usage, pairs))
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from itertools.chain.from_iterable(pool.map(usage, *zip(*pairs, strict=True)))


def main() -> None:
    """Print a line of JSON a kernel and target."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--largest", action="store_true", help="not the other dtypes and kinds of drafts")
    parser.add_argument("--calls", nargs="+", choices=CALLS, metavar="CALL", help="these alone")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="only the names of the calls")
    chosen = parser.parse_args()
    calls = chosen.calls or (LARGEST if chosen.largest else CALLS)
    if chosen.list:
        print(*map(json.dumps, calls), sep="\n")
        return
    for each in usages(calls, chosen.targets, chosen.processes):
        print(json.dumps(asdict(each)), flush=True)


if __name__ == "__main__":
    main()
