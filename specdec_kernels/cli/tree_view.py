"""A picture of a tree of drafts and of what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from specdec_kernels.decode import Draft, Drafter, DrafterSession, Step, TreeDraft

ACCEPTED, DRAWN, REJECTED = "green", "bold yellow", "dim"


class Watched:
    """Another drafter, for one request at a time, whose most accepted tree is kept."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.feature_layers = drafter.feature_layers
        self.best: tuple[TreeDraft, Sequence[int]] | None = None
        """The tree, and the tokens that the text went on with."""

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> WatchedSession:
        """Start a stream."""
        return WatchedSession(self, self.drafter.begin(prompts, features))


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
        """Keep the step if it is the best so far."""
        tree = self._draft if isinstance(self._draft, TreeDraft) else TreeDraft.of(self._draft)
        best = self._watched.best
        if tree.tokens.shape[1] > 1 and (best is None or len(tokens[0]) > len(best[1])):
            self._watched.best = tree, list(tokens[0])
        self._session.commit(tokens, features)


def picture(draft: TreeDraft, emitted: Sequence[int], decode: Callable[[int], str]) -> Tree:
    """The tree of request 0: accepted drafts, the token that was drawn behind them, and the others."""
    tokens, parents = draft.tokens[0].tolist(), draft.parents[0].tolist()
    views = {0: Tree(Text("…", REJECTED))}
    depth, on_path = {0: 0}, {0}
    taken: set[int] = set()  # depths whose accepted node is known: of equal siblings the first is shown
    for node, up in enumerate(parents):
        if up < 0:
            continue
        depth[node] = depth[up] + 1
        place = depth[node] - 1
        accepted = up in on_path and place not in taken and place < len(emitted) - 1 and tokens[node] == emitted[place]
        if accepted:
            on_path.add(node)
            taken.add(place)
        views[node] = views[up].add(Text(repr(decode(tokens[node])), ACCEPTED if accepted else REJECTED))
    views[max(on_path)].add(Text(repr(decode(emitted[-1])), DRAWN))
    return views[0]
