"""Time ``verify_chain`` on a GPU: in CUDA graphs over buffers that do not fit its cache, beside PyTorch and, where they
are installed, FlashInfer and vLLM, in graphs too where they can be captured.

Without a GPU the same code runs on the CPU for tests, by the clock and without graphs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from specdec_kernels import Verified, verify_chain_workspace
from specdec_kernels.bench.cases import FILTERS, TEMPERATURE, Case, Inputs, inputs
from specdec_kernels.bench.clocks import CACHES, MOST_BUFFERS, Clock, GraphClock, percentiles, waits
from specdec_kernels.bench.contenders import Contender, batched, by_search, fused, lean_batch, lean_filtered
from specdec_kernels.bench.machine import machine, require_plots, save
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.ops.backends import BACKENDS, BackendName

#: Ours, by backend.
OURS: tuple[BackendName, ...] = ("cuda", "triton")
#: The shape that others are timed at.
OTHERS_VOCAB, OTHERS_DRAFTS = 151_936, 4
#: Requests whose tokens are compared with the reference's.
CHECKED = 4


def cases(quick: bool) -> Iterator[Case]:
    """The grid: the token rule at a temperature, drafts with their statistics, with and without filters."""
    for vocab in (OTHERS_VOCAB,) if quick else (32_000, 128_256, OTHERS_VOCAB, 262_144):
        for num_draft in (OTHERS_DRAFTS,) if quick else (1, 4, 8, 16):
            for batch in (1, 8, 64, 256):
                for dtype in ("bfloat16", "float32"):
                    for filtered in (False, True):
                        yield Case(vocab, num_draft, batch, dtype, "statistics", filtered=filtered)


def ours(name: BackendName, workspace: Tensor, case: Case, x: Inputs) -> Verified:
    """The public function on one backend."""
    return fused(case, x, name, workspace)


def probabilities(case: Case, logits: Tensor) -> Tensor:
    """What the others ask for: float32, normalised, filtered."""
    probs = torch.softmax(logits.float() / TEMPERATURE, -1)
    if not case.filtered:
        return probs
    from flashinfer.sampling import top_k_renorm_probs, top_p_renorm_probs

    flat = top_p_renorm_probs(top_k_renorm_probs(probs.flatten(0, -2), FILTERS["top_k"]), FILTERS["top_p"])
    result: Tensor = flat.view_as(probs)
    return result


def flashinfer(case: Case, x: Inputs) -> Any:
    """Its chain kernel, and the softmax passes that it needs before it."""
    from flashinfer.sampling import chain_speculative_sampling

    return chain_speculative_sampling(probabilities(case, x.draft), x.tokens.int(), probabilities(case, x.target))


def vllm(case: Case, x: Inputs) -> Any:
    """Its rejection sampler (0.33, V1), which takes logits and draws the bonus token apart."""
    from vllm.v1.sample.rejection_sampler import rejection_sample

    batch, drafts, device = case.batch, case.num_draft, x.target.device
    target = x.target.float() / TEMPERATURE
    bonus = torch.multinomial(torch.softmax(target[:, -1], -1), 1).int()
    sampling = SimpleNamespace(
        all_greedy=False, all_random=True, generators={}, temperature=torch.full((batch,), TEMPERATURE, device=device)
    )
    return rejection_sample(
        x.tokens.flatten().int(), [drafts] * batch, drafts,
        torch.arange(drafts, batch * drafts + 1, drafts, device=device, dtype=torch.int32),
        torch.softmax(x.draft.float() / TEMPERATURE, -1).flatten(0, 1), target[:, :-1].flatten(0, 1).contiguous(),
        bonus, sampling,
    )  # fmt: skip


def compiled(contender: Contender, case: Case) -> Contender:
    """The same by `torch.compile`, for one shape. Whole: what it leaves out would run as written, and look compiled."""
    function = torch.compile(lambda *tensors: contender(case, Inputs(*tensors)), dynamic=False, fullgraph=True)
    return lambda _, x: function(*vars(x).values())


def others(case: Case) -> dict[str, Contender]:
    """PyTorch, eager and compiled; FlashInfer and vLLM where they are installed."""
    if (case.vocab, case.num_draft) != (OTHERS_VOCAB, OTHERS_DRAFTS):
        return {}
    torch.compiler.reset()  # else all cases' functions, whose code is the same, share the times it may be compiled
    chosen: dict[str, Contender] = {"lean PyTorch": lean_filtered}
    if not case.filtered:
        searched = partial(lean_batch, draw=by_search)
        chosen = {"PyTorch": batched, "lean PyTorch": lean_batch, "lean PyTorch, searched": searched}
    chosen |= {f"{name}, compiled": compiled(contender, case) for name, contender in chosen.items()}
    for name, contender in (("flashinfer", flashinfer), ("vllm", vllm)):
        if importlib.util.find_spec(name) is not None and (name == "flashinfer" or not case.filtered):
            chosen[name] = contender
    return chosen


def first(x: Inputs, requests: int) -> Inputs:
    """Some of the requests of a batch."""
    return Inputs(*(value[:requests] for value in vars(x).values()))


def check(case: Case, x: Inputs, contender: Contender, name: str) -> None:
    """Refuse to time a wrong answer: a request's tokens do not depend on the batch, so the reference looks at a few."""
    got, want = contender(case, x).tokens[:CHECKED], fused(case, first(x, CHECKED), "reference").tokens
    if not torch.equal(got, want):
        raise RuntimeError(f"{case.name}, {name}: the reference disagrees: {got.tolist()} and {want.tolist()}")


def timed(clock: Clock, call: Callable[[Inputs], Any], buffers: list[Inputs]) -> tuple[list[float], str]:
    """Seconds a call, from a graph; what cannot be captured is called, its launches included, and why is told."""
    call(buffers[0])  # compiled
    if waited := waits(partial(call, buffers[0])):  # capturing it would leave PyTorch's generator in a state of its own
        return clock.called(call, buffers), f"the host waits {waited} times"
    try:
        return clock.replayed(call, buffers), ""
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return clock.called(call, buffers), str(error).splitlines()[0] or type(error).__name__


def measure(case: Case, clock: Clock, bandwidth: float) -> dict[str, Any]:
    """All contenders on the same buffers. A contender that fails says so in the results; ours must not."""
    cold = CACHES * clock.cache
    buffers = inputs(case, lambda x: fused(case, x).num_accepted.long(), clock.device, cold, MOST_BUFFERS)
    size = verify_chain_workspace(case.batch, case.num_draft, case.vocab)
    workspace = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    times: dict[str, dict[str, float]] = {}
    kernels: dict[str, int] = {}
    transfers: dict[str, int] = {}
    eager: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in OURS:
        backend = BACKENDS[name]
        if backend.reason or backend.device != clock.device:
            failed[name] = backend.reason or f"it runs on {backend.device}"
            continue
        contender = partial(ours, name, workspace)
        check(case, buffers[0], contender, name)
        times[name] = percentiles(clock.replayed(partial(contender, case), buffers))
        kernels[name], transfers[name] = clock.launches(partial(contender, case, buffers[0]))
    for other, called in others(case).items():
        try:
            seconds, reason = timed(clock, partial(called, case), buffers)
        except Exception as error:  # whatever others raise is a result
            failed[other] = f"{type(error).__name__}: {error}"
            continue
        times[other] = percentiles(seconds)
        eager |= {other: reason} if reason else {}
    whole = sum(x.numel() * x.element_size() for x in (buffers[0].target, buffers[0].draft))
    needed = sum(case.bytes_read(x) for x in buffers) / len(buffers)
    rates = {name: needed / (1e-6 * time["p50"]) for name, time in times.items() if name in OURS}
    return {
        "case": case.name,
        **vars(case),
        "accepted": float(torch.cat([x.target_rows for x in buffers]).float().mean() - 1),
        "bytes": needed,
        "bytes_of_inputs": whole,
        "microseconds": times,
        "gigabytes_per_second": {name: rate / 1e9 for name, rate in rates.items()},
        "of_copy_bandwidth": {name: rate / bandwidth for name, rate in rates.items()},
        "microseconds_to_read_inputs_once": 1e6 * whole / bandwidth,
        "kernels": kernels,
        "memsets_and_copies": transfers,
        "called_eagerly": eager,
        "failed": failed,
    }


def table(console: Console) -> Lines:
    """Microseconds: ours, with the share of the copy bandwidth, and the fastest of the others; JSON has the rest."""
    ours = {head: width for name in OURS for head, width in ((f"{name} us", ">9"), (f"{name} %", ">8"))}
    columns = {"V": ">6", "K": ">2", "B": ">3", "dtype": "<8", "filters": "<7", **ours, "others us": "<"}
    return Lines(console, columns)


def cells(row: dict[str, Any]) -> list[str]:
    """A case in that table."""
    times = {name: time["p50"] for name, time in row["microseconds"].items()}
    shape = [str(row[name]) for name in ("vocab", "num_draft", "batch", "dtype")]
    mine = [
        cell
        for name in OURS
        for cell in ([f"{times[name]:,.1f}", f"{row['of_copy_bandwidth'][name]:.0%}"] if name in times else ["-", "-"])
    ]
    name = min((name for name in times if name not in OURS), key=lambda name: times[name], default=None)
    fastest = "" if name is None else f"{times[name]:,.1f} {name}" + " (eager)" * (name in row["called_eagerly"])
    return [*shape, "yes" if row["filtered"] else "", *mine, fastest]


def plot(rows: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """Times by batch at the shape the others are timed at, beside reading the inputs once."""
    from matplotlib import pyplot

    shown = [
        row
        for row in rows
        if (row["vocab"], row["num_draft"], row["dtype"], row["filtered"])
        == (OTHERS_VOCAB, OTHERS_DRAFTS, "bfloat16", False)
    ]
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name in dict.fromkeys(name for row in shown for name in row["microseconds"]):
        at = [(row["batch"], row["microseconds"][name]["p50"]) for row in shown if name in row["microseconds"]]
        axes.plot(*zip(*at, strict=True), marker="o", label=name)
    once = [(row["batch"], row["microseconds_to_read_inputs_once"]) for row in shown]
    axes.plot(*zip(*once, strict=True), linestyle="--", color="grey", label="its inputs once, at copy bandwidth")
    axes.set(xscale="log", yscale="log", xlabel="requests", ylabel="microseconds a call, median")
    axes.set_title(f"verify_chain, V={OTHERS_VOCAB:,}, K={OTHERS_DRAFTS}, bfloat16, T={TEMPERATURE} - {where['gpu']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(out: Path | None, quick: bool, console: Console, clock: Clock | None = None) -> None:
    """Run the grid. Results are written after every case, under the name of the GPU."""
    if clock is None:
        if not torch.cuda.is_available():
            raise RuntimeError("there is no GPU to time: torch sees none")
        clock = GraphClock()
    if out is not None:
        require_plots()
    bandwidth = clock.copy_bandwidth()
    where = machine() | {"gpu": torch.cuda.get_device_name() if clock.device == "cuda" else "none"}
    where |= {"copy_gigabytes_per_second": bandwidth / 1e9, "cuda": torch.version.cuda}
    name = re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower())
    rows: list[dict[str, Any]] = []
    lines = table(console)
    for case in cases(quick):
        with notes.status(case.name):
            rows.append(measure(case, clock, bandwidth))
        save(out, name, where, results=rows)
        lines.print(*cells(rows[-1]))
    console.print(where)
    if out is not None:
        plot(rows, where, out / f"{name}.png")
