"""Any Python function as a drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from specdec_kernels.decode.protocols import Draft, Step

Rule = Callable[[list[int], int], Sequence[int]]


class RuleDrafter:
    """Drafts what ``rule(text, count)`` returns: up to ``count`` token ids to follow the token ids ``text``.

    The drafts are point masses: whatever the rule does, the text keeps the target's distribution, provided that the
    rule looks at nothing but its arguments.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> None:
        self._texts = [list(prompt) for prompt in prompts]

    def propose(self, step: Step) -> Draft:
        wanted = step.num_draft.tolist()
        drafts = [list(self.rule(list(text), count))[:count] for text, count in zip(self._texts, wanted, strict=True)]
        return Draft.point_masses(drafts)

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        for text, new in zip(self._texts, tokens, strict=True):
            text.extend(new)

    def select(self, requests: Tensor) -> None:
        self._texts = [self._texts[slot] for slot in requests.tolist()]
