"""What is timed: this package, PyTorch in several ways, transformers, and reading the rows.

PyTorch's ways give how many drafts of each request are accepted, and the token behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels import Verified, verify_chain
from specdec_kernels.bench.cases import FILTERS, TEMPERATURE, Case, Inputs
from specdec_kernels.bench.machine import require_floor
from specdec_kernels.contract import TILE
from specdec_kernels.ops.backends import BACKENDS

Contender = Callable[[Case, Inputs], Any]
#: The same, made ready: what is timed is the call alone.
Prepared = Callable[[Case, Inputs], Callable[[], Any]]
#: Of rows of weights, which it may overwrite, an id each.
Draw = Callable[[Tensor], Tensor]


def fused(case: Case, x: Inputs, backend: Any = None, workspace: Tensor | None = None) -> Verified:
    """The public function."""
    verified: Verified = fused_call(case, x, backend, workspace)()
    return verified


def fused_call(case: Case, x: Inputs, backend: Any = None, workspace: Tensor | None = None) -> Callable[[], Verified]:
    """A call of the public function."""
    draft = (x.draft,) if case.kind == "dense" else (x.draft, x.stats) if case.kind == "statistics" else ()
    temperature = 0.0 if case.kind == "greedy" else TEMPERATURE
    heat = TEMPERATURE if case.kind == "dense" else None
    return partial(
        verify_chain, x.target, x.tokens, *draft, draft_temperature=heat, seed=x.seed, position=x.position,
        temperature=temperature, rule=case.rule, **case.filters, workspace=workspace, backend=backend,
    )  # fmt: skip


def token_rule_call(case: Case, x: Inputs) -> Callable[[], Verified]:
    """The same inputs, under the token rule and without filters: what block rule and filters cost."""
    return fused_call(replace(case, rule="token", filtered=False), x)


def scaled(logits: Tensor, by: float | Tensor = 1 / TEMPERATURE) -> Tensor:
    """Times ``by`` in float32, in place where that is a copy: what the caller passed stays as it is."""
    wide = logits.float()
    return wide * by if wide is logits else wide.mul_(by)


def by_race(weights: Tensor) -> Tensor:
    """An id a row, as ``torch.multinomial`` draws it: an exponential number for every id, and the first wins."""
    return weights.div_(torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)


def by_search(weights: Tensor) -> Tensor:
    """An id a row by the inverse of its distribution: one uniform number a row, looked up among running sums of tiles,
    and then within one. In float64: by sums in float32 most ids of a large vocabulary would never come."""
    rows = weights.reshape(-1, weights.shape[-1])
    if beside := -rows.shape[1] % TILE:
        rows = functional.pad(rows, (0, beside))
    tiles = rows.unflatten(1, (-1, TILE))
    sums = tiles.sum(2, dtype=torch.float64).cumsum(1)
    drawn = (1 - torch.rand_like(sums[:, :1])) * sums[:, -1:]  # not 0, where an id without mass would be found
    tile = torch.searchsorted(sums, drawn)
    inside = tiles[torch.arange(len(rows), device=rows.device), tile[:, 0]].cumsum(1, dtype=torch.float64)
    drawn = torch.minimum(drawn - functional.pad(sums, (1, 0)).gather(1, tile), inside[:, -1:])
    return (tile * TILE + torch.searchsorted(inside, drawn)).view(*weights.shape[:-1], 1)


def batched(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """Natural PyTorch: both softmaxes, every row, then one multinomial."""
    target = torch.softmax(x.target.float() / TEMPERATURE, -1)
    draft = torch.softmax(x.draft.float() / TEMPERATURE, -1)
    target_prob = target[:, :-1].gather(-1, x.tokens[..., None])[..., 0]
    draft_prob = draft.gather(-1, x.tokens[..., None])[..., 0]
    accepted = (torch.rand_like(draft_prob) * draft_prob < target_prob).long().cumprod(1).sum(1)
    rows = torch.arange(case.batch, device=x.target.device)
    residual = (target[rows, accepted] - draft[rows, accepted.clamp(max=case.num_draft - 1)]).clamp(min=0)
    weights = torch.where((accepted < case.num_draft)[:, None], residual, target[:, -1])
    return accepted, torch.multinomial(weights, 1)


def lean_rows(case: Case, x: Inputs, draw: Draw = by_race) -> list[tuple[int, int]]:
    """The leanest for few requests: the draft's logsumexp handed over, row by row, stop at the rejection."""
    verified = []
    for b in range(case.batch):
        uniforms = torch.rand(case.num_draft).tolist()
        tokens, stats = x.tokens[b].tolist(), x.stats[b].tolist()
        accepted = 0
        while True:
            weights = scaled(x.target[b, accepted])
            if accepted == case.num_draft:
                weights.sub_(weights.max()).exp_()
                break
            token, (scale, _cutoff, logsumexp) = tokens[accepted], stats[accepted]
            lse = float(torch.logsumexp(weights, -1))
            ratio = float(weights[token]) - lse - float(x.draft[b, accepted, token]) * scale + logsumexp
            if uniforms[accepted] >= torch.e ** min(0.0, ratio):
                draft = scaled(x.draft[b, accepted], scale).sub_(logsumexp).exp_()
                weights.sub_(lse).exp_().sub_(draft).clamp_(min=0)
                break
            accepted += 1
        verified.append((accepted, int(draw(weights))))
    return verified


def lean_batch(case: Case, x: Inputs, draw: Draw = by_race) -> tuple[Tensor, Tensor]:
    """The leanest for many requests: one logsumexp over all target rows, the residual of one row each."""
    logits = scaled(x.target)
    lse = torch.logsumexp(logits, -1)
    target_logprob = logits[:, :-1].gather(-1, x.tokens[..., None])[..., 0] - lse[:, :-1]
    draft_logit = x.draft.gather(-1, x.tokens[..., None])[..., 0].float()
    draft_logprob = draft_logit * x.stats[..., 0] - x.stats[..., 2]
    accepted = (torch.rand_like(lse[:, 1:]).log() < target_logprob - draft_logprob).long().cumprod(1).sum(1)
    rows, at = torch.arange(case.batch, device=lse.device), accepted.clamp(max=case.num_draft - 1)
    weights = logits[rows, accepted].sub_(lse[rows, accepted, None]).exp_()
    draft = scaled(x.draft[rows, at], x.stats[rows, at, :1]).sub_(x.stats[rows, at, 2:]).exp_()
    weights.sub_(draft.mul_((accepted < case.num_draft)[:, None])).clamp_(min=0)
    return accepted, draw(weights)


def lean_filtered(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """The leanest with top-k and top-p: after ``topk`` nothing is as wide as the vocabulary."""
    top_k, top_p = FILTERS["top_k"], FILTERS["top_p"]
    rows, longest = torch.arange(case.batch, device=x.target.device), case.num_draft
    values, ids = x.target.topk(top_k)
    probs = torch.softmax(values.float() / TEMPERATURE, -1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    target = torch.where(ids[:, :-1] == x.tokens[..., None], probs[:, :-1], 0.0).sum(-1)
    stats = x.stats
    draft_logit = x.draft.gather(-1, x.tokens[..., None])[..., 0].float()
    draft = torch.exp(draft_logit * stats[..., 0] - stats[..., 2])
    accepted = (torch.rand_like(draft) * draft < target).long().cumprod(1).sum(1)
    at = accepted.clamp(max=longest - 1)
    weights, kept = probs[rows, accepted], ids[rows, accepted]
    logits = x.draft[rows, at].gather(-1, kept).float()
    draft = torch.exp(logits * stats[rows, at, :1] - stats[rows, at, 2:])
    draft = draft.masked_fill(logits < stats[rows, at, 1:2], 0.0)
    weights = (weights - draft * (accepted < longest)[:, None]).clamp(min=0)
    return accepted, kept.gather(1, torch.multinomial(weights + 1e-30, 1))


def transformers(case: Case, x: Inputs) -> Any:
    """``_speculative_sampling``, for one request; its logits are already divided by the temperature."""
    from transformers.generation.utils import _speculative_sampling  # seconds, that others need not wait for

    return _speculative_sampling(x.tokens, x.draft, case.num_draft, x.target, False)


def stream_call(case: Case, x: Inputs) -> Callable[[], int]:
    """The floor: read the rows that had to be read, on all threads."""
    return partial(torch.ops.specdec_bench.stream.default, x.target, x.target_rows, x.draft, x.draft_rows)


def later(contender: Contender) -> Prepared:
    """A call of a contender that takes all it needs from the inputs."""
    return lambda case, x: partial(contender, case, x)


def contenders(case: Case) -> dict[str, Prepared]:
    """Who takes part. PyTorch only where the drafts were handed over with their statistics, as it would want them."""
    BACKENDS["cpu"].require(torch.device("cpu"))
    require_floor()
    chosen: dict[str, Prepared] = {"fused": fused_call, "stream": stream_call}
    if not case.plain:
        chosen["token rule"] = token_rule_call
    if case.filtered:
        chosen["lean filtered"] = later(lean_filtered)
    if case.kind == "statistics" and case.plain:
        chosen["batched"] = later(batched)
        for name, lean in (("lean rows", lean_rows), ("lean batch", lean_batch)):
            chosen |= {name: later(lean), f"{name}, searched": later(partial(lean, draw=by_search))}
        if case.batch == 1:
            chosen["transformers"] = later(transformers)
    return chosen
