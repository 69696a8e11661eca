"""Drafters that draw token after token from a model of their own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.protocols import Draft, Step, TreeDraft
from specdec_kernels.decode.ragged_cache import RaggedCache
from specdec_kernels.decode.targets import padded
from specdec_kernels.ops import BackendName, sample
from specdec_kernels.ops.results import DrawnChildren
from specdec_kernels.ops.tree_rules import ChildrenName, sample_children


@dataclass(frozen=True)
class Drafting:
    """How a model drafts. None of it changes the law of the text, only its speed.

    Raises:
        ValueError: a value out of its range.
    """

    min_confidence: float = 0.0
    """Drafting stops once the model's own probability of all drafts so far, at temperature 1, falls below this. That
    depends on the drafts and their law alone, and every token drawn is proposed: algorithms.md, 10. 0 never stops."""

    cooling: float = 1.0
    """Drafts are drawn at this times the request's temperature, and handed over with the scalars of that law. A drafter
    knows less than its target and spreads its probability wider; drawing colder makes up for it."""

    siblings: int = 0
    """Drafts beside each one of a chain, which end where they are: another token in its place, for one more row in the
    target's pass and none in the drafter's. The chain with them is a tree, and counts as one against ``num_draft``."""

    backend: BackendName | None = None
    """Of :func:`specdec_kernels.sample`."""

    def __post_init__(self) -> None:
        if self.siblings < 0:
            raise ValueError(f"siblings must not be negative, got {self.siblings}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must be in [0, 1], got {self.min_confidence}")
        if not 0 <= self.cooling < float("inf"):
            raise ValueError(f"cooling must be finite and not negative, got {self.cooling}")


def how_children_are_drawn(step: Step) -> ChildrenName:
    """Of all requests of a step alike: the likeliest tokens where all are greedy."""
    hot = step.temperature
    sampled = bool((hot > 0).any()) if isinstance(hot, Tensor) else hot > 0
    return "top" if not sampled else "race" if step.coupled else "without_replacement"


def drawn_children(rows: Tensor, count: int, row: Tensor | int, step: Step, drafting: Drafting) -> DrawnChildren:
    """Children of nodes by the drafter's logits there, [B * nodes, S], the nodes of a request one after the other;
    ``row`` as :func:`specdec_kernels.sample_children` wants it."""
    how, nodes = how_children_are_drawn(step), len(rows) // len(step.seed)
    each: dict[str, Any] = {name: getattr(step, name) for name in ("seed", "position", "top_k", "top_p", "min_p")}
    each["temperature"] = step.temperature
    if how == "top":  # greedily there would be one child; these are ranked by the model's own probabilities
        each = {"seed": step.seed, "position": step.position}
    elif how == "without_replacement":
        each["temperature"] = step.temperature * drafting.cooling
    spread: dict[str, Any] = {
        name: x.repeat_interleave(nodes) if isinstance(x, Tensor) and nodes > 1 else x for name, x in each.items()
    }
    return sample_children(rows, count, how, row=row, backend=drafting.backend, **spread)


class AutoregressiveDrafter(ABC):
    """Keeps a cache in step with the text, and drafts ahead of it.

    Tokens that were committed since the last draft are read together with the first draft's pass, so that K drafts
    take K passes; what was read of the drafts themselves is taken back.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, config: Any, device: torch.device, vocab_size: int, drafting: Drafting) -> None:
        self._config, self._device, self._vocab, self.drafting = config, device, vocab_size, drafting
        self._logits: Tensor | None = None
        self._pending: list[list[int]] = []
        self._pending_features: list[Tensor] | None = None

    @abstractmethod
    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read rows; the logits [B, S] after the last real row of each request, and its features [B, H]."""

    @abstractmethod
    def advance_tree(
        self, tokens: Tensor, features: Tensor | None, ancestors: Tensor, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        """Read nodes ``tokens [B, R]`` of a tree, ``depth`` tokens behind what was read, that attend to its rows so far
        and their own by ``ancestors [B, R, T]``; ``features [B, R, H]`` are those of their parents. The logits [B, R,
        S] after each and its features."""

    def drop_tree(self) -> None:
        """Take back the rows of the tree."""
        self._cache.keep_path(torch.full((len(self._pending), 1), -1))

    def wanted(self, step: Step) -> Tensor:
        """int64 [B]: drafts wanted of each request, none where there is nothing to draft from."""
        return step.num_draft

    def read_pending(self) -> tuple[Tensor, Tensor | None]:
        """Read what was committed since the last draft: logits [B, S] after it, and its features [B, H]."""
        tokens, counts = padded(self._pending, self._device)
        read = self._advance(tokens, self._padded_features(), counts)
        self._pending = [[] for _ in self._pending]
        self._pending_features = None
        return read

    def recalled(self, logits: Tensor, paths: Sequence[Tensor]) -> Tensor:
        """Logits [R, S] with what the drafter remembers of the texts themselves: of row r behind the drafts
        ``paths[0][r], paths[1][r], ...``; each request has as many rows, one after the other."""
        return logits

    def full_rows(self, logits: Tensor) -> Tensor:
        """Rows [R, S] as rows of the vocabulary's width."""
        rows = logits.new_full((len(logits), self._vocab), -torch.inf)
        self._scatter(rows, logits)
        return rows

    def ids(self, index: Tensor) -> Tensor:
        """Token ids of what was drawn from the S logits."""
        return index

    def _scatter(self, rows: Tensor, logits: Tensor) -> None:
        """Write the S logits into rows of the vocabulary's width that hold -inf elsewhere."""
        rows.copy_(logits)

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._cache = RaggedCache(self._config, len(prompts), self._device)
        self._pending = [[] for _ in prompts]
        self._pending_features = None
        self._read_prompt(prompts, features)
        self._read_ahead()

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

    def _read_prompt(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._pending = [list(prompt) for prompt in prompts]

    @property
    def siblings(self) -> int:
        """Drafts beside each one of a chain."""
        return self.drafting.siblings

    @torch.inference_mode()
    def propose(self, step: Step) -> Draft | TreeDraft:
        width, each = 1 + self.siblings, self.wanted(step)
        chains = (each // width).clamp(min=1) if step.length is None else step.length
        most, wanted = each.tolist(), torch.minimum(each, chains).tolist()
        batch, longest = len(wanted), max(wanted)
        if longest == 0:
            return Draft.nothing(batch)
        logits, features = self.read_pending()
        drafts: list[Tensor] = []
        beside: list[Tensor] = []
        stats: list[Tensor] = []
        full = self._buffer(batch, 1 + longest * width, logits.dtype)
        one = torch.ones(batch, dtype=torch.int64, device=self._device)
        confidence = [1.0] * batch
        for row in range(longest):
            logits = self.recalled(logits, drafts)
            self._scatter(full[:, row], logits)
            # Coupled noise is keyed on token ids, which the drafter's own S logits may not be indexed by.
            rows = full[:, row] if step.coupled else logits
            drawn, law = self._drawn(rows, row, step)
            ids = drawn if step.coupled else self.ids(drawn.clamp(min=0)).masked_fill(drawn < 0, -1)
            drafts.append(ids[:, 0])
            beside.append(ids[:, 1:])
            stats.append(law)
            if self.drafting.min_confidence > 0:
                surprise = functional.cross_entropy(rows.float(), drawn[:, 0], reduction="none").tolist()
                confidence = [before * math.exp(-s) for before, s in zip(confidence, surprise, strict=True)]
                sure = [value >= self.drafting.min_confidence for value in confidence]
                wanted = [most if goes_on else min(most, row + 1) for most, goes_on in zip(wanted, sure, strict=True)]
            if row + 1 >= max(wanted):
                break
            previous = None if features is None else features[:, None]
            logits, features = self._advance(drafts[-1][:, None], previous, one)
        drafted = len(drafts)
        self._cache.crop(drafted - 1)
        chain, laws = torch.stack(drafts, 1), torch.stack(stats, 1)
        if width > 1:
            tokens, parents = _with_siblings(chain.tolist(), torch.stack(beside, 1).tolist(), wanted, most)
            if how_children_are_drawn(step) != "without_replacement":
                return TreeDraft(tokens, parents)
            nodes = tokens.shape[1]
            return TreeDraft(tokens, parents, full[:, :nodes], functional.pad(laws, (0, 0, 0, nodes - drafted)))
        behind = torch.arange(drafted, device=self._device) >= torch.tensor(wanted, device=self._device)[:, None]
        return Draft(chain.masked_fill(behind, -1), full[:, :drafted], laws)

    def _drawn(self, rows: Tensor, row: int, step: Step) -> tuple[Tensor, Tensor]:
        """What is drafted by rows [B, S], the draft of the chain first: indices [B, 1 + siblings], -1 where there are
        fewer, and the scalars of the law [B, 3]."""
        if self.siblings:
            first = row if step.coupled else row * (1 + self.siblings)  # no two draws share a row
            children = drawn_children(rows, 1 + self.siblings, first, step, self.drafting)
            return children.tokens, children.stats
        drawn = sample(
            rows,
            seed=step.seed,
            position=step.position,
            row=row,
            temperature=step.temperature * self.drafting.cooling,
            top_k=step.top_k,
            top_p=step.top_p,
            min_p=step.min_p,
            coupled=step.coupled,
            backend=self.drafting.backend,
        )
        return drawn.tokens[:, None], drawn.stats

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        for pending, new in zip(self._pending, tokens, strict=True):
            pending.extend(new)
        if features is not None:
            new_features = [features[slot, : len(new)] for slot, new in enumerate(tokens)]
            if self._pending_features is None:
                self._pending_features = new_features
            else:
                self._pending_features = [
                    torch.cat(pair) for pair in zip(self._pending_features, new_features, strict=True)
                ]

    def select(self, requests: Tensor) -> None:
        self._cache.select(requests)
        keep = requests.tolist()
        self._pending = [self._pending[slot] for slot in keep]
        if self._pending_features is not None:
            self._pending_features = [self._pending_features[slot] for slot in keep]

    def _padded_features(self) -> Tensor | None:
        if self._pending_features is None:
            return None
        if len(self._pending_features) == 1:
            return self._pending_features[0][None]
        return torch.nn.utils.rnn.pad_sequence(self._pending_features, batch_first=True)

    def _buffer(self, batch: int, length: int, dtype: torch.dtype) -> Tensor:
        """Rows [B, K, V] for the draft logits, reused: what a drafter does not write stays -inf."""
        if self._logits is None or self._logits.shape[0] < batch or self._logits.shape[1] < length:
            self._logits = torch.full((batch, length, self._vocab), -torch.inf, dtype=dtype, device=self._device)
        return self._logits[:batch, :length]


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
    longest = max(len(tokens) for tokens, _ in trees)
    padded_trees = torch.tensor(
        [
            [[*tokens, *[0] * (longest - len(tokens))] for tokens, _ in trees],
            [[*parents, *[-1] * (longest - len(parents))] for _, parents in trees],
        ]
    )
    return padded_trees[0], padded_trees[1]
