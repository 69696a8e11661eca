"""Comparing with plain decoding: what is made of the rates, and how long it takes, by a clock that is made up."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest

from specdec_kernels.cli import compare
from specdec_kernels.cli.compare import LEAST_STEPS, Comparison, Until, in_turns, in_words
from specdec_kernels.cli.consoles import Lines
from specdec_kernels.decode import Statistics, Token


def rate(tokens_per_second, tokens=100):
    """Statistics of a text with such a rate, of which two of three drafts were accepted."""
    statistics = Statistics(emitted=tokens)
    statistics.seconds["target"] = tokens / tokens_per_second
    for _ in range(tokens // 2):
        statistics.count(3, 2)
    return statistics


def comparison(*pairs):
    return Comparison([(rate(drafted), rate(plain)) for drafted, plain in pairs])


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def test_the_ratio_is_that_of_the_middle_pair():
    """A slow minute makes both texts of a pair slow; medians of the rates themselves would say 20 / 50."""
    assert comparison((100, 50), (20, 10), (60, 50)).speed_up == pytest.approx(2)
    assert comparison((20, 50), (120, 60), (20, 10)).speed_up == pytest.approx(2)


def test_plain_decoding_that_scatters_is_told():
    assert not comparison((1, 100), (2, 90), (3, 109)).scatters
    scattering = comparison((1, 100), (2, 90), (3, 112))
    assert scattering.scatters
    assert "90 to 112 tokens/s" in scattering.warning()


def test_a_line_of_the_table():
    assert comparison((90, 60), (100, 40)).cells() == ("50.0", "95.0", "2.00", "1.00 1.00 0.00", "2.00x")


def test_ratios_in_words():
    assert in_words(2.18) == "2.2 times as fast"
    assert in_words(0.45) == "at 45% of its speed"


def texts(clock, seconds, count):
    """Texts that take so long whoever decodes them, and a list of (drafted, seconds it was allowed, when)."""
    log = []

    def decode(drafted, statistics, end):
        log.append((drafted, clock.seconds, end))
        spent = min(seconds, max(1.0, end - clock.seconds))  # a step is a second
        clock.seconds += spent
        for _ in range(int(spent)):
            statistics.count(0, 0)
        statistics.emitted += int(spent)
        statistics.seconds["target"] += spent
        return spent == seconds

    return [decode] * count, log


def test_pairs_are_in_turns(clock):
    decoders, log = texts(clock, 10, 3)
    assert len(in_turns(decoders, 1000.0).pairs) == 3
    assert [drafted for drafted, _, _ in log] == [True, False, False, True, True, False]


def test_no_pair_begins_that_does_not_fit(clock):
    decoders, log = texts(clock, 10, 9)
    assert len(in_turns(decoders, 50.0).pairs) == 2
    assert clock.seconds == 40
    assert len(log) == 4


def test_a_first_pair_that_does_not_fit_is_cut_off(clock):
    decoders, _ = texts(clock, 1000, 2)
    (pair,) = in_turns(decoders, 60.0).pairs
    assert [each.emitted for each in pair] == [30, 30]
    assert clock.seconds == 60


def test_a_text_that_was_cut_off_too_early_tells_nothing(clock):
    decoders, _ = texts(clock, 1000, 2)
    assert in_turns(decoders, 2.0 * LEAST_STEPS - 1).pairs == []
    decoders, _ = texts(clock, 1000, 2)
    assert len(in_turns(decoders, clock.seconds + 2.0 * LEAST_STEPS).pairs) == 1


def test_a_short_text_that_ended_by_itself_is_kept(clock):
    """Whatever its steps: those that are drafted well have few, and would be missing."""
    decoders, _ = texts(clock, 2, 3)
    comparison = in_turns(decoders, 1000.0)
    assert [each.request_steps for pair in comparison.pairs for each in pair] == [2] * 6
    assert LEAST_STEPS > 2


def test_whether_a_text_ended_by_itself(clock):
    def tokens(finished):
        for last in (False, True):
            clock.seconds += 1
            yield Token(0, 0, False, finished if last else "")

    for end, finished, came, complete in ((9, "stop", 2, True), (2, "length", 2, True), (1, "stop", 1, False)):
        clock.seconds = 0.0
        text = Until(end, tokens(finished))
        assert (len(list(text)), text.complete) == (came, complete)


def test_texts_without_a_token_are_left_out_and_told(clock):
    decoders, _ = texts(clock, 5, 4)

    def nothing(drafted, statistics, end):
        clock.seconds += 1
        statistics.count(0, 0)
        statistics.seconds["target"] += 1
        return True

    comparison = in_turns([*decoders, nothing], 1000.0)
    assert (len(comparison.pairs), comparison.empty) == (4, 1)
    comparison = in_turns([nothing], 1000.0)
    assert (comparison.pairs, comparison.empty) == ([], 1)


class Session:
    """A model that takes so many seconds a step: one token, or two where there are drafts."""

    settings = SimpleNamespace(seed=0)

    def __init__(self, clock, seconds, monkeypatch):
        self.clock, self.seconds, self.slower = clock, seconds, 1.0
        monkeypatch.setattr(compare, "print_stream", lambda session, tokens, to: list(tokens))

    def decode(self, prompt, temperature, drafted, statistics, seed=None):
        for _ in range(64 if drafted else 128):
            self.clock.seconds += self.seconds * self.slower
            statistics.seconds["target"] += self.seconds * self.slower
            statistics.count(int(drafted), int(drafted))
            statistics.emitted += 1 + drafted
            for _ in range(1 + drafted):
                yield Token(0, 0, drafted)


class Ending(Session):
    """One whose plain texts end after so many steps, with no distribution of what follows."""

    def __init__(self, clock, monkeypatch, steps):
        super().__init__(clock, 0.02, monkeypatch)
        self.steps = steps

    def decode(self, prompt, temperature, drafted, statistics, seed=None):
        tokens = super().decode(prompt, temperature, drafted, statistics, seed)
        yield from tokens if drafted else islice(tokens, self.steps)
        if not drafted:
            statistics.count(0, 0)
            yield Token(0, -1, False, "invalid")


def test_what_has_no_token_is_told_in_place_of_advice(clock, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="there is nothing to compare: texts ended without a token, since the model"):
        compare.measure(Ending(clock, monkeypatch, 0), (0.0,), 120.0)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2)[2] for line in said[1:]] == ["texts without a token"] * 4


def test_pairs_without_a_token_are_not_said_to_lack_time(clock, monkeypatch, capsys):
    session = Ending(clock, monkeypatch, 0)
    decode = session.decode

    def some(prompt, temperature, *arguments):
        if prompt == compare.PROMPTS["chat"][0]:
            return decode(prompt, temperature, *arguments)
        return Session.decode(session, prompt, temperature, *arguments)

    session.decode = some
    compare.measure(session, (0.0,), 120.0)
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("medians of 7 pairs, without 1 where a text has no token.")


def test_an_end_without_a_token_is_no_place_where_texts_part(clock, monkeypatch):
    """The id -1 stands for it, which no row of logits has."""
    session = Ending(clock, monkeypatch, 5)
    session.settings = SimpleNamespace(seed=0, rule="block")
    monkeypatch.setattr(compare, "print_stream", lambda session, tokens: [token.token for token in tokens])
    monkeypatch.setattr(compare, "_report_divergence", lambda *_: pytest.fail("the texts part nowhere"))
    compare.compare(session, "?", 0.0, 120.0)


@pytest.mark.parametrize("seconds_a_step", [0.015, 0.3, 1.0])
def test_measuring_ends_in_time(clock, monkeypatch, capsys, seconds_a_step):
    compare.measure(Session(clock, seconds_a_step, monkeypatch), (0.0, 0.8), 120.0)
    assert 80 < clock.seconds < 120 + 4 * seconds_a_step
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[1] for line in lines[1:11]] == [*compare.PROMPTS, "all"] * 2
    assert all(line.endswith("2.00x") for line in lines[1:11])
    said = " ".join(said.split())
    assert "text came 2 times as fast at temperature 0 and 2 times as fast at temperature 0.8: medians of" in said
    assert "scatters" not in said
    assert ("32 would take more than 120 s" in said) == (seconds_a_step > 0.1)


def test_a_machine_that_does_other_things_is_told(clock, monkeypatch, capsys):
    session = Session(clock, 0.02, monkeypatch)
    plain = session.decode

    def slower_at_last(prompt, temperature, *arguments):
        session.slower = 1.3 if temperature else 1.0
        return plain(prompt, temperature, *arguments)

    session.decode = slower_at_last
    compare.measure(session, (0.0, 0.8), 120.0)
    assert "Plain decoding made 38.5 to 50 tokens/s" in " ".join(capsys.readouterr().out.split())


def test_a_machine_that_is_too_slow_is_an_error(clock, monkeypatch):
    with pytest.raises(RuntimeError, match="no two texts of 4 steps could be decoded in 10 s: allow more --seconds"):
        compare.measure(Session(clock, 5.0, monkeypatch), (0.0,), 10.0)


def test_lines_are_printed_as_they_come(capsys):
    from rich.console import Console

    lines = Lines(Console(), {"name": "<6", "us": ">5"})
    assert capsys.readouterr().out == ""
    lines.print("a[x]", "12")
    assert capsys.readouterr().out == "name       us\na[x]       12\n"
    lines.print(":dog:", "3")
    assert capsys.readouterr().out == ":dog:       3\n"
    lines.print("b" * 90, "7")
    assert capsys.readouterr().out == "b" * 90 + "      7\n"
