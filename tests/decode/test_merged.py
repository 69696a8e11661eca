"""Chains of two drafters in one tree."""

from __future__ import annotations

import pytest
import torch
from decoding import PROMPTS, drafted, drafters
from tiny import VOCAB, slow_greedy, steady, tiny

from specdec_kernels.decode import Draft, Statistics, TransformersTarget, TreeDraft, generate
from specdec_kernels.decode.drafters import CallableDrafter, FallbackDrafter, MergedDrafter, ModelDrafter, NGramDrafter
from specdec_kernels.decode.drafters.merged import merged
from specdec_kernels.decode.drafts import Step


@pytest.fixture(scope="module")
def model():
    return steady(tiny(1, layers=2))


@pytest.mark.parametrize(
    ("chains", "most", "tokens", "parents"),
    [
        ([[5, 6, 7], [5, 8]], 9, [0, 5, 6, 8, 7], [-1, 0, 1, 1, 2]),  # a shared prefix
        (
            [[5, 6, 7], [4, 6, 7]],
            9,
            [0, 5, 4, 6, 6, 7, 7],
            [-1, 0, 0, 1, 2, 3, 4],
        ),  # no node is shared by its token alone
        ([[5, 6, 7], [5, 6, 7, 8]], 9, [0, 5, 6, 7, 8], [-1, 0, 1, 2, 3]),  # one goes on
        ([[5, 6, 7], [4, 8, 9]], 3, [0, 5, 4, 6], [-1, 0, 0, 1]),  # cut level by level
        ([[5, 6], [5, 8]], 2, [0, 5, 6], [-1, 0, 1]),
        ([[], [4]], 5, [0, 4], [-1, 0]),
        ([[], []], 5, [0], [-1]),
        ([[5, 6], [4]], 0, [0], [-1]),
    ],
)
def test_trees_of_chains(chains, most, tokens, parents):
    assert merged(chains, most) == (tokens, parents)


def test_both_are_right_where_the_other_is_wrong(model):
    """One drafter is right at three places, and the other at the next three: in one tree every step accepts a draft;
    alone, or one in the place of the other, they do not."""
    sequence = PROMPTS[0] + slow_greedy(model, PROMPTS[0], 40)

    def right(parity):
        def propose(history, count):
            wrong = len(history) // 3 % 2 != parity
            return [(sequence[len(history)] + wrong) % VOCAB][:count]

        return CallableDrafter(propose)

    accepted = {}
    for name, drafter in (
        ("merged", MergedDrafter(right(0), right(1))), ("fallback", FallbackDrafter(right(0), right(1))),
        ("even", right(0)), ("odd", right(1)),
    ):  # fmt: skip
        steps = Statistics()
        (result,) = generate(
            TransformersTarget(model), PROMPTS[:1], drafter=drafter, num_draft=2, max_new_tokens=40, temperature=0.0,
            statistics=steps,
        )  # fmt: skip
        assert result.tokens == sequence[5:45]
        accepted[name] = steps.accepted / steps.request_steps
    assert accepted["merged"] > 0.9
    assert max(accepted["fallback"], accepted["even"], accepted["odd"]) < 0.75


@pytest.mark.parametrize("coupled", [False, True])
def test_the_second_is_asked_for_what_the_first_leaves(model, coupled):
    """And for half at least; for its likeliest tokens, or by the rule "coupled" what it draws in the target's race."""
    asked = []

    class Noted(ModelDrafter):
        def begin(self, prompts, features):
            session = super().begin(prompts, features)
            propose = session.propose

            def noted(step):
                asked.append(step)
                return propose(step)

            session.propose = noted
            return session

    first = CallableDrafter(lambda history, count: [1] * {2: 1, 3: 4, 4: 0}[len(history)])
    session = MergedDrafter(first, Noted(model)).begin([[1, 2], [1, 2, 3], [1, 2, 3, 4]], None)
    keys = torch.tensor([7, 8, 9])
    with torch.inference_mode():
        draft = session.propose(Step([4, 4, 4], keys, keys, 0.9, coupled=coupled))
    (step,) = asked
    assert step.num_draft == [3, 2, 4]
    assert (step.temperature, step.greedy) == ((0.9, False) if coupled else (0.0, True))
    assert isinstance(draft, TreeDraft)
    assert draft.logits is None
    assert all(len(own) <= 4 for own in drafted(draft))


def test_what_has_nothing_to_draft_drafts_nothing():
    session = MergedDrafter(NGramDrafter(), NGramDrafter()).begin([[1, 2]], None)
    keys = torch.tensor([7])
    draft = session.propose(Step([4], keys, keys, 0.9))
    assert isinstance(draft, Draft)
    assert draft.counts == [0]


def test_what_is_refused(model):
    made = drafters(model)
    for pair, name in (((made["tree"], made["lookup"]), "first"), ((made["lookup"], made["tree"]), "second")):
        with pytest.raises(TypeError, match=f"{name} must draft chains, got a drafter of trees"):
            generate(TransformersTarget(model), PROMPTS, drafter=MergedDrafter(*pair), max_new_tokens=9)
    with pytest.raises(ValueError, match="must read the same layers of the target"):
        MergedDrafter(made["feature"], made["feature of two layers"])
