"""What `specdec bench adaptive` makes of the times it took."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny

from specdec_kernels.bench.adaptive import Replayed, Timed, _rates, _seconds_by_rows
from specdec_kernels.decode import generate
from specdec_kernels.decode.drafters import DraftConfig, ModelDrafter

#: Seconds a step by its rows, and of drafting a draft.
STEP, DRAFT = {1: 1.0, 2: 1.1, 3: 1.3}, 0.05


def run(proposed: list[int], slowness: float = 1.0) -> Timed:
    """A text of steps with so many drafts, all of them accepted, on a machine that was so slow."""
    statistics = Timed()
    for drafts in proposed:
        statistics.seconds["draft"] += slowness * DRAFT * drafts
        statistics.seconds["target"] += 0.75 * slowness * STEP[1 + drafts]
        statistics.seconds["verify"] += 0.25 * slowness * STEP[1 + drafts]
        statistics.count(drafts, drafts)
        statistics.emitted += 1 + drafts
    return statistics


def test_a_slow_minute_falls_on_no_way_alone() -> None:
    plain, drafting = [run([0] * 6), run([0] * 6), run([0] * 6, 2.0)], [run([1, 2, 0]), run([1, 2, 0]), run([1, 2, 0])]
    costs = _seconds_by_rows([*plain, *drafting])
    assert costs == pytest.approx(STEP)
    assert _rates([plain], costs)["tokens_per_second"] == pytest.approx(1.0)
    assert _rates([plain], costs)["timed_tokens_per_second"] == pytest.approx(18 / 24)
    assert _rates([drafting], costs)["tokens_per_second"] == pytest.approx(6 / (1.0 + 1.1 + 1.3 + 3 * DRAFT))


def test_each_time_of_a_text_counts_by_its_own_steps() -> None:
    chosen = [run([2, 0, 2]), run([1, 1, 1, 1]), run([2, 2, 1])]
    rates = _rates([chosen], STEP)
    seconds = (1.3 + 1.0 + 1.3) + 4 * 1.1 + (1.3 + 1.3 + 1.1) + 3 * 4 * DRAFT
    assert rates["tokens_per_second"] == pytest.approx((7 + 8 + 8) / seconds)
    assert rates["tokens_per_step"] == pytest.approx(23 / 10)
    assert rates["drafts_per_step"] == pytest.approx(13 / 10)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("siblings", [0, 1])
def test_a_text_is_taken_apart_as_it_was_the_first_time(temperature: float, siblings: int) -> None:
    model = tiny(1)
    target = Replayed(model)
    options = {"rule": "coupled" if temperature else "token", "temperature": temperature, "seed": 1}
    tokens = generate(target, [[1, 2]], max_new_tokens=20, **options)[0].tokens
    drafter = ModelDrafter(tiny(2), config=DraftConfig(siblings=siblings))
    with torch.no_grad():  # what it scores now is of no account
        model.lm_head.weight.neg_()
    for _ in range(2):
        again = generate(target, [[1, 2]], max_new_tokens=20, drafter=drafter, num_draft=4, **options)
        assert again[0].tokens == tokens
