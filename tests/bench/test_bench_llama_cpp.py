"""The comparison with llama.cpp's own loop, with contenders whose speeds are known."""

from __future__ import annotations

import json
from types import SimpleNamespace

from rich.console import Console

from specdec_kernels.bench import llama_cpp


def test_ratios_are_of_the_same_round(monkeypatch, tmp_path, capsys):
    """A round that is slow for all changes no ratio."""
    slow = {0: 1.0, 1: 10.0, 2: 3.0}
    speeds = {"their loop": 30.0, "plain": 20.0, "n-grams, 4": 50.0}

    def run(way, ids, temperature, seed):
        return [way if temperature else 7], speeds[way] / slow[seed]

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
        assert each["as_theirs"] == (0 if each["temperature"] and each["way"] != "their loop" else 3)
