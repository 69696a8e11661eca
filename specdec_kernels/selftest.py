"""Hold a backend against the float64 oracle, decision by decision.

    python -m specdec_kernels.selftest cpu

The oracle uses the same noise, so a backend must return its tokens wherever no decision was closer than
:data:`EPSILON`; nothing here is a matter of chance.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import oracle
from specdec_kernels.contract import Rule
from specdec_kernels.ops import BACKENDS, BackendName, LogitBias, Penalties, noise_words, sample, verify_chain

#: Relative error of a probability that a backend may have: float32 rounding of logits of up to 60 in a logsumexp of
#: 2^18 terms stays below half of it.
EPSILON = 2e-5

#: Philox4x32-10 known answers (algorithms.md, 11): counter, key, words.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAFT_KINDS = ("point mass", "dense", "statistics")
VOCABS = (2, 5, 127, 128, 129, 300, 1000, 2500)
#: Requests of a batch.
BATCH = 3


def _signed(low: int, high: int) -> int:
    """Two words as the int64 that carries them."""
    value = low | high << 32
    return value - (1 << 64) if value >= 1 << 63 else value


def known_answers(backend: BackendName | None = None, device: str = "cpu") -> bool:
    """Whether a backend gives the Philox known answers bit for bit."""
    for counter, key, expected in KNOWN_ANSWERS:
        seed, position = (torch.tensor([_signed(*x)], device=device) for x in (key, (counter[1], counter[2])))
        words = noise_words(seed, position, counter[3], first=counter[0], counters=1, backend=backend)
        if words[0].tolist() != list(expected):
            return False
    return True


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
        named = {name: _moved(value, device) for name, value in self.options.items()}
        return tuple(_moved(x, device) for x in (self.target, self.tokens, self.draft, self.stats)), named

    def rows_of(self, request: int) -> slice:
        """Which rows of a ragged batch are a request's."""
        begin, end = self.options["cu_rows"][request : request + 2].tolist()
        return slice(begin, end)

    def first_rows(self) -> tuple[Tensor, dict[str, Any]]:
        """The first row of every request, and what :func:`specdec_kernels.sample` takes for them."""
        ragged = self.options["cu_rows"]
        first = (slice(None), 0) if ragged is None else ragged[:-1]
        bitmask = self.options["bitmask"]
        names = ("seed", "position", "temperature", "top_k", "top_p", "min_p", "penalties", "logit_bias")
        options = {name: self.options[name] for name in names}
        return self.target[first], {**options, "bitmask": None if bitmask is None else bitmask[first]}


def _moved(value: Any, device: str) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, LogitBias):
        return LogitBias(*(x.to(device) for x in value))
    if isinstance(value, Penalties):
        return Penalties(**{name: _moved(x, device) for name, x in vars(value).items()})
    return value


def _filters(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Filters for a batch: none, one of them, or all of them with another value for every request."""
    few = {"top_k": max(1, vocab // 3), "top_p": 0.8, "min_p": 0.1}
    choice = rng.choice(["none", *few, "all"])
    if choice != "all":
        return {name: few[name] if name == choice else None for name in few}
    return {
        "top_k": torch.tensor([0, 4, max(1, vocab // 2)]),
        "top_p": torch.tensor([0.95, 1.0, 0.7]),
        "min_p": torch.tensor([0.0, 0.02, 0.05]),
    }


def _processing(rng: random.Random, vocab: int, rows: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """Mask, penalties and bias for a batch: none, one of them, or all."""
    choice = rng.choice(["none", "bitmask", "penalties", "logit_bias", "all"])
    chosen: dict[str, Any] = dict.fromkeys(("bitmask", "penalties", "logit_bias"))

    def ids(length: int) -> Tensor:
        return torch.randint(-1, min(vocab, 40), (BATCH, length), generator=generator)

    if choice in ("bitmask", "all"):
        # Any word but one at the start of each row, so that something is left.
        words = torch.randint(-(2**31), 2**31, (*rows, -(-vocab // 32)), generator=generator, dtype=torch.int64).int()
        words[..., 0] |= 1
        chosen["bitmask"] = words
    if choice in ("penalties", "all"):
        chosen["penalties"] = Penalties(
            ids(5), ids(7).int(), repetition=torch.tensor([1.3, 1.0, 0.8]), presence=0.4, frequency=0.25
        )
    if choice in ("logit_bias", "all"):
        chosen["logit_bias"] = LogitBias(ids(3), torch.randn(BATCH, 3, generator=generator) * 3)
    return chosen


def cases(count: int, vocabs: tuple[int, ...] = VOCABS) -> Iterator[Case]:
    """Random batches over everything there is: rules, kinds of drafts, filters, processing, layouts, dtypes, ends."""
    for index in range(count):
        rng, generator = random.Random(index), torch.Generator().manual_seed(index)

        def integers(low: int, high: int, *shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        vocab, dtype, rule = vocabs[index % len(vocabs)], rng.choice(DTYPES), list(Rule)[index % len(Rule)]
        kind, longest = DRAFT_KINDS[index // 3 % 3], rng.choice((4, 1, 6, 0))
        wide = torch.randn(BATCH, longest + 1, vocab + 3, generator=generator) * 2
        target = wide.to(dtype)[..., :vocab]  # rows with a stride of their own
        draft = (target[:, :longest].float() + torch.randn(BATCH, longest, vocab, generator=generator) * 0.7).to(dtype)
        seed, position = integers(-(2**61), 2**61, BATCH), integers(0, 2**40, BATCH)
        temperature = torch.tensor([0.7, 1.0, 0.0, 1.6, 0.02])[integers(0, 5, BATCH)]
        own_law: dict[str, Any] = {}
        if kind == "statistics":
            own_law = {
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
            **own_law,
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
            "cu_rows": torch.cat([counts.new_zeros(1), counts.cumsum(0)]) if ragged else None,
            "num_draft": integers(0, longest + 1, BATCH) if index % 7 == 0 else None,
            "temperature": temperature,
            **_filters(rng, vocab),
            **_processing(rng, vocab, tuple(target.shape[:-1]), generator),
            "rule": rule.name.lower(),
            "logprobs": rng.random() < 0.5,
            "independent": rule != Rule.BLOCK and rng.random() < 0.5,
        }
        yield Case(
            target,
            tokens.int() if index % 5 == 0 else tokens,
            None if kind == "point mass" else draft,
            drawn.stats.reshape(BATCH, longest, 3) if kind == "statistics" else None,
            options,
        )


# --- what the oracle says ---------------------------------------------------------------------------------------------


def _own(value: Any, request: int, default: Any) -> Any:
    """A request's own sampling parameter."""
    if value is None:
        return default
    return value[request].item() if isinstance(value, Tensor) else value


def oracle_sampling(options: Mapping[str, Any], request: int) -> oracle.Sampling:
    """Temperature and filters of one request."""
    off = oracle.Sampling()
    names = ("temperature", "top_k", "top_p", "min_p")
    return oracle.Sampling(**{name: _own(options.get(name), request, getattr(off, name)) for name in names})


def oracle_processing(options: Mapping[str, Any], request: int, masks: Tensor | None, vocab: int) -> oracle.Processing:
    """Mask, penalties and bias of one request; ``masks [rows, ceil(V/32)]`` are its own."""
    named: dict[str, Any] = {}
    penalties, bias = options.get("penalties"), options.get("logit_bias")
    if penalties is not None:
        for name in ("prompt", "output"):
            named[name] = [t for t in getattr(penalties, name)[request].tolist() if t >= 0]
        for name in ("repetition", "presence", "frequency"):
            named[name] = _own(getattr(penalties, name), request, None)
    if bias is not None:
        named["bias"] = {}
        for token, value in zip(bias.tokens[request].tolist(), bias.values[request], strict=True):
            if token >= 0:
                named["bias"][token] = float(named["bias"].get(token, 0.0) + value)
    if masks is not None:
        bits = masks[:, :, None] >> torch.arange(32) & 1
        named["allowed"] = bits.flatten(1)[:, :vocab].bool().numpy()
    return oracle.Processing(**named)


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
    )


@dataclass
class Report:
    """How a backend did: decisions closer than :data:`EPSILON` are counted, not judged."""

    requests: int = 0
    too_close: int = 0
    wrong: list[str] = field(default_factory=list)

    def compare(self, what: str, got: object, want: object, margin: float) -> bool:
        """Count one comparison; whether it was clear and right."""
        self.requests += 1
        if margin < EPSILON:
            self.too_close += 1
        elif got != want:
            self.wrong.append(f"{what}: got {got}, the oracle has {want} with margin {margin:.2g}")
        return margin >= EPSILON and got == want

    def close(self, what: str, got: Tensor, want: Any) -> None:
        """Compare numbers within 1e-5."""
        want = torch.as_tensor(want, dtype=torch.float32)
        if not torch.allclose(got.cpu(), want, rtol=1e-5, atol=1e-5, equal_nan=True):
            self.wrong.append(f"{what}: got {got.tolist()}, the oracle has {want.tolist()}")


def _check_verified(report: Report, case: Case, index: int, backend: BackendName | None, device: str) -> None:
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
        if case.options["independent"]:
            report.compare(f"{name} alone", independent, want.num_independent, want.independent_margin)
        if case.options["logprobs"] and right:
            for kind, scores in (("logprobs", want.logprobs), ("raw_logprobs", want.raw_logprobs)):
                report.close(f"{name} {kind}", getattr(verified, kind)[request], scores + [torch.nan] * padding)


def _check_sampled(report: Report, case: Case, index: int, backend: BackendName | None, device: str) -> None:
    rows, options = case.first_rows()
    coupled = index % 4 == 1
    moved = {name: _moved(value, device) for name, value in options.items()}
    drawn = sample(rows.to(device), row=index, coupled=coupled, **moved, backend=backend)
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


def run(backend: BackendName | None = None, device: str = "cpu", count: int = 120) -> Report:
    """The coupled suite: ``sample`` and ``verify_chain`` over :func:`cases`."""
    report = Report()
    if not known_answers(backend, device):
        report.wrong.append("the Philox known answers are wrong")
    for index, case in enumerate(cases(count)):
        _check_verified(report, case, index, backend, device)
        _check_sampled(report, case, index, backend, device)
    return report


def main(backends: list[str]) -> None:
    """Print a line for each backend; fail if one is wrong."""
    failed = False
    for name in backends or [name for name, backend in BACKENDS.items() if not backend.reason]:
        BACKENDS[name].require(torch.device("cpu"))
        report = run(name)  # type: ignore[arg-type]
        print(f"{name} ({BACKENDS[name].detail}): {report.requests} compared, {report.too_close} too close to call, "
              f"{len(report.wrong)} wrong")  # fmt: skip
        failed |= bool(report.wrong)
        for line in report.wrong[:10]:
            print("  " + line)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
