"""What the self-tests of chains and of trees share: random parameters, the oracle's form of them, the report."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import oracle
from specdec_kernels.ops import BackendName, LogitBias, Penalties, noise_words

#: Relative error of a probability that a backend may have: float32 rounding of logits of up to 60 in a logsumexp of
#: 2^18 terms stays below half of it.
EPSILON = 2e-5

#: Philox4x32-10 known answers (docs/algorithms.md, 11): counter, key, words.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

DRAFT_KINDS = ("point mass", "dense", "statistics")
VOCABS = (2, 5, 127, 128, 129, 300, 1000, 2500)
#: What a draw from the first row of a request takes as its verification does, the mask aside.
ROW_OPTIONS = ("seed", "position", "temperature", "top_k", "top_p", "min_p", "penalties", "logit_bias")
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


def moved(value: Any, device: str) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, LogitBias):
        return LogitBias(*(x.to(device) for x in value))
    if isinstance(value, Penalties):
        return Penalties(**{name: moved(x, device) for name, x in vars(value).items()})
    return value


def random_filters(rng: random.Random, vocab: int) -> dict[str, Any]:
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


def random_processing(
    rng: random.Random, vocab: int, rows: tuple[int, ...], generator: torch.Generator
) -> dict[str, Any]:
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
            ids(5),
            ids(7).int(),
            repetition_penalty=torch.tensor([1.3, 1.0, 0.8]),
            presence_penalty=0.4,
            frequency_penalty=0.25,
        )
    if choice in ("logit_bias", "all"):
        chosen["logit_bias"] = LogitBias(ids(3), torch.randn(BATCH, 3, generator=generator) * 3)
    return chosen


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
            named[name] = _own(getattr(penalties, f"{name}_penalty"), request, None)
    if bias is not None:
        named["bias"] = {}
        for token, value in zip(bias.tokens[request].tolist(), bias.values[request], strict=True):
            if token >= 0:
                named["bias"][token] = float(named["bias"].get(token, 0.0) + value)
    if masks is not None:
        bits = masks[:, :, None] >> torch.arange(32) & 1
        named["allowed"] = bits.flatten(1)[:, :vocab].bool().numpy()
    return oracle.Processing(**named)


@dataclass(frozen=True)
class Selection:
    """Which of the cases one of several processes takes, and in how many forms they come.

    The form of a case is all that Triton compiles a kernel for: dtypes, sizes, rules, and which arguments there are.
    Every case has a form of its own unless ``forms`` says how many there are; then they come again with other values.
    A form is taken by one process, so that none compiles what another one does.
    """

    forms: int | None = None
    process: int = 0
    processes: int = 1

    def of(self, count: int) -> Iterator[tuple[int, int]]:
        """Index and form of the cases among ``count`` that are taken."""
        for index in range(count):
            form = index if self.forms is None else index % self.forms
            if form % self.processes == self.process:
                yield index, form


EVERYTHING = Selection()


def root_line(error: BaseException) -> str:
    """What an error began with, in a line: compilers wrap it in pages of source."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


@dataclass
class Report:
    """How a backend did: decisions closer than :data:`EPSILON` are counted, not judged."""

    requests: int = 0
    too_close: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """What another process found."""
        self.requests += other.requests
        self.too_close += other.too_close
        self.wrong += other.wrong

    def attempt(self, what: str, check: Callable[..., None], *arguments: Any) -> None:
        """``check(self, *arguments)``; where it raises, as when a kernel does not compile, the reason is a line."""
        try:
            check(self, *arguments)
        except Exception as error:
            self.wrong.append(f"{what}: {root_line(error)}")

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
