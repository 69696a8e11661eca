"""Acceptance records, and requests that are ended from outside."""

from __future__ import annotations

import json

import pytest
from tiny import tiny

from specdec_kernels.decode import Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import Growth, ModelDrafter, TreeDrafter
from specdec_kernels.decode.statistics import Acceptance

PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 7, 8, 9, 5, 6]]


def test_a_record_by_hand():
    acceptance = Acceptance()
    for proposed, accepted in [(3, 3), (3, 0), (2, 1), (0, 0), (3, 1)]:
        acceptance.count(proposed, accepted)
    assert acceptance.record() == {
        "num_drafts": 4,
        "num_draft_tokens": 11,
        "num_accepted_tokens": 5,
        "num_draft_tokens_per_pos": [4, 4, 3],
        "num_accepted_tokens_per_pos": [3, 1, 1],
        "draft_acceptance_rate": 5 / 11,
        "mean_acceptance_length": 1 + 5 / 4,
        "acceptance_length_histogram": {"0": 1, "1": 2, "3": 1},
    }
    nothing = Acceptance().record()
    assert nothing["mean_acceptance_length"] == 1
    assert nothing["acceptance_length_histogram"] == {}


@pytest.mark.parametrize("name", ["chains", "trees"])
def test_records_of_requests(name):
    model, drafter = tiny(1, layers=2), ModelDrafter(tiny(1, layers=1))
    drafter = drafter if name == "chains" else TreeDrafter(drafter, Growth(depth=3, width=2, children=2))
    statistics, lengths = Statistics(), [9, 20, 14]
    generate(
        TransformersTarget(model), PROMPTS, drafter=drafter, num_draft=5, max_new_tokens=lengths, temperature=1.5,
        seed=1, statistics=statistics,
    )  # fmt: skip
    record = statistics.record()
    assert json.loads(json.dumps(record)) == record
    assert [each.pop("request") for each in record["requests"]] == [0, 1, 2]
    for key in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert sum(each[key] for each in record["requests"]) == record[key] > 0
    for each in (record, *record["requests"]):
        histogram = {int(length): steps for length, steps in each["acceptance_length_histogram"].items()}
        assert sum(histogram.values()) == each["num_drafts"]
        assert sum(length * steps for length, steps in histogram.items()) == each["num_accepted_tokens"]
    assert len(record["acceptance_length_histogram"]) > 1
    assert record["num_emitted_tokens"] == sum(lengths)
    steps = [statistics.requests[index].request_steps for index in range(3)]
    assert sum(steps) == statistics.request_steps
    gained = [statistics.requests[index].accepted + steps[index] for index in range(3)]
    assert all(0 <= more - length <= 5 for more, length in zip(gained, lengths, strict=True))


def test_a_request_ends_when_it_is_told_to():
    """After the token that was asked about, whatever else its step brought; the others go on as they would."""
    target, asked = TransformersTarget(tiny(1, layers=2)), []
    drafter = ModelDrafter(target.model)
    plain = generate(target, PROMPTS, drafter=drafter, max_new_tokens=20, temperature=0.0)

    def stop_when(index, generated):
        asked.append((index, tuple(generated)))
        return index == 1 and len(generated) == 7

    got = generate(target, PROMPTS, drafter=drafter, max_new_tokens=20, temperature=0.0, stop_when=stop_when)
    assert got[1].tokens == plain[1].tokens[:7]
    assert [each.finished for each in got] == ["length", "stop", "length"]
    assert [got[0].tokens, got[2].tokens] == [plain[0].tokens, plain[2].tokens]
    assert sorted(asked) == sorted(
        (index, tuple(each.tokens[:count]))
        for index, each in enumerate(got)
        for count in range(1, len(each.tokens) + 1)
    )
