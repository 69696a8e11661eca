"""The words of the field (CONTRIBUTING.md)."""

from __future__ import annotations

import pytest
import words


def test_the_words_of_the_field_are_written():
    assert words.complaints() == []


WRITTEN_OTHERWISE = (
    "the law of a row", "tree_laws.py", "drawLaw(x)", "Law law;", "two coins", "FirstOf(a, b)", "x(how=1)",
    "goes on as ever",
)  # fmt: skip
FINE = (
    "a lawn, a flaw", "Lawrence", "coincide", "teamwork", "reached", "x(count_independent=1)", "as everywhere",
    "taken together", "sglang._verify_coins",
)  # fmt: skip


@pytest.mark.parametrize("line", WRITTEN_OTHERWISE)
def test_what_is_looked_for(line):
    assert list(words.found(line))


@pytest.mark.parametrize("line", FINE)
def test_what_is_not(line):
    assert not list(words.found(line))


def test_a_folder_that_is_clean_leaves_the_list(monkeypatch):
    monkeypatch.setattr(words, "REMAINING", (*words.REMAINING, "specdec_kernels/cli"))
    assert words.complaints() == ["specdec_kernels/cli is clean: take it off the list in tests/helpers/words.py"]
    monkeypatch.setattr(words, "REMAINING", ())
    monkeypatch.setattr(words, "WORDS", {"kernel": "program"})
    assert any(line.startswith("csrc/") for line in words.complaints())
