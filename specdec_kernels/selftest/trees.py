"""``sample_children`` and ``verify_tree`` against the oracle, on random trees over everything there is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import oracle
from specdec_kernels.contract import Children, TreeRule
from specdec_kernels.ops import BackendName
from specdec_kernels.ops.tree_rules import CHILDREN, ChildrenName, SiblingsName, sample_children, verify_tree
from specdec_kernels.ops.validate import LOGIT_DTYPES
from specdec_kernels.selftest.common import (
    BATCH,
    DRAFT_KINDS,
    EVERYTHING,
    ROW_OPTIONS,
    Report,
    Selection,
    moved,
    oracle_processing,
    oracle_sampling,
    random_filters,
    random_processing,
)

#: Children of a node at most.
WIDEST = 3

#: Small ones, where siblings take much of each other's probability, and some with an end inside a tile.
VOCABS = (2, 5, 130, 8, 300, 4, 1000, 12)


@dataclass(frozen=True)
class Case:
    """One batch, with everything on the CPU: the arguments of :func:`specdec_kernels.verify_tree`."""

    target: Tensor
    tokens: Tensor
    parents: Tensor
    draft: Tensor | None
    stats: Tensor | None
    options: Mapping[str, Any]

    def arguments(self, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named, on ``device``."""
        named = {name: moved(value, device) for name, value in self.options.items()}
        return tuple(moved(x, device) for x in (self.target, self.tokens, self.parents, self.draft, self.stats)), named


def random_parents(rng: random.Random, nodes: int) -> list[int]:
    """A tree of at most so many nodes, the children of a node side by side, padded."""
    parents, at = [-1], 0
    while at < len(parents) < nodes:
        parents += [at] * min(rng.choice((0 if at else WIDEST, 1, 2, WIDEST)), nodes - len(parents))
        at += 1
    return parents + [-1] * (nodes - len(parents))


def cases(count: int, vocabs: tuple[int, ...] = VOCABS, selection: Selection = EVERYTHING) -> Iterator[Case]:
    """Random batches: rules, kinds of children, filters, processing, dtypes, ragged trees, rows that are not usable."""
    for index, form in selection.of(count):
        rng, values, generator = random.Random(~form), random.Random(index), torch.Generator().manual_seed(index)
        vocab, dtype, rule = rng.choice(vocabs), rng.choice(LOGIT_DTYPES), list(TreeRule)[form % len(TreeRule)]
        kind, nodes = DRAFT_KINDS[form // 4 % 3], rng.choice((4, 9, 14, 1 if form % 8 == 0 else 14))
        siblings: SiblingsName = rng.choice(("iid", "without_replacement"))
        parents = torch.tensor([random_parents(values, nodes) for _ in range(BATCH)])
        target = (torch.randn(BATCH, nodes, vocab + 3, generator=generator) * 2).to(dtype)[..., :vocab]
        apart = rng.choice((0.7, 2.0))
        draft = (target.float() + torch.randn(BATCH, nodes, vocab, generator=generator) * apart).to(dtype)
        seed = torch.randint(-(2**61), 2**61, (BATCH,), generator=generator)
        position = torch.randint(0, 2**40, (BATCH,), generator=generator)
        temperature = torch.tensor([0.7, 1.0, 1.0, 1.6, 1.2, 0.02, 0.0])[
            torch.randint(0, 7, (BATCH,), generator=generator)
        ]
        draft_temperature = torch.tensor([1.0, 0.6, 0.0])[torch.randint(0, 3, (BATCH,), generator=generator)]
        options: dict[str, Any] = {"temperature": draft_temperature.repeat_interleave(nodes)}
        if kind == "statistics":
            options = {
                "temperature": temperature.repeat_interleave(nodes),
                "top_k": rng.choice([None, vocab // 2 + 1]),
            }
        first = (parents[:, None, :] < torch.arange(nodes)[:, None]).sum(-1) - 1  # node - 1 of the first child
        method: ChildrenName = "top" if kind == "point mass" else "race" if rule == TreeRule.COUPLED else siblings
        drawn = sample_children(
            draft.reshape(BATCH * nodes, vocab),
            WIDEST,
            method,
            seed=seed.repeat_interleave(nodes),
            position=position.repeat_interleave(nodes),
            row=first.clamp(min=0).flatten(),
            backend="reference",
            **options,
        )
        drawn_tokens = drawn.tokens.reshape(BATCH, nodes, WIDEST)
        tokens = torch.full((BATCH, nodes), -1)
        for b in range(BATCH):
            for node in range(1, nodes):
                up = int(parents[b, node])
                if up >= 0:  # a distribution that has no more children to give gets one it does not know
                    place = int((parents[b, 1:node] == up).sum())
                    tokens[b, node] = drawn_tokens[b, up, place].clamp(min=0)
        if index % 11 == 5:
            (target if values.random() < 0.5 else draft)[0, values.randrange(nodes), 0] = torch.nan
        options = {
            "seed": seed,
            "position": position,
            "draft_temperature": draft_temperature if kind == "dense" else None,
            "temperature": temperature,
            **random_filters(values, vocab),
            **random_processing(rng, vocab, (BATCH, nodes), generator),
            "rule": rule.name.lower(),
            "siblings": siblings,
            "logprobs": rng.random() < 0.5,
        }
        yield Case(
            target,
            tokens.int() if form % 5 == 0 else tokens,
            parents,
            None if kind == "point mass" else draft,
            drawn.stats.reshape(BATCH, nodes, 3) if kind == "statistics" else None,
            options,
        )


def expected(case: Case, request: int) -> oracle.Verified:
    """What the oracle says of one request."""
    options = case.options
    live = 1 + int((case.parents[request] >= 0).sum())

    def array(x: Tensor | None) -> Any:
        return None if x is None else x[request].double().numpy()

    bitmask = options["bitmask"]
    return oracle.verify_tree(
        array(case.target),
        case.tokens[request, :live].tolist(),
        case.parents[request, :live].tolist(),
        array(case.draft),
        array(case.stats),
        oracle.Noise(int(options["seed"][request]), int(options["position"][request])),
        oracle_sampling(options, request),
        oracle_processing(options, request, None if bitmask is None else bitmask[request], case.target.shape[-1]),
        TreeRule[options["rule"].upper()],
        options["siblings"] == "iid",
        1.0 if options["draft_temperature"] is None else float(options["draft_temperature"][request]),
    )


def check_verified(report: Report, case: Case, index: int, backend: BackendName | None, device: str) -> None:
    """``verify_tree`` of one batch."""
    positional, named = case.arguments(device)
    verified = verify_tree(*positional, **named, backend=backend)
    for request in range(BATCH):
        want = expected(case, request)
        name = f"verify_tree case {index} request {request} ({case.options['rule']}, {case.options['siblings']})"
        padding = case.tokens.shape[1] - len(want.tokens)
        got = [verified.tokens, verified.nodes, verified.num_accepted, verified.valid]
        right = report.compare(
            name,
            [x[request].tolist() for x in got],
            [want.tokens + [-1] * padding, want.nodes + [-1] * padding, want.num_accepted, want.valid],
            want.margin,
        )
        if case.options["logprobs"] and right:
            for kind, scores in (("logprobs", want.logprobs), ("raw_logprobs", want.raw_logprobs)):
                report.close(f"{name} {kind}", getattr(verified, kind)[request], scores + [torch.nan] * padding)


def check_children(report: Report, case: Case, index: int, backend: BackendName | None, device: str, form: int) -> None:
    """``sample_children`` of the first row of every request."""
    method, count = CHILDREN[form % len(CHILDREN)], 1 + form % 5
    options = {name: case.options[name] for name in ROW_OPTIONS}
    bitmask = case.options["bitmask"]
    options["bitmask"] = None if bitmask is None else bitmask[:, 0]
    rows = case.target[:, 0]
    named = {name: moved(value, device) for name, value in options.items()}
    drawn = sample_children(rows.to(device), count, method, row=index, **named, backend=backend)
    for request in range(BATCH):
        want = oracle.sample_children(
            rows[request].double().numpy(),
            count,
            Children[method.upper()],
            oracle.Noise(int(options["seed"][request]), int(options["position"][request])),
            index,
            oracle_sampling(options, request),
            oracle_processing(options, request, None if bitmask is None else bitmask[request, :1], rows.shape[1]),
        )
        padding = count - len(want.tokens)
        name = f"sample_children case {index} row {request} ({method})"
        if report.compare(name, drawn.tokens[request].tolist(), want.tokens + [-1] * padding, want.margin):
            report.close(f"{name} stats", drawn.stats[request], want.stats)
            report.close(f"{name} logprobs", drawn.logprobs[request], want.logprobs + [torch.nan] * padding)
