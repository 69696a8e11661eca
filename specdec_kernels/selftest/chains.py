"""``sample`` and ``verify_chain`` against the oracle, on random batches over everything there is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import oracle
from specdec_kernels.contract import Rule
from specdec_kernels.ops import BackendName, sample, verify_chain
from specdec_kernels.ops.validate import LOGIT_DTYPES
from specdec_kernels.selftest.common import (
    BATCH,
    DRAFT_KINDS,
    EVERYTHING,
    ROW_OPTIONS,
    VOCABS,
    Report,
    Selection,
    moved,
    oracle_processing,
    oracle_sampling,
    random_filters,
    random_processing,
)


@dataclass(frozen=True)
class Case:
    """One batch, with everything on the CPU: the arguments of :func:`specdec_kernels.verify_chain`."""

    target: Tensor
    tokens: Tensor
    draft: Tensor | None
    stats: Tensor | None
    options: Mapping[str, Any]

    def arguments(self, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named, on ``device``."""
        named = {name: moved(value, device) for name, value in self.options.items()}
        return tuple(moved(x, device) for x in (self.target, self.tokens, self.draft, self.stats)), named

    def rows_of(self, request: int) -> slice:
        """Which rows of a ragged batch are a request's."""
        begin, end = self.options["cu_rows"][request : request + 2].tolist()
        return slice(begin, end)

    def first_rows(self) -> tuple[Tensor, dict[str, Any]]:
        """The first row of every request, and what :func:`specdec_kernels.sample` takes for them."""
        ragged = self.options["cu_rows"]
        first = (slice(None), 0) if ragged is None else ragged[:-1]
        bitmask = self.options["bitmask"]
        options = {name: self.options[name] for name in ROW_OPTIONS}
        return self.target[first], {**options, "bitmask": None if bitmask is None else bitmask[first]}


def cases(count: int, vocabs: tuple[int, ...] = VOCABS, selection: Selection = EVERYTHING) -> Iterator[Case]:
    """Random batches over everything there is: rules, kinds of drafts, filters, processing, layouts, dtypes, ends."""
    for index, form in selection.of(count):
        rng, values, generator = random.Random(form), random.Random(~index), torch.Generator().manual_seed(index)

        def integers(low: int, high: int, *shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        vocab, dtype, rule = vocabs[form % len(vocabs)], rng.choice(LOGIT_DTYPES), list(Rule)[form % len(Rule)]
        kind, longest = DRAFT_KINDS[form // 3 % 3], rng.choice((4, 1, 6, 0))
        wide = torch.randn(BATCH, longest + 1, vocab + 3, generator=generator) * 2
        target = wide.to(dtype)[..., :vocab]  # rows with a stride of their own
        draft = (target[:, :longest].float() + torch.randn(BATCH, longest, vocab, generator=generator) * 0.7).to(dtype)
        seed, position = integers(-(2**61), 2**61, BATCH), integers(0, 2**40, BATCH)
        temperature = torch.tensor([0.7, 1.0, 0.0, 1.6, 0.02])[integers(0, 5, BATCH)]
        draft_temperature = torch.tensor([1.0, 0.6, 0.0])[integers(0, 3, BATCH)]
        drawn_with: dict[str, Any] = {"temperature": draft_temperature.repeat_interleave(longest)}
        if kind == "statistics":
            drawn_with = {
                "temperature": temperature.repeat_interleave(longest),
                "top_k": rng.choice([None, vocab // 2 + 1]),
            }
        drawn = sample(
            draft.reshape(BATCH * longest, vocab),
            seed=seed.repeat_interleave(longest),
            position=position.repeat_interleave(longest),
            row=torch.arange(longest).repeat(BATCH),
            coupled=rule == Rule.COUPLED,
            backend="reference",
            **drawn_with,
        )
        tokens = drawn.tokens.reshape(BATCH, longest)
        if index % 4 == 3 and longest > 1:
            tokens[0, integers(0, longest, 1)] = -1
        counts = integers(1, longest + 2, BATCH)
        ragged = rng.random() < 0.3
        if ragged:
            target = torch.cat([rows[:n] for rows, n in zip(wide.to(dtype), counts.tolist(), strict=True)])[:, :vocab]
        options = {
            "seed": seed,
            "position": position,
            "draft_temperature": draft_temperature if kind == "dense" else None,
            "cu_rows": torch.cat([counts.new_zeros(1), counts.cumsum(0)]) if ragged else None,
            "num_draft": integers(0, longest + 1, BATCH) if form % 7 == 0 else None,
            "temperature": temperature,
            **random_filters(values, vocab),
            **random_processing(rng, vocab, tuple(target.shape[:-1]), generator),
            "rule": rule.name.lower(),
            "logprobs": rng.random() < 0.5,
            "count_independent": rule != Rule.BLOCK and rng.random() < 0.5,
        }
        yield Case(
            target,
            tokens.int() if form % 5 == 0 else tokens,
            None if kind == "point mass" else draft,
            drawn.stats.reshape(BATCH, longest, 3) if kind == "statistics" else None,
            options,
        )


def expected(case: Case, request: int) -> oracle.Verified:
    """What the oracle says of one request."""
    options, tokens = case.options, case.tokens[request].tolist()
    rows: int | slice = request
    if options["cu_rows"] is not None:
        rows = case.rows_of(request)
        tokens = tokens[: rows.stop - rows.start - 1]
    if options["num_draft"] is not None:
        tokens = tokens[: int(options["num_draft"][request])]
    if -1 in tokens:
        tokens = tokens[: tokens.index(-1)]

    def array(x: Tensor | None) -> Any:
        return None if x is None else x[request].double().numpy()

    target, bitmask = case.target[rows].double().numpy(), options["bitmask"]
    return oracle.verify_chain(
        target,
        tokens,
        array(case.draft),
        array(case.stats),
        oracle.Noise(int(options["seed"][request]), int(options["position"][request])),
        oracle_sampling(options, request),
        oracle_processing(options, request, None if bitmask is None else bitmask[rows], target.shape[1]),
        Rule[options["rule"].upper()],
        1.0 if options["draft_temperature"] is None else float(options["draft_temperature"][request]),
    )


def check_verified(report: Report, case: Case, index: int, backend: BackendName | None, device: str) -> None:
    """``verify_chain`` of one batch."""
    positional, named = case.arguments(device)
    verified = verify_chain(*positional, **named, backend=backend)
    for request in range(BATCH):
        want, name = expected(case, request), f"verify_chain case {index} request {request} ({case.options['rule']})"
        padding = case.tokens.shape[1] + 1 - len(want.tokens)
        got = [verified.tokens, verified.num_accepted, verified.valid, verified.num_proposed]
        right = report.compare(
            name,
            [x[request].tolist() for x in got],
            [want.tokens + [-1] * padding, want.num_accepted, want.valid, want.num_proposed],
            want.margin,
        )
        independent = int(verified.num_independent[request])
        if case.options["count_independent"]:
            report.compare(f"{name} alone", independent, want.num_independent, want.independent_margin)
        if case.options["logprobs"] and right:
            for kind, scores in (("logprobs", want.logprobs), ("raw_logprobs", want.raw_logprobs)):
                report.close(f"{name} {kind}", getattr(verified, kind)[request], scores + [torch.nan] * padding)


def check_sampled(report: Report, case: Case, index: int, backend: BackendName | None, device: str) -> None:
    """``sample`` of the first row of every request."""
    rows, options = case.first_rows()
    coupled = case.options["rule"] == "coupled"
    named = {name: moved(value, device) for name, value in options.items()}
    drawn = sample(rows.to(device), row=index, coupled=coupled, **named, backend=backend)
    for request in range(BATCH):
        bitmask = options["bitmask"]
        want = oracle.sample(
            rows[request].double().numpy(),
            oracle.Noise(int(options["seed"][request]), int(options["position"][request])),
            index,
            oracle_sampling(options, request),
            oracle_processing(options, request, None if bitmask is None else bitmask[request, None], rows.shape[1]),
            coupled,
        )
        name = f"sample case {index} row {request}"
        if report.compare(name, int(drawn.tokens[request]), want.token, want.margin):
            scalars = torch.cat([drawn.stats[request], drawn.logprobs[request, None]])
            report.close(f"{name} scalars", scalars, [*want.stats, want.logprob])
