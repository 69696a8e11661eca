"""The state of drafters. It changes no text, only what is drafted, so the drafts are compared."""

from __future__ import annotations

import pytest
import torch
from decoding import NAMES, PROMPTS, SESSIONS, SHORTLIST, drafted, drafters, feature_drafter
from tiny import VOCAB, Altered, steady, tiny

from specdec_kernels import verify_chain
from specdec_kernels.decode import Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import AdaptiveDrafter, CallableDrafter, DraftConfig, ModelDrafter, StaticDrafter
from specdec_kernels.decode.drafts import Step


@pytest.fixture(scope="module")
def model():
    return steady(tiny(1, layers=2))


# Others take part in how many children a node has, and what is adaptive depends on the clock.
@pytest.mark.brief(kept=lambda parameters: not parameters["coupled"] or parameters["name"] in SESSIONS)
@pytest.mark.parametrize("name", [name for name in NAMES if "adaptive" not in name and "trees" not in name])
@pytest.mark.parametrize("coupled", [False, True])
def test_drafts_depend_on_the_history_alone(model, name, coupled):
    """Not on what was accepted and taken back, nor on whose slot it was: a stream that begins with the history drafts
    the same."""
    target = TransformersTarget(model, check=False)
    drafter = drafters(model, lambda *seed, **named: steady(tiny(*seed, **named)))[name]
    written, alive, compared, checked = [list(prompt) for prompt in PROMPTS], list(range(len(PROMPTS))), [0], set()

    def alone(step, slot):
        history = written[alive[slot]]
        session = drafter.begin([history], target.begin([history], [1], drafter.feature_layers).features)
        own = {
            each: value[slot : slot + 1] if isinstance(value := getattr(step, each), torch.Tensor) else value
            for each in ("seed", "position", "temperature", "top_k", "top_p", "min_p")
        }
        return session.propose(Step([step.num_draft[slot]], **own, greedy=step.greedy, coupled=step.coupled))

    def compare(draft, step):
        for slot, found in enumerate(drafted(draft)):
            checked.add(alive[slot])
            assert found == drafted(alone(step, slot))[0], (slot, step)
            compared[0] += bool(found)
        return draft

    def stop_when(request, generated):
        written[request] = [*PROMPTS[request], *generated]
        ended = len(generated) == lengths[request]
        if ended:
            alive.remove(request)
        return ended

    lengths = [9, 3, 14, 11]
    generate(
        target, PROMPTS, drafter=Altered(drafter, compare), num_draft=4, max_new_tokens=20, seed=[3, 4, 5, 6],
        temperature=0.9, rule="coupled" if coupled else "token", stop_when=stop_when,
    )  # fmt: skip
    assert checked == {0, 1, 2, 3}
    assert compared[0] > 5


@pytest.mark.parametrize("name", ["self", "tree of self"])
def test_a_drafter_that_is_its_target_is_always_right(model, name):
    """Whatever was taken back before, and whoever ended."""
    statistics, lengths = Statistics(), [21, 7, 13, 30]
    options = {"num_draft": 3, "max_new_tokens": lengths, "temperature": 0.0, "statistics": statistics}
    generate(TransformersTarget(model), PROMPTS, drafter=drafters(model)[name], **options)
    for slot, length in enumerate(lengths):
        own = statistics.requests[slot]
        assert own.accepted_at[0] == own.proposed_at[0] > 0
        if name == "self":  # of a tree, what is deeper may hang from another node
            assert own.accepted_at == own.proposed_at
            assert own.request_steps == -(-length // 4)


def test_nodes_of_a_tree_are_drafted_from_their_own_path(model):
    """The children that a node keeps are the likeliest tokens behind the path to it, whatever else is in the tree."""
    session = drafters(model)["tree of self"].begin(PROMPTS, None)
    keys = torch.ones(len(PROMPTS), dtype=torch.int64)
    draft = session.propose(Step([12] * len(PROMPTS), keys, keys, 0.0, greedy=True))
    deeper = 0
    for prompt, tokens, parents in zip(PROMPTS, draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        for node in {up for up in parents if up > 0}:
            path, at = [], node
            while at > 0:
                path, at = [tokens[at], *path], parents[at]
            with torch.inference_mode():
                row = model(torch.tensor([[*prompt, *path]])).logits[0, -1]
            children = {token for token, up in zip(tokens, parents, strict=True) if up == node}
            assert children == set(row.topk(len(children)).indices.tolist())
            deeper += 1
    assert deeper > len(PROMPTS)


@pytest.mark.parametrize("kind", [ModelDrafter, StaticDrafter])
def test_drafts_are_drawn_no_hotter_than_float32_holds(model, kind):
    """The boldest drafter of the hottest request still drafts, for others too."""
    bold, seen = (
        kind(steady(tiny(2)), config=DraftConfig(temperature_scale=4.0, siblings=int(kind is ModelDrafter))),
        [],
    )

    def noted(draft, step):
        seen.extend(drafted(draft))
        return draft

    for temperature in (3e38, [3e38, 0.9]):
        options = {"temperature": temperature, "seed": 1, "max_new_tokens": 5, "drafter": Altered(bold, noted)}
        for result in generate(TransformersTarget(model, check=False), PROMPTS[:2], **options):
            assert len(result.tokens) == 5
    assert any(seen)


def test_positions_count_the_whole_text(model):
    """Without drafts a token is what ``verify_chain`` draws at the position that it has in the text."""
    for prompt, seed in zip(PROMPTS, (3, -4, 1 << 40, 6), strict=True):
        (result,) = generate(TransformersTarget(model), [prompt], max_new_tokens=8, seed=seed, temperature=1.5)
        history = list(prompt)
        for token in result.tokens:
            with torch.inference_mode():
                row = model(torch.tensor([history])).logits[:, -1:]
            nothing = torch.empty((1, 0), dtype=torch.int64)
            drawn = verify_chain(row, nothing, seed=seed, position=len(history), temperature=1.5).tokens
            assert drawn.tolist() == [[token]]
            history.append(token)


def test_acceptance_stays_with_its_request():
    """An adaptive drafter learns of each request what was accepted of it, and keeps that when others end."""
    drafter = AdaptiveDrafter(CallableDrafter(lambda history, count: [1] * count))
    drafter.costs._steps = {3: 0}
    session = drafter.begin([[1]] * 3, None)
    keys = torch.ones(3, dtype=torch.int64)
    for _ in range(3):
        drafter.drafting._sums[0] = 0.0  # as if nothing was known: all that is wanted is drafted
        draft = session.propose(Step([4, 4, 4], keys, keys, 1.0))
        assert draft.counts == [4, 4, 4]
        session.commit([[0], [1, 1, 0], [1, 1, 1, 1, 0]], None)
    assert all(token < VOCAB for token in draft.tokens.flatten().tolist())
    gains = [sum(gain for gain, _ in own.gains(4)) for own in session.acceptance]
    assert gains[0] < 0.9 < gains[1] < 2.2 < gains[2]
    session.select([2, 0])
    assert [sum(gain for gain, _ in own.gains(4)) for own in session.acceptance] == [gains[2], gains[0]]


@pytest.mark.parametrize("name", ["feature", "siblings of features", "feature tree", "nested"])
@pytest.mark.parametrize("rule", ["token", "coupled"])
def test_rows_of_a_reduced_vocabulary_stay_as_they_are(model, name, rule):
    """What is proposed has the drafter's own columns and says which ids they are; the tokens are the target's."""
    seen = [0]

    def noted(draft, step):
        if draft.logits is not None:
            assert draft.vocabulary.draft_to_target.tolist() == SHORTLIST
            assert draft.logits.shape[-1] == len(SHORTLIST)
            seen[0] += 1
        if name != "nested":
            assert {token for nodes in drafted(draft) for token, _ in nodes} <= set(SHORTLIST)
        return draft

    drafter, statistics = Altered(drafters(model)[name], noted), Statistics()
    options = {"temperature": 0.9, "seed": [1, 2, 3, 4], "max_new_tokens": 12, "rule": rule, "statistics": statistics}
    generate(TransformersTarget(model), PROMPTS, drafter=drafter, **options)
    assert statistics.accepted > 0
    assert seen[0] > 0 or rule == "coupled"


def test_a_reduced_vocabulary_stops_where_it_is_unsure(model):
    """By the probability of the draft's own column."""
    least, stopped = 0.2, [0, 0]

    def noted(draft, step):
        if draft.logits is None:  # nothing is wanted
            return draft
        columns = draft.vocabulary.target_to_draft[draft.tokens.clamp(min=0)].clamp(min=0).long()
        probs = draft.logits.float().softmax(-1).gather(-1, columns[..., None])[..., 0].cumprod(1)
        for own, count, most in zip(probs.tolist(), draft.counts, step.num_draft, strict=True):
            if count == 0:  # a history of one token has no feature yet
                continue
            assert all(path >= least for path in own[: count - 1])
            assert count == most or own[count - 1] < least
            stopped[count == most] += 1
        return draft

    drafter = Altered(feature_drafter(model, config=DraftConfig(min_confidence=least)), noted)
    generate(TransformersTarget(model), PROMPTS, drafter=drafter, temperature=0.9, seed=3, max_new_tokens=20)
    assert min(stopped) > 0
