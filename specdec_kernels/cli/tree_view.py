"""A picture of a tree of drafts and of what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from specdec_kernels.decode import Draft, Drafter, DrafterSession, Step, TreeDraft

ACCEPTED, DRAWN, REJECTED = "green", "bold yellow", "dim"


class BestTree(NamedTuple):
    """A tree and what the text took of a step with it."""

    draft: TreeDraft
    accepted: Sequence[int]
    drawn: int | None
    """The token that was drawn behind the accepted drafts; None where the text had ended before it."""


class Watched:
    """Another drafter, for one request at a time, whose trees are kept."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.feature_layers = drafter.feature_layers
        self.steps: list[tuple[TreeDraft, Sequence[int]]] = []
        """Of each its tree, without logits, and the tokens that were verified."""

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> WatchedSession:
        """Start a stream."""
        return WatchedSession(self, self.drafter.begin(prompts, features))

    def best(self, text: Sequence[int]) -> BestTree | None:
        """The tree of which a text took most drafts. Of its last step it need not have all tokens: it may end within,
        or with no distribution to draw from."""
        best, begin = None, 0
        for draft, verified in self.steps:
            tokens = text[begin : begin + len(verified)]
            begin += len(verified)
            accepted, drawn = tokens[: len(verified) - 1], tokens[len(verified) - 1 :]
            if draft.tokens.shape[1] > 1 and (best is None or len(accepted) > len(best.accepted)):
                best = BestTree(draft, accepted, drawn[0] if drawn else None)
        return best


class WatchedSession:
    """One stream of it."""

    def __init__(self, watched: Watched, session: DrafterSession) -> None:
        self._watched, self._session = watched, session
        self.select = session.select

    def propose(self, step: Step) -> Draft | TreeDraft:
        """What the drafter proposes."""
        self._draft = self._session.propose(step)
        return self._draft

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        """Keep the step."""
        tree = self._draft if isinstance(self._draft, TreeDraft) else TreeDraft.of(self._draft)
        self._watched.steps.append((TreeDraft(tree.tokens, tree.parents), list(tokens[0])))
        self._session.commit(tokens, features)


def picture(best: BestTree, decode: Callable[[int], str]) -> Tree:
    """The tree of request 0: accepted drafts, the token that was drawn behind them, and the others."""
    draft, drafts, drawn = best
    tokens, parents = draft.tokens[0].tolist(), draft.parents[0].tolist()
    views = {0: Tree(Text("…", REJECTED))}
    depth, on_path = {0: 0}, {0}
    known: set[int] = set()  # depths whose accepted node is known: of equal siblings the first is shown
    for node, up in enumerate(parents):
        if up < 0:
            continue
        depth[node] = depth[up] + 1
        place = depth[node] - 1
        accepted = up in on_path and place not in known and place < len(drafts) and tokens[node] == drafts[place]
        if accepted:
            on_path.add(node)
            known.add(place)
        views[node] = views[up].add(Text(repr(decode(tokens[node])), ACCEPTED if accepted else REJECTED))
    if drawn is not None:
        views[max(on_path)].add(Text(repr(decode(drawn)), DRAWN))
    return views[0]
