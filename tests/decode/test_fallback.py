"""Drafts of two drafters in one batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import VOCAB, tiny

from specdec_kernels import sample
from specdec_kernels.decode import Draft, TransformersTarget, TreeDraft, generate
from specdec_kernels.decode.drafters import CallableDrafter, FallbackDrafter
from specdec_kernels.decode.protocols import Step


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
