"""Hold a backend against the float64 oracle, decision by decision.

    python -m specdec_kernels.selftest cpu

The oracle uses the same noise, so a backend must return its tokens wherever no decision was closer than
:data:`EPSILON`; nothing here is a matter of chance.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import oracle
from specdec_kernels.ops import BACKENDS, BackendName, noise_words, sample, verify_chain

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
    """One batch, with everything on the CPU."""

    target: Tensor
    tokens: Tensor
    draft: Tensor | None
    stats: Tensor | None
    seed: Tensor
    position: Tensor
    num_draft: Tensor | None
    temperature: Tensor

    def arguments(self, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What :func:`specdec_kernels.verify_chain` takes."""

        def to(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        named = {name: to(getattr(self, name)) for name in ("seed", "position", "num_draft", "temperature")}
        return tuple(to(x) for x in (self.target, self.tokens, self.draft, self.stats)), named


def cases(count: int, vocabs: tuple[int, ...] = (2, 5, 127, 128, 129, 300, 1000, 2500)) -> Iterator[Case]:
    """Random batches over vocabularies, dtypes, draft kinds, temperatures, ends of drafts and strides."""
    for index in range(count):
        generator = torch.Generator().manual_seed(index)

        def integers(high: int, *shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randint(0, high, shape, generator=generator)

        vocab, dtype = vocabs[index % len(vocabs)], DTYPES[index // 3 % 3]
        kind = DRAFT_KINDS[index % 3]
        batch, longest = 3, (4, 1, 6, 0)[index // 2 % 4]
        wide = torch.randn(batch, longest + 1, vocab + 3, generator=generator) * 2
        target = wide.to(dtype)[..., :vocab]  # rows with a stride of their own
        draft = (target[:, :longest].float() + torch.randn(batch, longest, vocab, generator=generator) * 0.7).to(dtype)
        seed, position = integers(2**62, batch) - 2**61, integers(2**40, batch)
        temperature = torch.tensor([0.7, 1.0, 0.0, 1.6, 0.02])[integers(5, batch)]
        drawn = sample(
            draft.reshape(batch * longest, vocab),
            seed=seed.repeat_interleave(longest),
            position=position.repeat_interleave(longest),
            row=torch.arange(longest).repeat(batch),
            temperature=temperature.repeat_interleave(longest) if kind == "statistics" else 1.0,
            backend="reference",
        )
        tokens = drawn.tokens.reshape(batch, longest)
        if index % 4 == 3 and longest > 1:
            tokens[0, integers(longest, 1)] = -1
        yield Case(
            target,
            tokens.int() if index % 5 == 0 else tokens,
            None if kind == "point mass" else draft,
            drawn.stats.reshape(batch, longest, 3) if kind == "statistics" else None,
            seed,
            position,
            integers(longest + 1, batch) if index % 7 == 0 else None,
            temperature,
        )


def expected(case: Case, request: int) -> oracle.Verified:
    """What the oracle says of one request."""

    def array(x: Tensor | None) -> Any:
        return None if x is None else x[request].double().numpy()

    tokens = case.tokens[request].tolist()
    if case.num_draft is not None:
        tokens = tokens[: int(case.num_draft[request])]
    if -1 in tokens:
        tokens = tokens[: tokens.index(-1)]
    noise = oracle.Noise(int(case.seed[request]), int(case.position[request]))
    return oracle.verify_chain(
        array(case.target), tokens, array(case.draft), array(case.stats), noise, float(case.temperature[request])
    )


@dataclass
class Report:
    """How a backend did: decisions closer than :data:`EPSILON` are counted, not judged."""

    requests: int = 0
    too_close: int = 0
    wrong: list[str] = field(default_factory=list)

    def compare(self, what: str, got: object, want: object, margin: float) -> None:
        """Count one comparison."""
        self.requests += 1
        if margin < EPSILON:
            self.too_close += 1
        elif got != want:
            self.wrong.append(f"{what}: got {got}, the oracle has {want} with margin {margin:.2g}")


def run(backend: BackendName | None = None, device: str = "cpu", count: int = 120) -> Report:
    """The coupled suite: ``sample`` and ``verify_chain`` over :func:`cases`."""
    report = Report()
    if not known_answers(backend, device):
        report.wrong.append("the Philox known answers are wrong")
    for index, case in enumerate(cases(count)):
        positional, named = case.arguments(device)
        verified = verify_chain(*positional, **named, backend=backend)
        rows = case.target[:, 0]
        drawn = sample(
            rows.to(device),
            seed=named["seed"],
            position=named["position"],
            row=index,
            temperature=named["temperature"],
            backend=backend,
        )
        for request in range(len(rows)):
            want = expected(case, request)
            padding = [-1] * (case.target.shape[1] - len(want.tokens))
            got = (
                verified.tokens[request].tolist(),
                int(verified.num_accepted[request]),
                bool(verified.valid[request]),
            )
            report.compare(
                f"verify_chain case {index} request {request}",
                got,
                (want.tokens + padding, want.num_accepted, want.valid),
                want.margin,
            )
            noise = oracle.Noise(int(case.seed[request]), int(case.position[request]))
            one = oracle.sample(rows[request].double().numpy(), noise, index, float(case.temperature[request]))
            report.compare(f"sample case {index} row {request}", int(drawn.tokens[request]), one.token, one.margin)
            scalars = torch.tensor([*one.stats, one.logprob])
            if not torch.allclose(
                torch.cat([drawn.stats[request], drawn.logprobs[request, None]]).cpu(), scalars, rtol=1e-5, atol=1e-5
            ):
                report.wrong.append(
                    f"sample case {index} row {request}: scalars {drawn.stats[request].tolist()}, want {scalars}"
                )
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
