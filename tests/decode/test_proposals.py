"""Proposals that are wrong: an error that says so where the drafter is the caller's, and in a scheduler the loss of the
drafts of those requests that they are wrong for."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from decoding import PROMPTS, drafters
from tiny import VOCAB, Altered, steady, tiny

from specdec_kernels import DraftVocabulary
from specdec_kernels.decode import Scheduler, TransformersTarget, TreeDraft, generate, loop
from specdec_kernels.tensors import longer

NAN, INF = float("nan"), float("inf")
#: The seed of the request whose drafts are spoilt.
SPOILT = 77
SEEDS = [1, SPOILT, 3, 4]


@pytest.fixture(scope="module")
def model():
    return steady(tiny(1, layers=2))


def in_rows(name, value, where=...):
    """The field with another value in the rows of the request that is spoilt, where it has any."""

    def change(draft, step):
        rows, changed = step.seed == SPOILT, getattr(draft, name)
        if changed is None or not bool(rows.any()) or (where is not ... and changed.shape[1] <= where):
            return draft
        changed = changed.clone()
        changed[torch.where(rows)[0][:, None] if where is not ... else rows, where] = value
        return replace(draft, **{name: changed})

    return change


def at_a_temperature(value):
    def change(draft, step):
        heat = torch.where(step.seed == SPOILT, value, 0.9).float()
        return draft if draft.logits is None else replace(draft, stats=None, temperature=heat)

    return change


def more_nodes(draft, step):
    """All of them below the root."""
    spoilt = step.seed == SPOILT
    if not bool(spoilt.any()):
        return draft
    count = 2 + max(step.num_draft)
    longer_by = {"tokens": 0, "parents": -1, "logits": 0.0, "stats": 0.0}
    columns = {name: getattr(draft, name) for name in longer_by if getattr(draft, name) is not None}
    longest = {name: longer(x, max(count, x.shape[1]), longer_by[name]) for name, x in columns.items()}
    longest["parents"][spoilt, 1:count] = 0
    return replace(draft, **longest)


#: What is wrong for one request, of which drafter, and what is said of it.
OF_ONE = {
    "an id": ("model", in_rows("tokens", VOCAB), r"token ids in \[0, 11\), got 11"),
    "a large id": ("model", in_rows("tokens", 1 << 40), r"token ids in \[0, 11\), got 1099511627776"),
    "an id of point masses": ("rule", in_rows("tokens", VOCAB, -1), r"token ids in \[0, 11\), got 11"),
    "an id behind the drafts": (
        "confident", lambda draft, step: in_rows("tokens", 99, -1)(in_rows("tokens", -1, 0)(draft, step), step),
        r"token ids in \[0, 11\), got 99",
    ),
    "an id of a node": ("tree", in_rows("tokens", VOCAB, 1), r"token ids in \[0, 11\), got 11"),
    "no id of a node": ("medusa", in_rows("tokens", -3, 2), r"token ids in \[0, 11\), got -3"),
    "a node below itself": ("tree", in_rows("parents", 1, 1), "nodes that hang from earlier ones, got 1 of node 1"),
    "a root below": ("medusa", in_rows("parents", 0, 0), "nodes that hang from earlier ones, got 0 of node 0"),
    "a negative parent": ("tree", in_rows("parents", -2, 1), "nodes that hang from earlier ones, got -2 of node 1"),
    "more nodes than wanted": ("tree", more_nodes, "at most [0-9]+ nodes beside the root, got [0-9]+"),
    "a temperature of nan": ("model", at_a_temperature(NAN), "temperatures that are finite and not negative, got nan"),
    "a negative temperature": ("model", at_a_temperature(-1.0), "finite and not negative, got -1.0"),
}  # fmt: skip


def replaced(**values):
    """Fields with other values, where there are drafts."""
    return lambda draft, step: replace(
        draft, **{name: value(draft, step) if callable(value) else value for name, value in values.items()}
    )


def wider(name):
    return replaced(**{name: lambda draft, step: torch.cat([getattr(draft, name)] * 2, -1)})


def of_fewer(*names):
    return replaced(**{name: lambda draft, step, name=name: getattr(draft, name)[1:] for name in names})


#: What is wrong as a whole.
AS_A_WHOLE = {
    "nothing": ("model", lambda draft, step: None, "drafter must propose a Draft or a TreeDraft, got NoneType"),
    "a list": ("model", lambda draft, step: draft.tokens.tolist(), "a Draft or a TreeDraft, got list"),
    "a list of ids": ("rule", replaced(tokens=[[1, 2]]), r"draft_tokens must be int64 or int32 \[B, K\], got \[\[1, 2"),
    "ids that are floats": ("rule", replaced(tokens=lambda draft, step: draft.tokens.float()), "must be int64"),
    "ids of one request": ("rule", replaced(tokens=lambda draft, step: draft.tokens[0]), "tokens must have shape"),
    "fewer requests": ("rule", of_fewer("tokens"), "tokens must have shape"),
    "logits of fewer requests": ("model", of_fewer("logits"), "draft_logits must have shape"),
    "logits of another width": ("model", wider("logits"), "draft_logits must have shape"),
    "logits of float64": ("model", replaced(logits=lambda draft, step: draft.logits.double()), "logits must be float"),
    "more stats": ("model", wider("stats"), "draft_stats must have shape"),
    "stats without logits": ("model", replaced(logits=None), "draft_stats needs the draft_logits"),
    "logits alone": ("model", replaced(stats=None), "draft_temperature must be given with draft_logits"),
    "both": ("model", replaced(temperature=1.0), "draft_temperature must be None with draft_stats"),
    "a temperature for too many": (
        "model", replaced(stats=None, temperature=lambda draft, step: torch.ones(9)), "draft_temperature must have sh",
    ),
    "counts of fewer": ("rule", replaced(counts=lambda draft, step: draft.counts[1:]), "counts must be of"),
    "counts of more drafts": (
        "rule", replaced(counts=lambda draft, step: [9] * len(draft.tokens)), "counts must be of .* requests, from",
    ),
    "negative counts": ("rule", replaced(counts=lambda draft, step: [-1] * len(draft.tokens)), "counts must be of"),
    "a vocabulary of another target": (
        "small vocabulary", replaced(vocabulary=DraftVocabulary(torch.arange(6), 50)), "must be of the V = 11",
    ),
    "a larger vocabulary": (
        "small vocabulary", replaced(vocabulary=DraftVocabulary(torch.arange(7), VOCAB)), "for each of the Vd = 7",
    ),
    "fewer parents": ("tree", replaced(parents=lambda draft, step: draft.parents[:, 1:]), "parents must have shape"),
    "no root": (
        "medusa", lambda draft, step: TreeDraft(draft.tokens[:, :0], draft.parents[:, :0]), "nodes of a tree must be",
    ),
    "siblings of no kind": ("tree", replaced(siblings="top"), "siblings must be one of"),
}  # fmt: skip


def where_drafted(change):
    """Only what has drafts is changed."""
    return lambda draft, step: change(draft, step) if draft.tokens.numel() and max(step.num_draft) > 0 else draft


def altered(model, name, change):
    return Altered(
        drafters(model, lambda seed, vocab=VOCAB: steady(tiny(seed, vocab=vocab)))[name], where_drafted(change)
    )


OPTIONS = {"max_new_tokens": 9, "temperature": 0.9}


@pytest.mark.parametrize("case", [*OF_ONE, *AS_A_WHOLE])
def test_an_error_names_what_is_wrong(model, case):
    name, change, message = (OF_ONE | AS_A_WHOLE)[case]
    with pytest.raises((TypeError, ValueError), match=message):
        generate(TransformersTarget(model), PROMPTS, drafter=altered(model, name, change), seed=SEEDS, **OPTIONS)


def scheduled(model, drafter, rule):
    """Texts and proposed drafts of requests, the last of which comes later."""
    scheduler, submissions = Scheduler(TransformersTarget(model), drafter, rule=rule), []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        if prompt is PROMPTS[-1]:
            scheduler.step()
        submissions.append(scheduler.submit(prompt, seed=seed, max_new_tokens=9))
    scheduler.run()
    return [(each.result().tokens, each.acceptance.proposed) for each in submissions]


def plain(model, rule):
    """The texts without a drafter."""
    results = generate(TransformersTarget(model), PROMPTS, seed=SEEDS, max_new_tokens=9, rule=rule)
    return [each.tokens for each in results]


#: Under "coupled" no temperature of drafts is read.
BY_RULES = [
    (case, rule) for case in OF_ONE for rule in ("token", "coupled") if "temperature" not in case or rule == "token"
]


@pytest.mark.parametrize(("case", "rule"), BY_RULES)
def test_one_request_loses_its_drafts(model, case, rule):
    """The others have theirs, as if it had never been there."""
    name, change, message = OF_ONE[case]
    with pytest.warns(RuntimeWarning, match=f"failed in propose, .* without drafts: ValueError: .*{message}") as warned:
        found = scheduled(model, altered(model, name, change), rule)
    assert len(warned) == 1
    wanted = scheduled(model, altered(model, name, lambda draft, step: draft), rule)
    assert found[1] == (plain(model, rule)[1], 0)
    assert [found[slot] for slot in (0, 2, 3)] == [wanted[slot] for slot in (0, 2, 3)]
    assert all(proposed > 0 for _, proposed in wanted)


@pytest.mark.parametrize("case", AS_A_WHOLE)
def test_what_is_wrong_as_a_whole_costs_all_drafts(model, case):
    name, change, _ = AS_A_WHOLE[case]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        found = scheduled(model, altered(model, name, change), "token")
    assert {str(each.message).partition(":")[0] for each in warned} == {
        "the drafter failed in propose, and requests go on without drafts"
    }
    assert found == [(tokens, 0) for tokens in plain(model, "token")]


#: What is no distribution.
ROWS = {
    f"{field} of {value}": in_rows(field, value) for field in ("logits", "stats") for value in (NAN, INF, -INF)
    if (field, value) != ("stats", INF)  # a point mass
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "given"),
    [(case, given) for case in ROWS for given in ("stats", "temperature") if given in case or "logits" in case],
)
@pytest.mark.parametrize("name", ["model", "tree", "small vocabulary", "siblings"])
def test_drafts_of_no_distribution_are_not_accepted(model, name, case, given):
    """Nor do they change the text, whatever they are said to have been drawn from."""

    def change(draft, step):
        if given == "temperature" and draft.logits is not None:
            draft = replace(draft, stats=None, temperature=1.0)
        return ROWS[case](draft, step)

    nothing_is_lost(model, altered(model, name, change))


@pytest.mark.parametrize("case", [case for case in OF_ONE if "id" in case.split()])
def test_ids_that_a_device_does_not_show_are_not_accepted(model, monkeypatch, case):
    """Nothing waits for them to be looked at; they end the drafts."""
    monkeypatch.setattr(loop, "check_proposal", lambda *_: {})
    name, change, _ = OF_ONE[case]
    nothing_is_lost(model, altered(model, name, change))


def nothing_is_lost(model, drafter):
    """Neither of the text that depends on no drafter, nor of any other's length."""
    given = {"drafter": drafter, "seed": SEEDS, "max_new_tokens": 9}
    coupled = generate(TransformersTarget(model), PROMPTS, rule="coupled", **given)
    assert [each.tokens for each in coupled] == plain(model, "coupled")
    for result in generate(TransformersTarget(model), PROMPTS, temperature=0.9, **given):
        assert (len(result.tokens), result.finished) == (9, "length")
