"""A drafter of dynamic trees: a model's drafter, read level by level (EAGLE-2, arXiv:2406.16858)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.checks import flags, whole
from specdec_kernels.decode.drafters.autoregressive import (
    AutoregressiveDrafter,
    AutoregressiveSession,
    children_method,
    drawn_children,
)
from specdec_kernels.decode.drafts import Draft, Step, TreeDraft
from specdec_kernels.decode.protocols import traits_of
from specdec_kernels.ops import DraftVocabulary
from specdec_kernels.ops.results import DrawnChildren
from specdec_kernels.ops.tree_rules import ChildrenName
from specdec_kernels.tensors import to_device

#: How often the first, second, ... child is accepted when it is tested, later ones like the last of these; and, by its
#: own probability among what its siblings left, as a line (at 0, rise). Of the SmolLM2 drafter at temperature 0.8 over
#: the built-in prompts; they shape trees of drawn drafts, and nothing else.
ACCEPTED = (0.42, 0.17, 0.1)
ACCEPTED_BY_PROBABILITY = ((0.2, 0.5), (0.08, 0.3))

#: A draft is worth drawing while its chance of being accepted is at least this, over the drafts wanted.
LEAST_CHANCE = 0.35


@dataclass(frozen=True)
class Growth:
    """How a tree grows. None of it changes the distribution of the text, only its speed.

    Raises:
        TypeError, ValueError: a value of another type, or out of its range.
    """

    depth: int = 5
    """Levels at most; each costs a pass of the model."""
    width: int = 4
    """Nodes of a level that get children."""
    children: int = 6
    """Children of a node at most."""
    dynamic: bool = True
    """Whether a level depends on the tokens above it. Else every step has the same tree, whose shape gains most where
    children are accepted as :data:`ACCEPTED` says, whatever they are (Sequoia, arXiv:2402.12374)."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "children"):
            whole(name, getattr(self, name), 1)
        flags(dynamic=self.dynamic)


class TreeDrafter:
    """Drafts a tree where a model's drafter drafts a chain: level by level, the best ``width`` nodes get children.

    Greedy: children are the likeliest tokens, and the nodes with the likeliest paths are proposed; the tree depends on
    the history alone, so its drafts are point masses and dropping some withholds nothing that was drawn.

    At a temperature: children are drawn without replacement. How many of a node's draws are revealed is decided by what
    was revealed before, never by the draws themselves, and what was revealed is proposed: dropping an unlikely draw
    would change the distribution it was drawn from (docs/algorithms.md, 10).

    Under the rule "coupled" children are the first arrivals of the race that the target will hold; any of them may be
    dropped.

    A static tree (``Growth.dynamic``) takes the same number of children of the same nodes whatever they are.

    Args:
        drafter: a drafter with a model of its own.
        growth: the shape of the trees.

    Raises:
        TypeError: a drafter that has no model that it reads level by level, once a stream begins; ``growth`` is none.
    """

    def __init__(self, drafter: AutoregressiveDrafter, growth: Growth = Growth()) -> None:
        if not isinstance(growth, Growth):
            raise TypeError(f"growth must be a Growth, got {growth!r}")
        self.drafter, self.growth = drafter, growth
        self.feature_layers = drafter.feature_layers
        self.vocab_size = traits_of(drafter).vocab_size

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> TreeSession:
        session: Any = self.drafter.begin(prompts, features)
        if not isinstance(session, AutoregressiveSession):
            raise TypeError(
                "drafter must have a model of its own that is read level by level, such as ModelDrafter, got "
                f"{type(self.drafter).__name__}"
            )
        return TreeSession(session, self.growth)


class TreeSession:
    """One stream of a :class:`TreeDrafter`."""

    def __init__(self, session: AutoregressiveSession, growth: Growth) -> None:
        self._session, self._growth = session, growth

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._session.commit(tokens, features)

    def select(self, slots: Sequence[int]) -> None:
        self._session.select(slots)

    def join(self, other: TreeSession) -> None:
        self._session.join(other._session)

    @torch.inference_mode()
    def propose(self, step: Step) -> Draft | TreeDraft:
        session, growth = self._session, self._growth
        each = session.wanted(step)
        most = max(each)
        if most == 0:
            return Draft.nothing(len(each))
        step = step.to(session.device)
        method = children_method(step)
        wanted = to_device(each, torch.int64, session.device)
        likeliest = growth.dynamic and method != "without_replacement"
        plan = _Likeliest(wanted) if likeliest else _Revealed(wanted, growth.dynamic)
        logits, features = session.read_pending()
        logits, features = logits[:, None], None if features is None else features[:, None]
        # Level 0 is the root: one node, which is in the cache already.
        device = logits.device
        ancestors = torch.empty((len(logits), 1, 0), dtype=torch.bool, device=device)
        index = torch.zeros((len(logits), 1), dtype=torch.int64, device=device)  # among all candidates, the root first
        value = torch.zeros((len(logits), 1), dtype=torch.float32, device=device)  # logarithm of a path's worth
        paths: list[Tensor] = []  # to the nodes, [B, width] each
        levels: list[_Level] = []
        deepest = min(growth.depth, most)
        for depth in range(deepest):
            logits = session.with_repetitions(logits.flatten(0, 1), [tokens.flatten() for tokens in paths])
            levels.append(_Level.of(logits, self._draw(logits, method, step, depth, most), value, index))
            plan.look(levels[-1], depth)
            if depth + 1 == deepest or not plan.goes_on:
                break
            value, chosen = plan.values.topk(min(growth.width, plan.values.shape[1]))
            index = 1 + sum(level.tokens.shape[1] for level in levels[:-1]) + chosen
            slot = levels[-1].slot.gather(1, chosen)
            ancestors = _extended(ancestors, slot)
            tokens = levels[-1].tokens.gather(1, chosen).clamp(min=0)
            paths = [*(before.gather(1, slot) for before in paths), tokens]
            above = None if features is None else _rows_at(features, slot)
            logits, features = session.advance_tree(tokens, above, ancestors, depth)
        session.drop_tree()
        return _tree(levels, plan.kept(), method, session.vocabulary)

    def _draw(self, rows: Tensor, method: ChildrenName, step: Step, depth: int, most: int) -> DrawnChildren:
        """The children of a level's nodes, rows [B * width, S] of the drafter's logits."""
        growth, width = self._growth, len(rows) // len(step.seed)
        index = torch.arange(width, device=rows.device).repeat(len(step.seed))
        row = depth if method == "race" else (depth * growth.width + index) * growth.children  # none twice
        session, count = self._session, min(growth.children, most)
        return drawn_children(rows, count, row, step, session.config, session.vocabulary)


@dataclass(frozen=True)
class _Level:
    """Candidates of one level, [B, M]: the children of its nodes."""

    tokens: Tensor
    """-1 where there is none."""
    logprobs: Tensor
    """Under the distribution of the row, [B, width, children]."""
    value: Tensor
    """Of the parents, [B, width]."""
    parent: Tensor
    """Index among all candidates, the root being 0."""
    slot: Tensor
    """Index of the parent in the level."""
    rows: Tensor
    """The parents' logits [B, width, S] ..."""
    stats: Tensor
    """... and their scalars [B, width, 3]."""
    nodes: Tensor
    """Index of the parents among all candidates, [B, width]."""

    @staticmethod
    def of(rows: Tensor, drawn: DrawnChildren, value: Tensor, index: Tensor) -> _Level:
        batch, width = value.shape
        count = drawn.tokens.shape[1]
        slot = torch.arange(width, device=value.device).repeat_interleave(count).expand(batch, -1)
        logprobs = drawn.logprobs.reshape(batch, width, count).nan_to_num(-torch.inf).clamp(max=0.0)
        return _Level(
            drawn.tokens.reshape(batch, -1), logprobs, value, index.gather(1, slot), slot,
            rows.unflatten(0, (batch, width)), drawn.stats.unflatten(0, (batch, width)), index,
        )  # fmt: skip


class _Likeliest:
    """Of all candidates the likeliest paths. A node is never likelier than its parent, and comes behind it, so what is
    kept hangs together."""

    goes_on = True

    def __init__(self, wanted: Tensor) -> None:
        self._wanted, self._scores = wanted, list[Tensor]()

    def look(self, level: _Level, depth: int) -> None:
        scores = (level.value[..., None] + level.logprobs).flatten(1)
        self._scores.append(scores.masked_fill(depth >= self._wanted[:, None], -torch.inf))

    @property
    def values(self) -> Tensor:
        """Of the latest level, [B, M]."""
        return self._scores[-1]

    def kept(self) -> Tensor:
        """bool [B, candidates]."""
        scores = torch.cat(self._scores, 1)
        return (_rank(scores) < self._wanted[:, None]) & scores.isfinite()


class _Revealed:
    """Of each node the first draws, as many as promise enough before they are looked at."""

    def __init__(self, wanted: Tensor, dynamic: bool) -> None:
        self._wanted, self._left, self._dynamic = wanted, wanted.clone(), dynamic
        self._least = (LEAST_CHANCE / wanted.clamp(min=1)).log()[:, None]
        self._promises, self._shown = list[Tensor](), list[Tensor]()
        self.values: Tensor
        """Of the latest level, [B, M]: logarithm of the chance that a revealed node is accepted."""

    def look(self, level: _Level, depth: int) -> None:
        count = level.logprobs.shape[2]
        device = level.logprobs.device
        accepted = to_device([ACCEPTED[min(j, len(ACCEPTED) - 1)] for j in range(count)], torch.float32, device)
        tested = functional.pad((1 - accepted).cumprod(0)[:-1], (1, 0), value=1.0)
        promise = (level.value[..., None] + (tested * accepted).log()).flatten(1)
        # No deeper than a request alone would go.
        promise = promise.masked_fill((level.tokens < 0) | (depth >= self._wanted[:, None]), -torch.inf)
        shown = (promise >= self._least) & (_rank(promise) < self._left[:, None])
        self._left = self._left - shown.sum(1)
        worth = promise
        if self._dynamic:  # what was revealed may be looked at
            probs = level.logprobs.exp()
            among = probs / (1 - (probs.cumsum(2) - probs)).clamp(min=1e-6)
            lines = [ACCEPTED_BY_PROBABILITY[min(j, 1)] for j in range(count)]
            at_zero, rise = to_device(lines, torch.float32, device).unbind(1)
            worth = (level.value[..., None] + (tested * (at_zero + rise * among.clamp(max=1.0))).log()).flatten(1)
        self.values = worth.masked_fill(~shown, -torch.inf)
        self.values = self.values.masked_fill(self.values + float(accepted[0].log()) < self._least, -torch.inf)
        self._promises.append(promise)
        self._shown.append(shown)

    @property
    def goes_on(self) -> bool:
        """Whether any node is worth children, and there is room for one."""
        return bool((self.values.isfinite().any(1) & (self._left > 0)).any())

    def kept(self) -> Tensor:
        """bool [B, candidates]: what was revealed, and what else there is room for."""
        shown, promise = torch.cat(self._shown, 1), torch.cat(self._promises, 1)
        # A child of a node that was not revealed promises nothing; of the others the next draws are revealed in order.
        return shown | (
            (_rank(promise.masked_fill(shown, -torch.inf)) < self._left[:, None]) & promise.isfinite() & ~shown
        )


def _rank(values: Tensor) -> Tensor:
    """Place of each value in falling order, earlier ones first on ties."""
    order = values.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(values.shape[1], device=values.device).expand_as(order).contiguous()
    )


def _rows_at(x: Tensor, slot: Tensor) -> Tensor:
    """Rows ``slot [B, R]`` of ``x [B, width, ...]``."""
    return x.gather(1, slot[..., None].expand(-1, -1, x.shape[2]))


def _extended(ancestors: Tensor, slot: Tensor) -> Tensor:
    """Which of the tree's rows the next level attends to: what its parents did, and each node itself."""
    batch, width = slot.shape
    itself = torch.eye(width, dtype=torch.bool, device=slot.device).expand(batch, -1, -1)
    return torch.cat([_rows_at(ancestors, slot), itself], 2)


def _tree(
    levels: Sequence[_Level], kept: Tensor, method: ChildrenName, vocabulary: DraftVocabulary | None
) -> TreeDraft:
    """The candidates that are kept, in their order: parents come first, siblings as they were drawn."""
    tokens, parent = (torch.cat([getattr(level, name) for level in levels], 1) for name in ("tokens", "parent"))
    nodes = int(kept.sum(1).max())
    node_of = functional.pad(kept.long().cumsum(1).masked_fill(~kept, nodes + 1), (1, 0))  # of a candidate, the root 0
    empty = tokens.new_full((len(tokens), nodes + 2), -1)  # the last column takes what is not kept
    parents = empty.scatter(1, node_of[:, 1:], node_of.gather(1, parent))[:, :-1]
    ids = empty.scatter(1, node_of[:, 1:], tokens)[:, :-1].clamp(min=0)
    if method != "without_replacement":
        return TreeDraft(ids, parents)
    rows, stats, index = (
        torch.cat([getattr(level, name) for level in levels], 1) for name in ("rows", "stats", "nodes")
    )
    place = node_of.gather(1, index)
    logits = rows.new_zeros((len(tokens), nodes + 2, rows.shape[2]))
    logits.scatter_(1, place[..., None].expand_as(rows), rows)
    scalars = stats.new_zeros((len(tokens), nodes + 2, 3)).scatter(1, place[..., None].expand_as(stats), stats)
    return TreeDraft(ids, parents, logits[:, :-1], scalars[:, :-1], vocabulary=vocabulary)
