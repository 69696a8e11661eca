"""``verify_chain_lm_head`` against the oracle, which is given the logits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec_kernels import oracle
from specdec_kernels.ops import BackendName, sample
from specdec_kernels.ops.head import verify_chain_lm_head
from specdec_kernels.selftest.common import BATCH, DRAFT_KINDS, DTYPES, EVERYTHING, Report, Selection, moved

WIDTHS = (1, 64, 70, 200)


class Case(NamedTuple):
    """One batch, on the CPU."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    """Their product, float32."""
    tokens: Tensor
    draft: Tensor | None
    stats: Tensor | None
    options: dict[str, Tensor]
    draft_temperature: float | None


def cases(count: int, vocabs: tuple[int, ...], selection: Selection = EVERYTHING) -> Iterator[Case]:
    """Random batches: shapes, strides, dtypes, kinds of drafts, temperatures."""
    for index, form in selection.of(count):
        rng, generator = random.Random(form), torch.Generator().manual_seed(index)
        vocab, width, dtype = vocabs[form % len(vocabs)], rng.choice(WIDTHS), rng.choice(DTYPES)
        kind, longest = DRAFT_KINDS[form % len(DRAFT_KINDS)], rng.choice((4, 1, 6, 0))

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        # Rows with a stride of their own.
        hidden = normal(BATCH, longest + 1, width + 3).to(dtype)[..., :width]
        weight = (normal(vocab, width + 2) * 2 / width**0.5).to(dtype)[:, :width]
        target = torch.nn.functional.linear(hidden.double(), weight.double()).float()
        draft = target[:, :longest] + normal(BATCH, longest, vocab) * 0.6
        keys: dict[str, Any] = {"seed": torch.arange(BATCH) + 1000 * index, "position": torch.arange(BATCH) * 7}
        heat = 0.8 if kind == "statistics" else 1.0
        drawn = [sample(draft[:, i], row=i, temperature=heat, **keys, backend="reference") for i in range(longest)]
        empty = torch.empty((BATCH, 0), dtype=torch.int64)
        tokens = torch.stack([d.tokens for d in drawn], 1) if drawn else empty
        stats = torch.stack([d.stats for d in drawn], 1) if drawn else torch.empty((BATCH, 0, 3))
        temperature = torch.tensor([0.7, 1.0, 0.0, 1.6])[torch.randint(0, 4, (BATCH,), generator=generator)]
        num_draft = torch.randint(0, longest + 1, (BATCH,), generator=generator)
        given = {"point mass": (None, None), "dense": (draft, None), "statistics": (draft, stats)}[kind]
        options = {**keys, "temperature": temperature, "num_draft": num_draft}
        yield Case(hidden, weight, target, tokens, *given, options, 1.0 if kind == "dense" else None)


def expected(case: Case, request: int) -> oracle.Verified:
    """What the oracle says of one request."""
    options = case.options
    drafted = int(options["num_draft"][request])

    def array(x: Tensor | None, rows: int) -> Any:
        return None if x is None else x[request, :rows].double().numpy()

    return oracle.verify_chain(
        array(case.target, drafted + 1),
        case.tokens[request, :drafted].tolist(),
        array(case.draft, drafted),
        array(case.stats, drafted),
        oracle.Noise(int(options["seed"][request]), int(options["position"][request])),
        oracle.Sampling(temperature=float(options["temperature"][request])),
    )


def check(report: Report, case: Case, index: int, backend: BackendName | None, device: str) -> None:
    """``verify_chain_lm_head`` of one batch."""
    positional = [moved(x, device) for x in (case.hidden, case.weight, case.tokens, case.draft, case.stats)]
    named: dict[str, Any] = {name: moved(x, device) for name, x in case.options.items()}
    verified = verify_chain_lm_head(*positional, **named, draft_temperature=case.draft_temperature, backend=backend)
    for request in range(BATCH):
        want = expected(case, request)
        padding = case.tokens.shape[1] + 1 - len(want.tokens)
        got = [x[request].tolist() for x in (verified.tokens, verified.num_accepted, verified.valid)]
        right = [want.tokens + [-1] * padding, want.num_accepted, want.valid]
        report.compare(f"verify_chain_lm_head case {index} request {request}", got, right, want.margin)
