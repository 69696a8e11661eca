"""Time what trees take: verification, masks and moving keys and values beside PyTorch; and text with chains and trees
at equal numbers of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from specdec_kernels import compact_kv, sample_children, tree_mask, verify_tree
from specdec_kernels.bench.cases import COLD_BYTES, DRAFT_NOISE, TEMPERATURE
from specdec_kernels.bench.contenders import Draw, by_race, by_search, scaled
from specdec_kernels.bench.machine import machine, require_floor, save
from specdec_kernels.cli.consoles import Lines, notes
from specdec_kernels.cli.generate import Session, Settings
from specdec_kernels.cli.models import DRAFTING, load_drafter
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import Drafter, Statistics
from specdec_kernels.ops import RuleName
from specdec_kernels.ops.tree_rules import TreeRuleName
from specdec_kernels.ops.trees import FormatName

ROUNDS, SLOW_ROUNDS = 60, 7
#: Of all buffers together.
MOST_BYTES = 1 << 30
#: Hand-tuned PyTorch, of which the fastest counts, by how it draws.
LEAN: dict[str, Draw] = {"lean": by_race, "lean, searched": by_search}
VOCAB = 128_256
#: A tree of 16 rows: three children, the first ones with more.
PARENTS = (-1, 0, 0, 0, 1, 1, 1, 2, 2, 4, 4, 5, 7, 9, 9, 13)

# --- verification -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call."""

    target: Tensor
    tokens: Tensor
    draft: Tensor
    stats: Tensor
    seed: Tensor
    parents: Tensor
    position: Tensor

    def first(self, requests: int) -> Inputs:
        """Some of the requests of a batch."""
        return Inputs(*(value[:requests] for value in vars(self).values()))


def inputs(batch: int, dtype: str, index: int, vocab: int = VOCAB, device: str = "cpu") -> Inputs:
    """A tree a request, its children drawn without replacement."""
    nodes, generator = len(PARENTS), torch.Generator(device).manual_seed(index)
    on: dict[str, Any] = {"generator": generator, "device": device}
    target = torch.randn(batch, nodes, vocab, **on).mul_(3).to(getattr(torch, dtype))
    noise = torch.randn(batch, nodes, vocab, **on).mul_(DRAFT_NOISE)
    draft = noise.add_(target).to(target.dtype)
    seed = torch.randint(0, 2**60, (batch,), **on)
    first = torch.tensor([sum(up < node for up in PARENTS[1:]) for node in range(nodes)], device=device)
    drawn = sample_children(
        draft.flatten(0, 1), 3, seed=seed.repeat_interleave(nodes), position=9, row=first.repeat(batch),
        temperature=TEMPERATURE,
    )  # fmt: skip
    children = drawn.tokens.reshape(batch, nodes, 3)
    tokens = torch.zeros(batch, nodes, dtype=torch.int64, device=device)
    for node in range(1, nodes):
        tokens[:, node] = children[:, PARENTS[node], PARENTS[1:node].count(PARENTS[node])]
    parents = torch.tensor([PARENTS] * batch, device=device)
    position = torch.full_like(seed, 9)
    return Inputs(target, tokens, draft, drawn.stats.reshape(batch, nodes, 3), seed, parents, position)


def fused(x: Inputs, rule: TreeRuleName, backend: Any = None) -> Any:
    """The public function; "walk" takes the drafts for point masses."""
    drafts = () if rule == "walk" else (x.draft, x.stats)
    return verify_tree(
        x.target, x.tokens, x.parents, *drafts, siblings="without_replacement", seed=x.seed, position=x.position,
        temperature=TEMPERATURE, rule=rule,
        backend=backend,
    )  # fmt: skip


def lean(x: Inputs, rule: TreeRuleName, draw: Draw = by_race) -> list[tuple[int, int]]:
    """The leanest PyTorch for the rules that go down: node by node, the draft's scalars handed over. The node that each
    request comes to, and the token behind it."""
    ends = []
    for b in range(len(x.tokens)):
        node = 0
        while True:
            left = scaled(x.target[b, node])
            left.sub_(left.max()).exp_()
            children = [child for child, up in enumerate(PARENTS) if up == node]
            following = drawn = None
            if rule == "walk":
                drawn = int(draw(left))
                following = next((child for child in children if int(x.tokens[b, child]) == drawn), None)
            elif children:
                scale, _cutoff, logsumexp = x.stats[b, node].tolist()
                draft, taken = None, 0.0
                left.div_(left.sum())
                for child in children:
                    token = int(x.tokens[b, child])
                    prob = torch.e ** (float(x.draft[b, node, token]) * scale - logsumexp)
                    if float(torch.rand(())) * prob / (1 - taken) < float(left[token]):
                        following = child
                        break
                    if draft is None:
                        draft = scaled(x.draft[b, node], scale).sub_(logsumexp).exp_()
                    left.sub_(draft, alpha=1 / (1 - taken)).clamp_(min=0)
                    left.div_(left.sum())
                    draft[token], taken = 0.0, taken + prob
            if following is None:
                ends.append((node, int(draw(left)) if drawn is None else drawn))
                break
            node = following
    return ends


def cold_buffers(batch: int, dtype: str) -> tuple[list[Inputs], int]:
    """As many as it takes to be cold under ``walk``, which reads the least (the target's rows on the path alone), but
    within :data:`MOST_BYTES`; and the bytes that it reads between two uses of one."""
    made: list[Inputs] = []
    read = 0
    while read < COLD_BYTES and sum(x.target.nbytes + x.draft.nbytes for x in made) < MOST_BYTES:
        made.append(inputs(batch, dtype, len(made)))
        read += int((fused(made[-1], "walk").num_accepted + 1).sum()) * VOCAB * made[-1].target.element_size()
    return made, read


def verification() -> Iterator[dict[str, Any]]:
    """Every rule, cold buffers."""
    rules: tuple[TreeRuleName, ...] = ("walk", "recursive", "traversal")
    for batch, dtype in product((1, 8), ("bfloat16", "float32")):
        buffers, read = cold_buffers(batch, dtype)
        cache = "cold" if read >= COLD_BYTES else f"{read >> 20} MiB between two uses"
        for rule in rules:
            case = f"V={VOCAB} N={len(PARENTS)} B={batch} {dtype}"
            yield {"case": case, "cache": cache if rule == "walk" else "cold", **verified(buffers, rule)}


def verified(buffers: list[Inputs], rule: TreeRuleName) -> dict[str, Any]:
    """One rule; where PyTorch has lean forms they are beside it, and so is reading the path's target rows."""
    if not torch.equal(fused(buffers[0], rule).tokens, fused(buffers[0], rule, "reference").tokens):
        raise RuntimeError(f"verify_tree {rule}: the reference disagrees")
    accepted = [fused(x, rule).num_accepted.long() for x in buffers]
    none = torch.zeros_like(accepted[0])
    count = len(buffers)
    rounds = -(-ROUNDS // count) * count  # whole ones, so that what follows finds cold what it begins with
    times = {"fused": timed(lambda i: fused(buffers[i], rule), count, rounds)}
    row: dict[str, Any] = {"what": f"verify_tree {rule}", "bytes": None}
    row["accepted"] = float(torch.cat(accepted).float().mean())
    if rule != "traversal":  # which looks at what it does not keep, too

        def stream(i: int) -> Any:
            return torch.ops.specdec_bench.stream(buffers[i].target, accepted[i] + 1, buffers[i].draft, none)

        times["stream"] = timed(stream, count, rounds)
        for name, draw in LEAN.items():
            times[name] = timed(lambda i, draw=draw: lean(buffers[i], rule, draw), count, SLOW_ROUNDS)  # type: ignore[misc]
        x = buffers[0].target
        row["bytes"] = (row["accepted"] + 1) * len(x) * VOCAB * x.element_size()
    return {**row, "microseconds": times}


def timed(call: Callable[[int], Any], buffers: int, rounds: int) -> float:
    """Median microseconds of a call on the buffers in turn; the last one warms up."""
    call(buffers - 1)
    seconds = []
    for index in range(rounds):
        start = time.perf_counter()
        call(index % buffers)
        seconds.append(time.perf_counter() - start)
    return 1e6 * median(seconds)


# --- masks, keys and values -------------------------------------------------------------------------------------------


def torch_mask(parents: Tensor, format: str, context: int) -> Tensor:
    """Masks as one would write them in PyTorch: ancestors by squaring the matrix of parents."""
    batch, nodes = parents.shape
    visible = torch.eye(nodes).repeat(batch, 1, 1)
    visible[:, torch.arange(1, nodes), parents[0, 1:]] = 1.0
    for _ in range(nodes.bit_length()):
        visible = (visible @ visible).clamp_(max=1.0)
    mask = visible.bool()
    if format == "packed":
        return (mask.unflatten(-1, (-1, 32)).long() << torch.arange(32)).sum(-1).int()
    full = torch.cat([mask.new_ones(batch, nodes, context), mask], 2)
    if format == "flashinfer":
        return (full.flatten(1).unflatten(-1, (-1, 8)).byte() << torch.arange(8)).sum(-1).byte()
    return full


def masks() -> Iterator[dict[str, Any]]:
    """64 nodes over a context of 4,096; warm: the one buffer is that of the call before."""
    batch, nodes, context = 8, 64, 4096
    parents = torch.tensor([[-1] + [(i - 1) // 2 for i in range(1, nodes)]] * batch)
    formats: tuple[FormatName, ...] = ("packed", "flashinfer", "dense")
    for format in formats:
        lens = {} if format == "packed" else {"context_lens": torch.full((batch,), context), "max_context": context}
        made = tree_mask(parents, format, **lens)  # type: ignore[arg-type]
        if not torch.equal(made.flatten(), torch_mask(parents, format, context).flatten()):
            raise RuntimeError(f"tree_mask {format}: PyTorch disagrees")
        times = {
            "fused": timed(lambda _, format=format, lens=lens: tree_mask(parents, format, **lens), 1, ROUNDS),
            "lean": timed(lambda _, format=format: torch_mask(parents, format, context), 1, ROUNDS),
        }
        size = made.numel() * made.element_size()
        case = f"N={nodes} B={batch}" + (f" L={context}" if lens else "")
        yield {"what": f"tree_mask {format}", "case": case, "cache": "warm", "bytes": size, "microseconds": times}


def keys_and_values() -> Iterator[dict[str, Any]]:
    """A cache of SmolLM2's shape, [1, 3, 544, 64] a layer; four nodes of 16 accepted, of which three move. Warm."""
    caches = [torch.randn(1, 3, 544, 64).bfloat16() for _ in range(60)]
    path, start = torch.tensor([[0, 2, 7, 12, *[-1] * 12]]), torch.tensor([500])

    def by_torch(caches: list[Tensor]) -> None:
        source = 500 + path[0, :4]
        for cache in caches:
            cache[:, :, 500:504] = cache[:, :, source]

    by_torch(moved := [cache.clone() for cache in caches])
    compact_kv(caches, path, start)
    if not all(map(torch.equal, caches, moved)):
        raise RuntimeError("compact_kv: PyTorch disagrees")
    times = {
        "fused": timed(lambda _: compact_kv(caches, path, start), 1, ROUNDS),
        "lean": timed(lambda _: by_torch(caches), 1, ROUNDS),
    }
    row = {"what": "compact_kv", "case": "30 layers, 3 rows", "cache": "warm", "bytes": 60 * 3 * 3 * 64 * 2 * 2}
    yield {**row, "microseconds": times}


# --- text -------------------------------------------------------------------------------------------------------------

TOKENS = 64
BUDGETS = (8, 16, 32)
#: Texts a prompt at a temperature: one alone leaves a tenth of a token a step to chance.
SEEDS = 3
#: Drafters of trees, as the table calls them.
TREES = {"medusa": "static tree (Medusa)", "static-tree": "static tree (model)", "tree": "dynamic tree (model)"}
#: Lengths of chains, each within the budgets that have room for it; longer ones gain nothing.
CHAINS = (4, 7, 15)


@dataclass(frozen=True)
class Way:
    """One way to draft; ``rows`` are scored a step at most."""

    temperature: float
    drafter: str
    rule: RuleName
    rows: int


def ways() -> Iterator[Way]:
    """Plain decoding first."""
    for temperature in (0.0, 0.8):
        yield Way(temperature, "none", "token", 1)
        for length in CHAINS:
            yield Way(temperature, "model", "token", length + 1)
        if temperature:  # greedy, the rules are one
            yield Way(temperature, "model", "block", 8)
        for rows in BUDGETS:
            yield Way(temperature, "medusa", "token", rows)
            for drafter in ("static-tree", "tree"):
                yield Way(temperature, drafter, "block" if temperature else "token", rows)


def text() -> list[dict[str, Any]]:
    """Every prompt in every way, the ways in turn, so that a slow minute of the machine hits them all."""
    settings = Settings("smollm2", None, "none", 0, TOKENS, 0, None, "bfloat16")
    session = Session(settings)
    # A chain that stops where it is not sure would leave rows unused.
    unstopped = replace(DRAFTING, min_confidence=0.0)
    drafters: dict[str, Drafter | None] = {
        name: load_drafter(name, session.model, config=unstopped) for name in ("none", "model", *TREES)
    }
    chosen = list(ways())
    results = {way: Statistics() for way in chosen}
    work = [(seed, prompt) for seed in range(SEEDS) for prompts in PROMPTS.values() for prompt in prompts]
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("decoding", total=len(work) * len(chosen))
        for (seed, prompt), way in product(work, chosen):
            session.settings = replace(settings, num_draft=way.rows - 1, rule=way.rule)
            session.drafter = drafters[way.drafter]
            if (seed, prompt) == work[0]:  # warm up
                list(session.decode(prompt, way.temperature, True, Statistics(), 0))
            if seed == 0 or way.temperature:
                list(session.decode(prompt, way.temperature, True, results[way], seed))
            progress.update(task, description=f"{way.drafter}, {way.rows} rows", advance=1)
    return [{**asdict(way), **asdict(statistics)} | _rates(statistics) for way, statistics in results.items()]


def _rates(statistics: Statistics) -> dict[str, float]:
    rows = 1 + statistics.proposed / max(1, statistics.request_steps)
    return {
        "tokens_per_step": statistics.tokens_per_step,
        "tokens_per_second": statistics.tokens_per_second,
        "rows_per_step": rows,
    }


def print_text(console: Console, rows: list[dict[str, Any]]) -> None:
    """Tokens a step and speed-up by rows a step; of chains the best within each budget."""
    lines = Lines(
        console, {"T": ">3", "rows": ">4", "way": "<22", "tokens a step": ">13", "speed-up": ">8", "rows used": ">9"}
    )
    for temperature in (0.0, 0.8):
        own = [row for row in rows if row["temperature"] == temperature]
        plain = next(row for row in own if row["drafter"] == "none")
        for budget in BUDGETS:
            chains = [row for row in own if row["drafter"] == "model" and row["rows"] <= budget]
            best = max(chains, key=lambda row: row["tokens_per_step"])
            for row in [best, *(row for row in own if row["drafter"] in TREES and row["rows"] == budget)]:
                name = TREES.get(row["drafter"], f"chain, K = {row['rows'] - 1}, {row['rule']}")
                lines.print(
                    f"{temperature:g}", str(budget), name, f"{row['tokens_per_step']:.2f}",
                    f"{row['tokens_per_second'] / plain['tokens_per_second']:.2f}x", f"{row['rows_per_step']:.1f}",
                )  # fmt: skip


def print_kernels(console: Console, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a case, when it is timed; all of them."""
    lines = Lines(
        console, {"what": "<21", "case": "<17", "us": ">6", "stream": ">6", "PyTorch": ">7", "faster": ">6"}
    )  # fmt: skip
    timed = []
    for row in rows:
        times = row["microseconds"]
        shown = [f"{times[name]:,.0f}" if name in times else "" for name in ("fused", "stream")]
        lean = min((times[name] for name in LEAN if name in times), default=None)
        shown += ["", ""] if lean is None else [f"{lean:,.0f}", f"{lean / times['fused']:.0f}x"]
        lines.print(row["what"], row["case"].removeprefix(f"V={VOCAB} "), *shown)
        timed.append(row)
    return timed


def main(out: Path | None, console: Console) -> None:
    """Time the kernels, then the text; print both."""
    require_floor()
    kernels = print_kernels(console, chain(masks(), keys_and_values(), verification()))
    decoded = text()
    print_text(console, decoded)
    console.print(f"{mean(row['invalid'] for row in decoded):g} invalid rows")
    save(out, "trees", machine(), kernels=kernels, text=decoded)
