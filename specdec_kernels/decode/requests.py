"""Requests in flight, and how their tokens are drawn."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF
from specdec_kernels.decode.protocols import Draft, TreeDraft
from specdec_kernels.ops import LogitBias, Penalties, validate

#: What may follow: int32 [ceil(V/32)] in xgrammar's layout, from the tokens generated so far, drafts among them.
Grammar = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn; see :func:`specdec_kernels.sample` for what each means.

    Raises:
        TypeError, ValueError: naming the parameter, what was expected and what came.
    """

    temperature: float = 0.0
    top_k: int = TOP_K_OFF
    top_p: float = TOP_P_OFF
    min_p: float = MIN_P_OFF
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """By token id."""
    grammar: Grammar | None = None
    """Called for every row of a step, with the text that the row continues."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency"):
            if isinstance(value := getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a number, got {validate.describe(value)}")
            validate.parameter(name, value, 1, "B")
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        if self.grammar is not None and not callable(self.grammar):
            raise TypeError(f"grammar must be a function of the tokens generated, got {self.grammar!r}")

    @property
    def penalised(self) -> bool:
        """Whether any penalty is on."""
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)


@dataclass
class Request:
    """A request in flight."""

    index: int
    prompt: Sequence[int]
    seed: int
    max_new_tokens: int
    sampling: Sampling
    generated: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Tokens so far: the absolute index of the next one."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.max_new_tokens - len(self.generated)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for every request, or a list of one each."""
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} prompts, got {len(value)}")
        return list(value)
    return [value] * count


def requests(
    prompts: Sequence[Sequence[int]], seed: Any, max_new_tokens: Any, sampling: Mapping[str, Any]
) -> list[Request]:
    """Check the options of a batch, each one for all or a list, and make its requests."""
    count = len(prompts)
    known = [f.name for f in fields(Sampling)]
    for name in sampling:
        if name not in known:
            raise TypeError(f"sampling parameters must be among {known}, got {name!r}")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts must not be empty, got an empty prompt at index {index}")
    columns = {name: _each(name, value, count) for name, value in sampling.items()}
    seeds, limits = _each("seed", seed, count), _each("max_new_tokens", max_new_tokens, count)
    made = []
    for index, (own_seed, limit) in enumerate(zip(seeds, limits, strict=True)):
        if own_seed is None:
            own_seed = secrets.randbits(63)
        if not isinstance(own_seed, int):
            raise TypeError(f"seed must be an int, a list of int, or None, got {own_seed!r}")
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {limit!r}")
        own = Sampling(**{name: column[index] for name, column in columns.items()})
        made.append(Request(index, prompts[index], own_seed, limit, own))
    return made


# --- as the operators take them ---------------------------------------------------------------------------------------


def filters(batch: Sequence[Request]) -> dict[str, Any]:
    """Temperature and filters: one for all where they are equal, else one of each a request."""
    samplings = [request.sampling for request in batch]
    columns: dict[str, list[Any]] = {"temperature": [float(s.temperature) for s in samplings]}
    columns |= {name: [getattr(s, name) for s in samplings] for name in ("top_k", "top_p", "min_p")}
    alike = {name: all(value == values[0] for value in values) for name, values in columns.items()}
    return {name: values[0] if alike[name] else torch.tensor(values) for name, values in columns.items()}


def processing(batch: Sequence[Request], draft: Draft | TreeDraft, vocab: int) -> dict[str, Any]:
    """Penalties, bias and masks for the rows of one step."""
    samplings = [request.sampling for request in batch]
    arguments: dict[str, Any] = {}
    if any(s.penalised for s in samplings):
        strengths = {
            name: torch.tensor([float(getattr(s, name)) for s in samplings])
            for name in ("repetition", "presence", "frequency")
        }
        texts = (_padded([request.prompt for request in batch]), _padded([request.generated for request in batch]))
        arguments["penalties"] = Penalties(*texts, **strengths)
    if any(s.logit_bias for s in samplings):
        arguments["logit_bias"] = LogitBias(
            _padded([list(s.logit_bias) for s in samplings]),
            _padded([list(s.logit_bias.values()) for s in samplings], 0.0),
        )
    if any(s.grammar is not None for s in samplings):
        arguments["bitmask"] = _masks(batch, draft if isinstance(draft, TreeDraft) else TreeDraft.of(draft), vocab)
    return arguments


def _padded(rows: Sequence[Sequence[Any]], padding: float = -1) -> Tensor:
    longest = max(map(len, rows))
    padded = [[*row, *[padding] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64 if isinstance(padding, int) else torch.float32)


def _masks(batch: Sequence[Request], draft: TreeDraft, vocab: int) -> Tensor:
    """What the grammars allow after each node, int32 [B, N, ceil(V/32)]; everything after a node that is not allowed,
    since it is rejected."""
    masks = torch.full((*draft.tokens.shape, -(-vocab // 32)), -1, dtype=torch.int32)
    for slot, request in enumerate(batch):
        if request.sampling.grammar is None:
            continue
        texts: dict[int, list[int]] = {0: list(request.generated)}
        masks[slot, 0] = request.sampling.grammar(texts[0])
        for node, (token, up) in enumerate(zip(draft.tokens[slot].tolist(), draft.parents[slot].tolist(), strict=True)):
            if up in texts and int(masks[slot, up, token // 32]) >> token % 32 & 1:
                texts[node] = [*texts[up], token]
                masks[slot, node] = request.sampling.grammar(texts[node])
    return masks
