"""Drafters that draw token after token from a model of their own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.checks import MOST, real, whole
from specdec_kernels.decode.cache import RaggedCache
from specdec_kernels.decode.drafts import Draft, Step, TreeDraft
from specdec_kernels.ops import BackendName, DraftVocabulary, sample
from specdec_kernels.ops.results import DrawnChildren
from specdec_kernels.ops.tree_rules import ChildrenName, sample_children
from specdec_kernels.tensors import padded, to_device


@dataclass(frozen=True)
class DraftConfig:
    """How a model drafts. None of it changes the distribution of the text, only its speed.

    Raises:
        TypeError, ValueError: a value of another type, or out of its range.
    """

    min_confidence: float = 0.0
    """Drafting stops once the model's own probability of all drafts so far, at temperature 1, falls below this. That
    depends on the drafts and their distributions alone, and every token drawn is proposed: docs/algorithms.md, 10. 0
    never stops; anything else waits for the device at every draft."""

    temperature_scale: float = 1.0
    """Drafts are drawn at this times the request's temperature, and passed on with the scalars of that distribution. A
    drafter knows less than its target and spreads its probability wider; drawing colder makes up for it."""

    siblings: int = 0
    """Drafts beside each one of a chain, which end where they are: another token in its place, for one more row in the
    target's pass and none in the drafter's. The chain with them is a tree, and counts as one against ``num_draft``."""

    backend: BackendName | None = None
    """Of :func:`specdec_kernels.sample`."""

    def __post_init__(self) -> None:
        whole("siblings", self.siblings, 0)
        for name in ("min_confidence", "temperature_scale"):
            real(name, getattr(self, name))
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must be in [0, 1], got {self.min_confidence}")
        if not 0 <= self.temperature_scale < float("inf"):
            raise ValueError(f"temperature_scale must be finite and not negative, got {self.temperature_scale}")

    def draft_temperature(self, temperature: Tensor | float) -> Tensor | float:
        """What the drafts of requests of this temperature are drawn at; never more than float32 holds."""
        scaled = temperature * self.temperature_scale
        return scaled.clamp(max=MOST) if isinstance(scaled, Tensor) else min(scaled, MOST)


class AutoregressiveDrafter(Protocol):
    """A drafter with a model of its own; see :class:`~specdec_kernels.decode.Drafter`."""

    config: DraftConfig

    @property
    def feature_layers(self) -> Sequence[int]:
        """As of every drafter."""

    @property
    def siblings(self) -> int:
        """Drafts beside each one of a chain."""

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> AutoregressiveSession:
        """Start a stream."""


def children_method(step: Step) -> ChildrenName:
    """How the children of all requests of a step are drawn: the likeliest tokens where all are greedy."""
    return "top" if step.greedy else "race" if step.coupled else "without_replacement"


def drawn_children(
    rows: Tensor, count: int, row: Tensor | int, step: Step, config: DraftConfig, vocabulary: DraftVocabulary | None
) -> DrawnChildren:
    """Children of nodes by the drafter's logits there, [B * nodes, S], the nodes of a request one after the other;
    ``row`` as :func:`specdec_kernels.sample_children` wants it."""
    method, nodes = children_method(step), len(rows) // len(step.seed)
    each: dict[str, Any] = {name: getattr(step, name) for name in ("seed", "position", "top_k", "top_p", "min_p")}
    each["temperature"] = step.temperature
    if method == "top":  # greedily there would be one child; these are ranked by the model's own probabilities
        each = {"seed": step.seed, "position": step.position}
    elif method == "without_replacement":
        each["temperature"] = config.draft_temperature(step.temperature)
    spread: dict[str, Any] = {
        name: x.repeat_interleave(nodes) if isinstance(x, Tensor) and nodes > 1 else x for name, x in each.items()
    }
    return sample_children(rows, count, method, row=row, draft_to_target=vocabulary, backend=config.backend, **spread)


class AutoregressiveSession(ABC):
    """One stream of a drafter with a model: a cache in step with the histories, and drafts ahead of them.

    Tokens that were committed since the last draft are read together with the first draft's pass, so that K drafts
    take K passes; what was read of the drafts themselves is taken back. A history that is longer than the model's
    context is drafted no more.

    Args:
        drafter_config: how to draft.
        cache: of the model, with nothing in it.
        device: of the model.
        vocabulary: which ids of the target the model has logits for; ``None``: all.
        context: positions that the model has; ``None`` for any number.
        prompts, features: as of :meth:`Drafter.begin`.
    """

    def __init__(
        self,
        drafter_config: DraftConfig,
        cache: RaggedCache,
        device: torch.device,
        vocabulary: DraftVocabulary | None,
        context: int | None,
        prompts: Sequence[Sequence[int]],
        features: Tensor | None,
    ) -> None:
        self.config, self.device, self.vocabulary, self._context = drafter_config, device, vocabulary, context
        self._logits: Tensor | None = None
        self._cache = cache
        self._pending: list[list[int]] = [[] for _ in prompts]
        self._pending_features: list[Tensor] | None = None
        self._exhausted = [False] * len(prompts)  # histories longer than the context
        self._append(*self._read_prompt(prompts, features))
        self._read_ahead()

    @abstractmethod
    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Read rows; the logits [B, S] after the last real row of each request, and its features [B, H]."""

    @abstractmethod
    def advance_tree(
        self, tokens: Tensor, features: Tensor | None, ancestors: Tensor, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        """Read nodes ``tokens [B, R]`` of a tree, ``depth`` tokens behind what was read, that attend to its rows so far
        and their own by ``ancestors [B, R, T]``; ``features [B, R, H]`` are those of their parents. The logits [B, R,
        S] after each and its features."""

    def _depths(self, tokens: Tensor, depth: int) -> Tensor:
        """``depth`` for every node ``tokens [B, R]``, but no position behind the context, where no node is wanted."""
        depths = torch.full_like(tokens, depth)
        if self._context is None:
            return depths
        last = [self._context - 1 - length for length in self._cache.lengths]  # -1 where it is full
        return torch.minimum(depths, to_device(last, torch.int64, self.device)[:, None])

    def drop_tree(self) -> None:
        """Take back the rows of the tree."""
        self._cache.commit_path([[] for _ in self._pending])

    def wanted(self, step: Step) -> list[int]:
        """Drafts wanted of each request: none where there is nothing to draft from, and no more than its context has
        positions for, the last draft not being read."""
        return [
            0 if exhausted or not pending else count if self._context is None else min(count, self._context - read)
            for exhausted, pending, count, read in zip(
                self._exhausted, self._pending, step.num_draft, self._lengths(), strict=True
            )
        ]

    def _lengths(self) -> list[int]:
        """Tokens of each request less one, once what is pending is read."""
        read = zip(self._cache.lengths, self._pending, strict=True)
        return [length + len(pending) - 1 for length, pending in read]

    def read_pending(self) -> tuple[Tensor, Tensor | None]:
        """Read what was committed since the last draft: logits [B, S] after it, and its features [B, H]."""
        counts = [len(pending) for pending in self._pending]
        tokens = padded(self._pending, 0, device=self.device)
        read = self._advance(tokens, self._padded_features(), counts)
        self._pending = [[] for _ in self._pending]
        self._pending_features = None
        return read

    def with_repetitions(self, logits: Tensor, paths: Sequence[Tensor]) -> Tensor:
        """Logits [R, S] with what the drafter knows of the histories themselves: of row r behind the drafts
        ``paths[0][r], paths[1][r], ...``; each request has as many rows, one after the other."""
        return logits

    def _read_prompt(
        self, prompts: Sequence[Sequence[int]], features: Tensor | None
    ) -> tuple[Sequence[Sequence[int]], list[Tensor] | None]:
        """Tokens to read, and the features before them."""
        return prompts, None

    def _append(self, tokens: Sequence[Sequence[int]], features: list[Tensor] | None) -> None:
        """Have tokens read with the next draft, unless they do not fit the context any more."""
        for pending, new in zip(self._pending, tokens, strict=True):
            pending.extend(new)
        if features is not None:
            before = self._pending_features
            self._pending_features = (
                features if before is None else [torch.cat(pair) for pair in zip(before, features, strict=True)]
            )
        if self._context is not None:
            for slot, last in enumerate(self._lengths()):
                self._exhausted[slot] |= last >= self._context
                if self._exhausted[slot]:
                    self._pending[slot] = []
                    if self._pending_features is not None:
                        self._pending_features[slot] = self._pending_features[slot][:0]

    @torch.inference_mode()
    def _read_ahead(self) -> None:
        """Of what is pending all but each request's last token, which the first draft is made of: reading a prompt is
        no part of drafting."""
        pending, features = self._pending, self._pending_features
        ahead = [max(0, len(tokens) - 1) for tokens in pending]
        if not any(ahead):
            return
        self._pending = [tokens[:count] for tokens, count in zip(pending, ahead, strict=True)]
        if features is not None:
            self._pending_features = [each[:count] for each, count in zip(features, ahead, strict=True)]
        self.read_pending()
        self._pending = [tokens[count:] for tokens, count in zip(pending, ahead, strict=True)]
        if features is not None:
            self._pending_features = [each[count:] for each, count in zip(features, ahead, strict=True)]

    @torch.inference_mode()
    def propose(self, step: Step) -> Draft | TreeDraft:
        step = step.to(self.device)
        siblings = self.config.siblings
        width, most = 1 + siblings, self.wanted(step)
        chains = [max(1, count // width) for count in most] if step.length is None else step.length
        wanted = [min(pair) for pair in zip(most, chains, strict=True)]
        longest = max(wanted)
        if longest == 0:
            return Draft.nothing(len(wanted))
        logits, features = self.read_pending()
        committed = self._cache.mark()
        drafts: list[Tensor] = []
        beside: list[Tensor] = []
        stats: list[Tensor] = []
        rows = self._buffer(len(wanted), 1 + longest * width, logits)
        confidence = [1.0] * len(wanted)
        for row in range(longest):
            logits = self.with_repetitions(logits, drafts)
            rows[:, row] = logits
            drawn, distribution = self._drawn(logits, row, step)
            drafts.append(drawn[:, 0])
            beside.append(drawn[:, 1:])
            stats.append(distribution)
            if self.config.min_confidence > 0:
                column = drafts[-1] if self.vocabulary is None else self.vocabulary.target_to_draft[drafts[-1]].long()
                surprise = functional.cross_entropy(logits.float(), column, reduction="none").tolist()
                confidence = [before * math.exp(-s) for before, s in zip(confidence, surprise, strict=True)]
                sure = [value >= self.config.min_confidence for value in confidence]
                wanted = [most if goes_on else min(most, row + 1) for most, goes_on in zip(wanted, sure, strict=True)]
            if row + 1 >= max(wanted):
                break
            previous = None if features is None else features[:, None]
            goes_on = [int(row + 1 < count) for count in wanted]
            logits, features = self._advance(drafts[-1][:, None], previous, goes_on)
        drafted = len(drafts)
        self._cache.restore(committed)
        chain, scalars = torch.stack(drafts, 1), torch.stack(stats, 1)
        if width > 1:
            tokens, parents = _with_siblings(chain.tolist(), torch.stack(beside, 1).tolist(), wanted, most)
            if children_method(step) != "without_replacement":
                return TreeDraft(tokens, parents)
            nodes = tokens.shape[1]
            scalars = functional.pad(scalars, (0, 0, 0, nodes - drafted))
            return TreeDraft(tokens, parents, rows[:, :nodes], scalars, vocabulary=self.vocabulary)
        counts = [drafted] * len(wanted)
        return Draft(chain, rows[:, :drafted], scalars, counts=counts, vocabulary=self.vocabulary).first(wanted)

    def _drawn(self, rows: Tensor, row: int, step: Step) -> tuple[Tensor, Tensor]:
        """What is drafted by rows [B, S], the draft of the chain first: ids [B, 1 + siblings], -1 where there are
        fewer, and the scalars of the distribution [B, 3]."""
        if siblings := self.config.siblings:
            first = row if step.coupled else row * (1 + siblings)  # no two draws share a row
            children = drawn_children(rows, 1 + siblings, first, step, self.config, self.vocabulary)
            return children.tokens, children.stats
        drawn = sample(
            rows,
            seed=step.seed,
            position=step.position,
            row=row,
            temperature=self.config.draft_temperature(step.temperature),
            top_k=step.top_k,
            top_p=step.top_p,
            min_p=step.min_p,
            coupled=step.coupled,
            draft_to_target=self.vocabulary,
            backend=self.config.backend,
        )
        return drawn.tokens[:, None], drawn.stats

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        if features is None:
            self._append(tokens, None)
        else:
            features = features.to(self.device)
            self._append(tokens, [features[slot, : len(new)] for slot, new in enumerate(tokens)])

    def select(self, slots: Sequence[int]) -> None:
        self._cache.select(slots)
        self._pending = [self._pending[slot] for slot in slots]
        self._exhausted = [self._exhausted[slot] for slot in slots]
        if self._pending_features is not None:
            self._pending_features = [self._pending_features[slot] for slot in slots]

    def join(self, other: Self) -> None:
        self._cache.join(other._cache)  # which may refuse
        features = [each if each is None else list(each) for each in (self._pending_features, other._pending_features)]
        known = next((each for each in features if each), None)
        if known is not None:  # a side without features has nothing pending
            sides = zip(features, (self, other), strict=True)
            every = [each or [known[0][:0] for _ in side._pending] for each, side in sides]
            self._pending_features = [*every[0], *every[1]]
        self._pending = self._pending + other._pending
        self._exhausted = self._exhausted + other._exhausted

    def _padded_features(self) -> Tensor | None:
        if self._pending_features is None:
            return None
        if len(self._pending_features) == 1:
            return self._pending_features[0][None]
        return torch.nn.utils.rnn.pad_sequence(self._pending_features, batch_first=True)

    def _buffer(self, batch: int, length: int, logits: Tensor) -> Tensor:
        """Rows [B, K, S] for the draft logits, reused."""
        if self._logits is None or self._logits.shape[0] < batch or self._logits.shape[1] < length:
            self._logits = logits.new_full((batch, length, logits.shape[1]), -torch.inf)
        return self._logits[:batch, :length]


def last_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Of ``x [B, R, ...]`` the last of each request's first ``counts[b]`` rows; any row where there is none."""
    if all(count == x.shape[1] for count in counts):
        return x[:, -1]
    rows = to_device([max(0, count - 1) for count in counts], torch.int64, x.device)
    return x[torch.arange(len(counts), device=x.device), rows]


def _with_siblings(
    chains: Sequence[Sequence[int]],
    beside: Sequence[Sequence[Sequence[int]]],
    lengths: Sequence[int],
    most: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Tokens and parents [B, N] of chains, each cut to its length, and of what lies beside them, as many nodes as are
    wanted at most. The chain comes first, so that what is kept of it stays where it is."""
    trees = []
    for chain, others, length, nodes in zip(chains, beside, lengths, most, strict=True):
        siblings = [(token, up) for up in range(length) for token in others[up] if token >= 0][: nodes - length]
        tokens = [0, *chain[:length], *(token for token, _ in siblings)]
        trees.append((tokens, [-1, *range(length), *(up for _, up in siblings)]))
    return padded([tokens for tokens, _ in trees], 0), padded([parents for _, parents in trees], -1)
