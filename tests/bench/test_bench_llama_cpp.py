"""The comparison with llama.cpp's own loop, with contenders whose speeds are known."""

from __future__ import annotations

import json
from types import SimpleNamespace

from rich.console import Console

from specdec_kernels.bench import llama_cpp


def test_what_there_is_no_time_for_is_left_out(monkeypatch, tmp_path, capsys):
    """A kind of which a round was made counts with the rounds that it has."""
    clock = SimpleNamespace(monotonic=iter([0, 1, 2, 1000, *[1001] * 50]).__next__)
    monkeypatch.setattr(llama_cpp, "time", clock)
    contenders = SimpleNamespace(theirs=["their loop"], ours=["plain"], encode=lambda prompt: [1])
    contenders.run = lambda way, ids, temperature, seed: ([7], 30.0, 20.0)
    monkeypatch.setattr(llama_cpp, "Contenders", lambda: contenders)
    llama_cpp.main(tmp_path, Console(width=200))
    results = json.loads((tmp_path / "llama_cpp.json").read_text())["results"]
    assert [(each["way"], each["rounds"]) for each in results] == [("their loop", 2), ("plain", 2)]
    assert "has 2 of 3 rounds" in capsys.readouterr().err


def test_ratios_are_of_the_same_round(monkeypatch, tmp_path, capsys):
    """A round that is slow for all changes no ratio."""
    slow = {0: 1.0, 1: 10.0, 2: 3.0}
    speeds = {"their loop": 30.0, "plain": 20.0, "n-grams, 4": 50.0}

    def run(way, ids, temperature, seed):
        return [way if temperature else 7], speeds[way] / slow[seed], speeds[way] / 2 / slow[seed]

    contenders = SimpleNamespace(
        theirs=["their loop"], ours=["plain", "n-grams, 4"], encode=lambda prompt: [1], run=run
    )
    monkeypatch.setattr(llama_cpp, "Contenders", lambda: contenders)
    llama_cpp.main(tmp_path, Console(width=200))
    assert "2.50x" in capsys.readouterr().out
    results = json.loads((tmp_path / "llama_cpp.json").read_text())["results"]
    assert len(results) == len(speeds) * len(llama_cpp.TEMPERATURES) * len(llama_cpp.PROMPTS)
    for each in results:
        assert each["speed_up"] == speeds[each["way"]] / speeds["plain"]
        assert each["tokens_per_second"] == speeds[each["way"]] / 3
        assert each["tokens_per_second_by_the_clock"] == speeds[each["way"]] / 6
        assert each["as_theirs"] == (0 if each["temperature"] and each["way"] != "their loop" else 3)


def test_work_counts_by_its_threads_and_time_by_the_clock(monkeypatch):
    clock = SimpleNamespace(process_time=lambda: 7.0, perf_counter=lambda: 15.0)
    monkeypatch.setattr(llama_cpp, "time", clock)
    monkeypatch.setattr(llama_cpp, "get_num_threads", lambda: 2)
    assert llama_cpp._now() == (3.5, 15.0)
    assert llama_cpp._rates(20, (1.0, 5.0)) == (8.0, 2.0)
