"""Requests in flight, and how their tokens are drawn."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.checks import ids_of, whole
from specdec_kernels.contract import MIN_P_OFF, MIN_TEMPERATURE, PENALTIES, SEEDS, TOP_K_OFF, TOP_P_OFF
from specdec_kernels.decode.prompts import SourcePrompt
from specdec_kernels.ops import LogitBias, Penalties, TokenCounts
from specdec_kernels.tensors import CPU, padded, to_device

#: What may follow: int32 [ceil(V/32)] in xgrammar's layout, from the tokens generated so far, drafts among them.
Grammar = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn; see :func:`specdec_kernels.sample` for what each means.

    Fields:
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters; 0, 1 and 0 are off.
        repetition_penalty, presence_penalty, frequency_penalty: see :class:`specdec_kernels.Penalties`.
        logit_bias: what is added to the logits, by token id.
        grammar: called for every row of a step, with the tokens generated before it; never with what it did not allow,
            nor with what comes after a stop token. It gives int32 [ceil(V/32)], a bit for each id in xgrammar's layout.
            A mask may be narrower than the logits, whose other ids are then not allowed: padded vocabularies.

    Raises:
        TypeError, ValueError: naming the parameter, what was expected and what came.
    """

    temperature: float = 1.0
    top_k: int = TOP_K_OFF
    top_p: float = TOP_P_OFF
    min_p: float = MIN_P_OFF
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", *PENALTIES):
            if isinstance(value := getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a number, got {checks.describe(value)}")
            checks.number(name, value, "B")
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        ids_of("logit_bias", self.logit_bias)
        for token, value in self.logit_bias.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"logit_bias must map token ids to numbers, got {value!r} for {token}")
            if value != -math.inf and not abs(value) <= checks.MOST:
                what = f"{shortened(value)} for {token}"
                raise ValueError(f"logit_bias must be finite in float32, or -inf (never), got {what}")
        if self.grammar is not None and not callable(self.grammar):
            raise TypeError(f"grammar must be a function of the tokens generated, got {self.grammar!r}")

    @property
    def penalised(self) -> bool:
        """Whether any penalty is on."""
        return tuple(getattr(self, name) for name in PENALTIES) != (1.0, 0.0, 0.0)


@dataclass
class Request:
    """A request in flight."""

    index: int
    prompt: Sequence[int]
    seed: int
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Tokens so far: the absolute index of the next one."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.max_new_tokens - len(self.generated)


def make_requests(
    prompts: Any,
    vocab: int,
    seed: Any,
    max_new_tokens: Any,
    sampling: Mapping[str, Any],
    stop_tokens: frozenset[int] = frozenset(),
    min_new_tokens: Any = 0,
    shares_ids: bool = True,
) -> list[Request]:
    """Check the arguments of a batch, each one for all or a list, and make its requests; ``shares_ids`` is what the
    target says.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__iter__"):
        raise TypeError(f"prompts must be a list of lists of token ids, got {shortened(prompts)}")
    every = list(prompts)
    if any(hasattr(prompt, "__index__") and not hasattr(prompt, "__len__") for prompt in every):
        raise TypeError(f"prompts must be a list of lists of token ids, [prompt] for one, got {shortened(every)}")
    histories = [_history(index, prompt, vocab, shares_ids) for index, prompt in enumerate(every)]
    count = len(histories)
    columns = {name: _each(name, value, count) for name, value in sampling.items()}
    seeds, limits = _each("seed", seed, count), _each("max_new_tokens", max_new_tokens, count)
    least = _each("min_new_tokens", min_new_tokens, count)
    made = []
    for index, (own_seed, limit, at_least) in enumerate(zip(seeds, limits, least, strict=True)):
        if own_seed is None:
            own_seed = secrets.randbits(63)
        whole("seed", own_seed, *SEEDS, expected="an int, a list of int, or None")
        whole("max_new_tokens", limit, 1, expected="an int or a list of int")
        whole("min_new_tokens", at_least, expected="an int or a list of int")
        if not 0 <= at_least <= limit:
            raise ValueError(f"min_new_tokens must be in [0, max_new_tokens = {limit}], got {at_least}")
        own = Sampling(**{name: column[index] for name, column in columns.items()})
        ids_of("logit_bias", own.logit_bias, vocab)
        made.append(Request(index, histories[index], own_seed, limit, own, stop_tokens, at_least))
    return made


def _history(index: int, prompt: Any, vocab: int, shares_ids: bool) -> Sequence[int]:
    """The ids of a prompt, with its source if it has one, and whether drafts may be looked up there.

    Raises:
        TypeError, ValueError: they are none, or there are none.
    """
    ids = ids_of(f"prompts[{index}]", prompt, vocab)
    if not ids:
        raise ValueError(f"prompts must not be empty, got an empty prompt at index {index}")
    if not isinstance(prompt, SourcePrompt):
        return ids
    # An id beyond the vocabulary is none of the text's, whatever is said.
    known = isinstance(prompt.source, Tensor) or max(prompt.source) < vocab
    return SourcePrompt(prompt.source, ids, prompt.shares_ids and shares_ids and known)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for every request, or a list of one each."""
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} prompts, got {len(value)}")
        return list(value)
    return [value] * count


class Batch:
    """The requests that go on, and what the operators are told of them, on the target's device."""

    def __init__(self, requests: list[Request], vocab: int, device: torch.device) -> None:
        self.requests = requests
        self._vocab, self._device = vocab, device
        self.seed = to_device([request.seed for request in requests], torch.int64, device)
        self.position = to_device([request.position for request in requests], torch.int64, device)
        """Tokens of each request so far."""
        last = [[(request.generated or request.prompt)[-1]] for request in requests]
        self.last = to_device(last, torch.int64, device)
        """The last of them, [B, 1]."""
        self._counts: TokenCounts | None = None
        if any(request.sampling.penalised for request in requests):
            self._counts = TokenCounts([request.prompt for request in requests], vocab, device)
            self._counts.extend([request.generated for request in requests])
        self._collect()

    def _collect(self) -> None:
        """What depends on the parameters of the requests that go on, and on nothing else."""
        samplings = [request.sampling for request in self.requests]
        self.greedy = all(s.temperature < MIN_TEMPERATURE for s in samplings)
        self.filters: dict[str, Any] = {
            "temperature": self._column([float(s.temperature) for s in samplings]),
            "top_k": self._column([min(s.top_k, checks.MOST_TOP_K) for s in samplings], torch.int64),
            # A smaller one keeps the likeliest token alone too.
            "top_p": self._column([max(float(s.top_p), checks.LEAST) for s in samplings]),
            "min_p": self._column([float(s.min_p) for s in samplings]),
        }
        """Temperature and filters: one for all where they are equal, else one of each a request."""
        self._fixed: dict[str, Any] = {}
        if self._counts is not None:
            strengths = {name: self._column([float(getattr(s, name)) for s in samplings]) for name in PENALTIES}
            self._fixed["penalties"] = Penalties(counts=self._counts, **strengths)
        if any(s.logit_bias for s in samplings):
            self._fixed["logit_bias"] = LogitBias(
                padded([list(s.logit_bias) for s in samplings], -1, device=self._device),
                padded([list(s.logit_bias.values()) for s in samplings], 0.0, torch.float32, self._device),
            )

    def _column(self, values: list[Any], dtype: torch.dtype = torch.float32) -> Any:
        if all(value == values[0] for value in values):
            return values[0]
        return to_device(values, dtype, self._device)

    def processing(self, masks: Tensor | None) -> dict[str, Any]:
        """Penalties, bias and masks for the rows of one step."""
        return self._fixed if masks is None else {**self._fixed, "bitmask": masks.to(self._device, non_blocking=True)}

    @property
    def has_masks(self) -> bool:
        """Whether what may follow must be asked for every row."""
        return any(map(_is_masked, self.requests))

    def masks(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> Tensor:
        """What may follow each node, int32 [B, N, ceil(V/32)]: what the grammars allow, and no stop token before the
        least number of tokens is there; anything after a node that is not allowed, since it is rejected, and after a
        stop token, since nothing follows."""
        words = -(-self._vocab // 32)
        masks = torch.full((len(tokens), len(tokens[0]), words), -1, dtype=torch.int32, device=CPU)
        for slot, request in enumerate(self.requests):
            if not _is_masked(request):
                continue
            histories: dict[int, list[int]] = {0: list(request.generated)}
            masks[slot, 0] = self._allowed(request, histories[0])
            for node, (token, up) in enumerate(zip(tokens[slot], parents[slot], strict=True)):
                ended = node == 0 or up not in histories or token in request.stop_tokens
                if not ended and int(masks[slot, up, token // 32]) >> token % 32 & 1:
                    histories[node] = [*histories[up], token]
                    masks[slot, node] = self._allowed(request, histories[node])
        return masks

    def _allowed(self, request: Request, history: Sequence[int]) -> Tensor:
        """What may follow a history of a request that is masked."""
        if (grammar := request.sampling.grammar) is None:
            mask = torch.full((-(-self._vocab // 32),), -1, dtype=torch.int32, device=CPU)
        else:
            mask = allowed(grammar, list(history), self._vocab)  # its own, to keep or to change
        if len(history) < request.min_new_tokens:
            stops = np.zeros(self._vocab, dtype=bool)
            stops[[token for token in request.stop_tokens if token < self._vocab]] = True
            mask &= ~packed_mask(stops)
        return mask

    def advance(self, tokens: Tensor, num_accepted: Tensor, new: Sequence[Sequence[int]]) -> None:
        """Go on behind what was verified: ``tokens [B, R]``, of each request the first ``num_accepted[b] + 1``, which
        are ``new[b]``."""
        gained = num_accepted.long()[:, None]
        self.last = tokens.gather(1, gained)
        self.position = self.position + gained[:, 0] + 1
        if self._counts is not None:
            self._counts.extend(new)

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only."""
        index = to_device(slots, torch.int64, self._device)
        self.requests = [self.requests[slot] for slot in slots]
        self.seed, self.position, self.last = self.seed[index], self.position[index], self.last[index]
        if self._counts is not None:
            self._counts.select(slots)
        self._collect()


def _is_masked(request: Request) -> bool:
    """Whether anything is kept from following it, as far as it has come."""
    return request.sampling.grammar is not None or len(request.generated) < request.min_new_tokens


def packed_mask(allowed: np.ndarray) -> Tensor:
    """A mask in xgrammar's layout, int32 [ceil(V/32)], of bool [V]; nothing behind the vocabulary."""
    bits = np.packbits(np.pad(allowed, (0, -len(allowed) % 32)), bitorder="little")
    return torch.from_numpy(bits.view(np.int32))


def allowed(grammar: Grammar, history: Sequence[int], vocab: int) -> Tensor:
    """What a grammar allows after a history, int32 [ceil(V/32)], nothing behind the vocabulary.

    Raises:
        TypeError, ValueError: it gave something else.
    """
    words, mask = -(-vocab // 32), grammar(history)
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32:
        raise TypeError(f"grammar must give int32 [{words}], a bit for each id, got {checks.describe(mask)}")
    if mask.numel() != mask.shape[-1] or mask.numel() > words:
        raise ValueError(f"grammar must give at most {words} words for {vocab} ids, got {checks.describe(mask)}")
    allowed = torch.zeros(words, dtype=torch.int32, device=CPU)
    allowed[: mask.numel()] = mask.flatten().cpu()
    if vocab % 32:
        allowed[-1] &= (1 << vocab % 32) - 1
    return allowed
