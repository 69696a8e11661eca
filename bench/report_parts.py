"""The parts of the report (:mod:`.report`): each yields flat rows, ``what`` first; a row that has ``failed`` says why.

Times are microseconds a call: p20, p50 and p80 of graph replays over buffers beyond the cache, and ``host`` what the
host needs for a call that it does not wait for. ``floor`` is the bytes that have to be read or written over the
measured bandwidth of a copy. Nothing is timed before the reference agrees.
"""

from __future__ import annotations

import gc
import io
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from specdec_kernels import sample, tree_attention, tree_mask, verify_chain_workspace
from specdec_kernels.bench.cases import Case, inputs
from specdec_kernels.bench.clocks import CACHES, MOST_BUFFERS, Clock, GraphClock, WallClock, percentiles, waits
from specdec_kernels.bench.contenders import fused
from specdec_kernels.bench.gpu import CHECKED, check
from specdec_kernels.ops import BACKENDS, BackendName
from specdec_kernels.ops.tree_rules import TreeRuleName
from specdec_kernels.ops.trees import FormatName

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where a part runs; ``dry`` is the same with tiny shapes, of which nothing is to be learned but that it runs."""

    device: str
    dry: bool

    @property
    def clock(self) -> Clock:
        """Of its device."""
        return WallClock() if self.device == "cpu" else GraphClock()


class Bench:
    """A clock, and what a copy on this device takes."""

    def __init__(self, setting: Setting) -> None:
        self.clock = setting.clock
        self.bandwidth = self.clock.copy_bandwidth()

    def row(self, what: str, call: Callable[[Any], Any], buffers: Sequence[Any], needed: float, **more: Any) -> Row:
        """Times of a call beside its floor."""
        times = percentiles(self.clock.replayed(call, buffers))
        floor = 1e6 * needed / self.bandwidth
        kernels, others = self.clock.launches(partial(call, buffers[0]))
        return {
            "what": what,
            **more,
            **times,
            "floor": _number(floor),
            "p50 / floor": _number(times["p50"] / floor if floor else math.nan),
            "MB": needed / 1e6,
            "host": 1e6 * self.clock.host(call, buffers[0]),
            "kernels": kernels,
            "memsets, copies": others,
        }

    def buffers(self, make: Callable[[int], Any], size: float) -> list[Any]:
        """As many as it takes to be cold, ``size`` being the bytes that a call reads of one."""
        return [make(index) for index in range(min(MOST_BUFFERS, math.ceil(CACHES * self.clock.cache / size)))]


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def tried(work: Iterable[tuple[str, Callable[[], Row]]]) -> Iterator[Row]:
    """The rows; one that cannot be had says why, and the others are tried all the same."""
    for what, row in work:
        try:
            yield row()
        except Exception as error:  # whatever it is, it is a result
            yield {"what": what, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            gc.collect()  # its buffers


# --- versions ---------------------------------------------------------------------------------------------------------


def versions(setting: Setting) -> Iterator[Row]:
    """Versions, how the native code was built, driver, GPU, backends."""
    from specdec_kernels.cli.doctor import describe

    text = io.StringIO()
    describe(Console(file=text, width=1000))
    for line in text.getvalue().splitlines():
        yield {"what": "doctor", "is": line.strip()}
    yield {"what": "torch", "is": f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"}
    if setting.device == "cuda":
        seen = torch.cuda.get_device_properties(0)
        size = f"{seen.total_memory >> 30} GiB, {seen.multi_processor_count} multiprocessors"
        size += f", L2 {seen.L2_cache_size >> 20} MiB"
        yield {"what": "GPU", "is": f"{seen.name}, compute capability {seen.major}.{seen.minor}, {size}"}
        yield {"what": "copy", "is": f"{GraphClock().copy_bandwidth() / 1e12:.2f} TB/s read and written"}
        yield from tried([("driver", _driver)])
    for backend in BACKENDS.values():
        yield {"what": f"backend {backend.name}", "is": backend.detail, "does not run": backend.reason or None}


def _driver() -> Row:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return {"what": "driver", "is": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}


# --- self-tests -------------------------------------------------------------------------------------------------------


def self_test(setting: Setting, backend: BackendName, count: int) -> Iterator[Row]:
    """A row for each of the processes that share the work, as soon as it ends; then their sum."""
    from specdec_kernels import selftest
    from specdec_kernels.cli.selftest import processes

    BACKENDS[backend].require(torch.device(setting.device))
    started, total = time.perf_counter(), selftest.Report()

    def row(what: str, report: selftest.Report) -> Row:
        failed = {"failed": report.wrong[0]} if report.wrong else {}
        counts = {"compared": report.requests, "too close": report.too_close, "wrong": len(report.wrong)}
        return {"what": what, **counts, "seconds": time.perf_counter() - started, **failed}

    shares = selftest.run_in_processes(backend, setting.device, 1 if setting.dry else count, processes(setting.device))
    for index, share in enumerate(shares):
        total.add(share)
        yield row(f"process {index}", share)
    yield row("all", total)


# --- chains -----------------------------------------------------------------------------------------------------------

VOCAB, DRAFTS, DRY_VOCAB = 151_936, 4, 200
CHAINS = (
    *(Case(VOCAB, DRAFTS, batch, "bfloat16", "statistics") for batch in (1, 8, 64, 256)),
    *(Case(VOCAB, DRAFTS, 64, "bfloat16", kind) for kind in ("dense", "point mass", "greedy")),
    *(Case(VOCAB, DRAFTS, batch, "bfloat16", "statistics", filtered=True) for batch in (1, 64)),
    Case(VOCAB, DRAFTS, 64, "bfloat16", "statistics", rule="block"),
)


def sized(setting: Setting, backend: BackendName) -> Sequence[Case]:
    """The cases, or tiny ones like them, each once; of Triton, which is interpreted there, the first."""
    if not setting.dry:
        return CHAINS
    tiny = dict.fromkeys(replace(case, vocab=DRY_VOCAB, num_draft=1, batch=1) for case in CHAINS)
    return list(tiny)[: 1 if backend == "triton" else None]


def chain(bench: Bench, case: Case, backend: BackendName) -> Row:
    """``verify_chain``, its scratch handed in."""
    clock = bench.clock
    accepted: Callable[[Any], Tensor] = lambda x: fused(case, x).num_accepted.long()  # noqa: E731
    buffers = inputs(case, accepted, clock.device, CACHES * clock.cache, MOST_BUFFERS)
    size = verify_chain_workspace(case.batch, case.num_draft, case.vocab)
    workspace = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    contender = partial(fused, backend=backend, workspace=workspace)
    check(case, buffers[0], contender, backend)
    needed = sum(case.bytes_read(x) for x in buffers) / len(buffers)
    kept = float(torch.cat([x.target_rows for x in buffers]).float().mean() - 1)
    return bench.row(case.name, partial(contender, case), buffers, needed, accepted=kept)


def draws(bench: Bench, batch: int, vocab: int, backend: BackendName) -> Row:
    """``sample``, one draw a row."""
    keys: dict[str, Any] = {"seed": torch.arange(batch, device=bench.clock.device), "position": 0, "temperature": 0.7}
    keys["row"] = torch.zeros_like(keys["seed"])  # made of an int, it would be a launch; so would the position
    keys["position"] = torch.zeros_like(keys["seed"])

    def make(index: int) -> Tensor:
        generator = torch.Generator(bench.clock.device).manual_seed(index)
        return torch.randn(batch, vocab, generator=generator, device=bench.clock.device).mul_(3).bfloat16()

    needed = 2 * batch * vocab
    buffers = bench.buffers(make, needed)
    few: dict[str, Any] = {
        name: value[:CHECKED] if isinstance(value, Tensor) else value for name, value in keys.items()
    }
    got, want = sample(buffers[0], **keys, backend=backend), sample(buffers[0][:CHECKED], **few, backend="reference")
    if not torch.equal(got.tokens[:CHECKED], want.tokens):
        raise RuntimeError(f"the reference disagrees: {got.tokens[:CHECKED].tolist()} and {want.tokens.tolist()}")
    return bench.row(f"sample B={batch}", lambda x: sample(x, **keys, backend=backend), buffers, needed)


def chains(setting: Setting, backend: BackendName) -> Iterator[Row]:
    """``verify_chain`` by kind of drafts, filters and rule; ``sample``."""
    BACKENDS[backend].require(torch.device(setting.device))
    bench = Bench(setting)
    yield from tried((case.name, partial(chain, bench, case, backend)) for case in sized(setting, backend))
    batch, vocab = (1, DRY_VOCAB) if setting.dry else (64, VOCAB)
    yield from tried([("sample", partial(draws, bench, batch, vocab, backend))])


# --- trees, masks, attention ------------------------------------------------------------------------------------------

TREE_RULES: tuple[TreeRuleName, ...] = ("walk", "recursive", "traversal")


def rules(setting: Setting, backend: BackendName) -> Sequence[TreeRuleName]:
    """All of them; of Triton, where it is interpreted, the first."""
    return TREE_RULES[:1] if setting.dry and backend == "triton" else TREE_RULES


def tree(bench: Bench, rule: TreeRuleName, batch: int, vocab: int, backend: BackendName) -> Row:
    """``verify_tree``. What it has to read at least: the target's rows on the path; under traversal those of all
    nodes."""
    from specdec_kernels.bench import trees

    device = bench.clock.device
    row_bytes = 2 * vocab
    read = len(trees.PARENTS) if rule == "traversal" else 2  # of the nodes, at least
    buffers = bench.buffers(lambda i: trees.inputs(batch, "bfloat16", i, vocab, device), read * batch * row_bytes)
    got = trees.fused(buffers[0], rule, backend).tokens[:CHECKED]
    want = trees.fused(buffers[0].first(CHECKED), rule, "reference").tokens
    if not torch.equal(got, want):
        raise RuntimeError(f"verify_tree {rule}: the reference disagrees: {got.tolist()} and {want.tolist()}")
    kept = float(trees.fused(buffers[0], rule, backend).num_accepted.float().mean())
    rows = len(trees.PARENTS) if rule == "traversal" else kept + 1
    what = f"{rule} V={vocab} N={len(trees.PARENTS)} B={batch}"
    call = partial(trees.fused, rule=rule, backend=backend)
    return bench.row(what, call, buffers, batch * rows * row_bytes, accepted=kept)


def trees(setting: Setting, backend: BackendName) -> Iterator[Row]:
    """``verify_tree`` by rule."""
    BACKENDS[backend].require(torch.device(setting.device))
    bench, vocab = Bench(setting), DRY_VOCAB if setting.dry else VOCAB
    yield from tried(
        (f"{rule} B={batch}", partial(tree, bench, rule, batch, vocab, backend))
        for batch in ((1,) if setting.dry else (1, 64))
        for rule in rules(setting, backend)
    )


def mask(bench: Bench, form: FormatName, nodes: int, context: int, backend: BackendName) -> Row:
    """``tree_mask`` of eight requests; the bytes are those of the mask."""
    device, batch = bench.clock.device, 8
    parents = torch.tensor([[-1] + [(i - 1) // 2 for i in range(1, nodes)]] * batch, device=device)
    lens: dict[str, Any] = {}
    if form != "packed":
        lens = {"context_lens": torch.full((batch,), context, device=device), "max_context": context}
    made, want = (tree_mask(parents, form, **lens, backend=name) for name in (backend, "reference"))
    if not torch.equal(made, want):
        raise RuntimeError("the reference disagrees")
    call: Callable[[Tensor], Tensor] = lambda x: tree_mask(x, form, **lens, backend=backend)  # noqa: E731
    size = made.numel() * made.element_size()
    return bench.row(f"tree_mask {form} N={nodes} B={batch} L={context}", call, [parents], size, backend=backend)


def attention(bench: Bench, batch: int, context: int, nodes: int, heads: int, width: int, ours: bool) -> Row:
    """``tree_attention`` by Triton, or PyTorch's attention with a mask that is there; bytes: keys and values."""
    device, groups = bench.clock.device, heads // 4
    parents = torch.tensor([[-1] + [(i - 1) // 2 for i in range(1, nodes)]] * batch, device=device)
    lens = torch.full((batch,), context, device=device)
    packed = tree_mask(parents, "packed")
    dense = tree_mask(parents, "dense", context_lens=lens, max_context=context)[:, None]
    needed = 2 * 2 * batch * groups * (context + nodes) * width

    def make(index: int) -> tuple[Tensor, ...]:
        on: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(index), "device": device}
        shapes = (heads, nodes), (groups, context + nodes), (groups, context + nodes)
        return tuple(torch.randn(batch, *shape, width, **on).bfloat16() for shape in shapes)

    def by_torch(x: tuple[Tensor, ...]) -> Tensor:
        query, key, value = x
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=True)

    def by_us(x: tuple[Tensor, ...]) -> Tensor:
        query, key, value = x
        return tree_attention(query, key, value, packed, lens, backend="triton")

    buffers = bench.buffers(make, needed)
    what = f"B={batch} L={context} N={nodes} {heads}/{groups} heads of {width}"
    if not ours:
        return bench.row(f"attention {what}", by_torch, buffers, needed, backend="PyTorch, a mask")
    torch.testing.assert_close(by_us(buffers[0]).float(), by_torch(buffers[0]).float(), rtol=0, atol=2e-2)
    return bench.row(f"attention {what}", by_us, buffers, needed, backend="triton")


def masks_and_attention(setting: Setting) -> Iterator[Row]:
    """``tree_mask``; ``tree_attention`` beside PyTorch's with a mask."""
    bench, forms = Bench(setting), ("packed", "dense")
    nodes, context, heads, width = (4, 8, 4, 16) if setting.dry else (64, 4096, 32, 128)
    yield from tried((f"tree_mask {form}", partial(mask, bench, form, nodes, context, "cuda")) for form in forms)  # type: ignore[arg-type]
    shapes = ((1, context),) if setting.dry else ((1, 2048), (16, context))
    yield from tried(
        (f"attention B={batch} L={length}", partial(attention, bench, batch, length, nodes, heads, width, ours))
        for batch, length in shapes
        for ours in (True, False)
    )


# --- Triton -----------------------------------------------------------------------------------------------------------


def triton(setting: Setting) -> Iterator[Row]:
    """Chains and trees once more by Triton. Its kernels are compiled before by processes side by side, those for trees,
    which take longer, while chains are timed."""
    BACKENDS["triton"].require(torch.device(setting.device))
    kinds = {(case.kind, case.rule, case.filtered): case for case in sized(setting, "triton")}
    most = 1 if setting.dry else min(len(kinds) + len(TREE_RULES), os.cpu_count() or 1)
    with ProcessPoolExecutor(most, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        of_trees = [pool.submit(compile_tree, setting, rule) for rule in rules(setting, "triton")]
        of_chains = [pool.submit(compile_chain, setting, case) for case in kinds.values()]
        yield compiled("chains", of_chains)
        yield from chains(setting, "triton")
        yield compiled("trees", of_trees)
        yield from trees(setting, "triton")


def compile_chain(setting: Setting, case: Case) -> None:
    """Call Triton once: the kernel is in its cache then. A batch of one takes the same as any."""
    one = replace(case, batch=1)
    x = inputs(one, lambda x: fused(one, x).num_accepted.long(), setting.device, 1)[0]
    size = verify_chain_workspace(1, case.num_draft, case.vocab)
    fused(one, x, "triton", torch.zeros(size, dtype=torch.uint8, device=setting.device))


def compile_tree(setting: Setting, rule: TreeRuleName) -> None:
    """The same of trees."""
    from specdec_kernels.bench import trees

    trees.fused(trees.inputs(1, "bfloat16", 0, DRY_VOCAB if setting.dry else VOCAB, setting.device), rule, "triton")


def compiled(what: str, work: Sequence[Future[None]]) -> Row:
    """Wait for it. What fails here fails once more where it is timed, and is told there."""
    started = time.perf_counter()
    failed = sum(each.exception() is not None for each in work)
    return {"what": f"compiled {what}: {len(work)} calls, {failed} failed", "waited": time.perf_counter() - started}


# --- text -------------------------------------------------------------------------------------------------------------


def llama(setting: Setting, layers: int) -> Any:
    """A Llama of random weights: nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(layers)
    width = 64 if setting.dry else 2048
    config = LlamaConfig(
        vocab_size=DRY_VOCAB if setting.dry else 128_256, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64 * 2, num_key_value_heads=max(1, width // 256),
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if setting.dry else torch.bfloat16)
    try:
        with torch.device(setting.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def decoded(setting: Setting, target: Any, drafter: Any, batch: int, what: str) -> Row:
    """Greedy text behind a prompt that repeats itself, so that n-grams have something to draft."""
    from specdec_kernels.decode import Statistics, generate

    prompts = [[3 + (7 * request + token % 9) % 200 for token in range(48)] for request in range(batch)]
    tokens = 4 if setting.dry else 48

    def text(count: int, statistics: Statistics) -> None:
        generate(
            target, prompts, drafter=drafter, max_new_tokens=count, temperature=0.0, seed=0, stop_tokens=(),
            statistics=statistics,
        )  # fmt: skip

    text(tokens // 2, Statistics())  # warm
    timed, counted = Statistics(), Statistics()
    text(tokens, timed)
    waited = waits(partial(text, tokens // 2, counted))
    by_kind = {f"{name} ms": 1e3 * timed.seconds[name] / timed.steps for name in ("draft", "target", "verify")}
    return {
        "what": what,
        "ms a step": 1e3 * timed.decode_seconds / timed.steps,
        **by_kind,
        "tokens a step": timed.tokens_per_step,
        "tokens a second": timed.tokens_per_second,
        "waits a step": waited / counted.steps,  # those for the prompt among them
    }


def text(setting: Setting) -> Iterator[Row]:
    """A model of 16 layers that is 2,048 wide, decoded in three ways."""
    from specdec_kernels.decode import TransformersTarget
    from specdec_kernels.decode.drafters import ModelDrafter, NGramDrafter

    target = TransformersTarget(llama(setting, 2 if setting.dry else 16))
    drafters = {"no drafter": lambda: None, "n-grams": NGramDrafter, "model": lambda: ModelDrafter(llama(setting, 1))}
    yield from tried(
        (f"{name} B={batch}", lambda name=name, make=make, batch=batch: decoded(  # type: ignore[misc]
            setting, target, make(), batch, f"{name} B={batch}"
        ))
        for batch in ((2,) if setting.dry else (1, 8))
        for name, make in drafters.items()
    )  # fmt: skip
