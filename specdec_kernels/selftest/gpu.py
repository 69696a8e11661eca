"""What only a GPU can show: no wait for the host, graphs replayed with other inputs, the launches of a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from specdec_kernels.ops import BackendName, RuleName, sample, verify_chain
from specdec_kernels.ops.tree_rules import ChildrenName, TreeRuleName, sample_children, verify_tree
from specdec_kernels.selftest.common import BATCH, EVERYTHING, Report, Selection
from specdec_kernels.workspace import verify_chain_workspace

#: As large as in use, with a last tile that is not full.
VOCAB, DRAFTS = 32_003, 3


def calls(backend: BackendName | None, seed: Tensor) -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
    """Every operation that draws, by name, on a GPU; ``seed [BATCH]`` is read anew by each call."""
    generator, device = torch.Generator().manual_seed(0), seed.device
    target = torch.randn(BATCH, DRAFTS + 1, VOCAB, generator=generator).to(device, torch.bfloat16)
    draft = (target[:, :DRAFTS].float() + torch.randn(BATCH, DRAFTS, VOCAB, generator=generator).to(device)).bfloat16()
    keys: dict[str, Any] = {"seed": seed, "position": torch.arange(BATCH, device=device) + 100, "backend": backend}
    drawn = [sample(draft[:, i], **keys, row=i) for i in range(DRAFTS)]
    tokens, stats = (torch.stack([getattr(d, name) for d in drawn], 1) for name in ("tokens", "stats"))
    nodes = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
    parents = torch.tensor([[-1, 0, 0, 1]] * BATCH, device=device)
    drafted: dict[str, Any] = {"draft_logits": draft, "draft_stats": stats}
    filters: dict[str, Any] = {"top_k": 50, "top_p": 0.9}
    for rule in get_args(RuleName):
        options = {} if rule == "coupled" else drafted
        plain = partial(verify_chain, target, tokens, **options, **keys, rule=rule, temperature=0.7)
        yield f"verify_chain {rule}", plain
        yield f"verify_chain {rule} filtered", partial(plain, **filters)
        workspace = torch.zeros(verify_chain_workspace(BATCH, DRAFTS, VOCAB), dtype=torch.uint8, device=device)
        yield f"verify_chain {rule} in a workspace", partial(plain, workspace=workspace)
    row = torch.zeros_like(seed)  # made of an int, it would be a launch
    yield "sample", partial(sample, target[:, 0], row=row, **keys)
    for method in get_args(ChildrenName):
        yield f"sample_children {method}", partial(sample_children, target[:, 0], 4, method, row=row, **keys)
    for tree_rule in get_args(TreeRuleName):
        yield f"verify_tree {tree_rule}", partial(verify_tree, target, nodes, parents, **keys, rule=tree_rule)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Waiting for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def launches(call: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Names of the kernels that a call launches; and of its memsets and copies."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    on_device = [event.name for event in seen.events() if event.device_type.name == "CUDA"]
    kernels = [name for name in on_device if not name.startswith(("Memset", "Memcpy"))]
    return kernels, [name for name in on_device if name.startswith(("Memset", "Memcpy"))]


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Bit for bit, nan for nan."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


def check(report: Report, backend: BackendName | None, device: str, selection: Selection = EVERYTHING) -> None:
    """Every operation: no wait, its launches, and a graph that gives for other seeds what a call gives."""
    seed = torch.arange(BATCH, device=device)
    every = list(calls(backend, seed))
    for name, call in (every[index] for index, _form in selection.of(len(every))):
        report.attempt(name, check_call, name, call, seed)


def check_call(report: Report, name: str, call: Callable[[], tuple[Any, ...]], seed: Tensor) -> None:
    """One operation."""
    call()  # compiled, and its counters made
    torch.cuda.synchronize()
    try:
        with no_waiting():
            call()
    except RuntimeError as error:
        report.wrong.append(f"{name}: waits for the device: {error}")
        return
    names, others = launches(call)
    if len(names) != 1:
        report.wrong.append(f"{name}: launches {len(names)} kernels: {names}")
    if others:
        warnings.warn(f"{name}: beside its kernel a call launches {others}", stacklevel=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for added in (1000, 5):
        seed += added
        graph.replay()
        torch.cuda.synchronize()
        report.compare(f"{name}: a graph after its seeds changed", same(captured, call()), True, torch.inf)
