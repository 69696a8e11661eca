"""Drafts of two drafters in one batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from decoding import PROMPTS, medusa_drafter
from forms import some
from tiny import VOCAB, steady, tiny

from specdec_kernels import sample
from specdec_kernels.decode import Draft, TransformersTarget, TreeDraft, generate
from specdec_kernels.decode.drafters import (
    AdaptiveDrafter,
    CallableDrafter,
    FallbackDrafter,
    MergedDrafter,
    ModelDrafter,
    NGramDrafter,
)
from specdec_kernels.decode.drafts import Step


def drawing(tree):
    """A drafter of one draft by logits of its own, that leaves the scalars of its distribution to whoever needs them.
    Of a greedy request it proposes the likeliest token."""

    def propose(step):
        count = len(step.num_draft)
        torch.manual_seed(int(step.position.sum()))
        logits = torch.randn(count, 2 if tree else 1, VOCAB)
        drawn = sample(logits[:, 0], seed=step.seed, position=step.position, temperature=step.temperature).tokens
        wanted = torch.tensor(step.num_draft)[:, None] > 0
        if not tree:
            return Draft(drawn[:, None].where(wanted, -1), logits, temperature=step.temperature)
        tokens = torch.cat([torch.zeros(count, 1, dtype=torch.int64), drawn[:, None]], 1)
        parents = torch.cat([torch.full((count, 1), -1), torch.zeros(count, 1).long().where(wanted, -1)], 1)
        return TreeDraft(tokens, parents, logits, temperature=step.temperature)

    session = SimpleNamespace(propose=propose, commit=lambda *_: None, select=lambda _: None)
    return SimpleNamespace(feature_layers=(), begin=lambda *_: session)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("heat", [0.0, 1e-4, 0.8])
def test_what_drafts_were_drawn_from_is_told_as_the_operators_tell_it(tree, heat):
    """Beside a point mass of the first drafter; a greedy draft is one as well."""
    step = Step(
        num_draft=[1, 1], seed=torch.arange(2), position=torch.tensor([3, 4]), temperature=torch.tensor([0.7, heat])
    )
    certain = CallableDrafter(lambda history, count: [5] * count if history[-1] == 1 else [])
    draft = FallbackDrafter(certain, drawing(tree)).begin([[1], [2]], None).propose(step)
    assert draft.tokens[0, -1] == 5
    assert draft.stats[0, 0].tolist() == [torch.inf, -torch.inf, 0.0]
    told = sample(draft.logits[1, :1], seed=step.seed[:1], position=step.position[:1], temperature=heat).stats
    assert torch.equal(draft.stats[1, :1], told)
    assert (draft.stats[1, 0, 0] == torch.inf) == (heat == 0)


WALKED = {
    "medusa": lambda model: FallbackDrafter(NGramDrafter(1), medusa_drafter(model)),
    "merged": lambda model: FallbackDrafter(
        CallableDrafter(lambda history, count: [(history[-1] * 3 + 1 + i) % VOCAB for i in range(count)]),
        MergedDrafter(NGramDrafter(1), ModelDrafter(steady(tiny(2)))),
    ),
}


@pytest.mark.parametrize("name", WALKED)
def test_a_seeded_text_beside_one_that_wants_no_drafts(name):
    """Walked as if it was alone, where the other, at the end of what it may write, has none."""
    model = steady(tiny(1, layers=2))
    options = {"drafter": WALKED[name](model), "temperature": 0.9}
    for seed in range(some(8, 20)):
        (alone,) = generate(TransformersTarget(model), [PROMPTS[0]], seed=[seed], max_new_tokens=20, **options)
        for length in (1, 6):
            beside = generate(
                TransformersTarget(model), PROMPTS[:2], seed=[seed, 100], max_new_tokens=[20, length], **options
            )
            assert beside[0].tokens == alone.tokens


def test_an_adaptive_drafter_of_walked_trees_says_so():
    drafter = AdaptiveDrafter(medusa_drafter(tiny(1, layers=2)))
    assert drafter.walked
    assert FallbackDrafter(NGramDrafter(1), drafter).walked
    assert not AdaptiveDrafter(NGramDrafter(1)).walked


@pytest.mark.parametrize("tree", [False, True])
def test_greedy_drafts_count_in_a_mixed_batch(tree):
    """Those of a drafter that knows the target by chance are accepted, whoever else is in the batch."""
    model, accepted = tiny(1), {}
    for name, temperature in (("alone", [0.0]), ("mixed", [0.0, 0.9])):
        prompts = [[2, 3], [1, 1]][: len(temperature)]
        certain = CallableDrafter(lambda history, count: [5] * count if history[0] == 1 else [])
        results = generate(
            TransformersTarget(model), prompts, drafter=FallbackDrafter(certain, drawing(tree)), num_draft=1,
            max_new_tokens=110, temperature=temperature, seed=1,
        )  # fmt: skip
        accepted[name] = sum(results[0].drafted)
    assert accepted["alone"] > 0
    assert accepted["mixed"] > 0
