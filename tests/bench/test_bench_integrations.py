"""The comparison inside transformers, with contenders whose speeds are known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny import slow_greedy, tiny

from specdec_kernels.bench import integrations
from specdec_kernels.integrations.transformers import generate

SPEEDS = {"plain": 20.0, "their assistant, 4": 10.0, "our assistant, 4": 30.0}


@pytest.fixture
def contenders(monkeypatch):
    def run(way, inputs, temperature, seed, tokens=8):
        return tokens / SPEEDS[way], tokens, [[7]] * len(inputs)

    made = SimpleNamespace(ways=SPEEDS, encode=lambda batch: batch, run=run)
    monkeypatch.setattr(integrations, "Contenders", lambda: made)
    return made


def measured(tmp_path):
    integrations.main(tmp_path, Console(width=200))
    return json.loads((tmp_path / "transformers.json").read_text())["results"]


def test_every_way_is_measured_on_the_same_prompts(contenders, tmp_path, capsys):
    """Theirs on one prompt at a time alone."""
    results = measured(tmp_path)
    rows = [(each["temperature"], each["batch"], each["way"]) for each in results]
    ours = [way for way in SPEEDS if not way.startswith("their")]
    assert rows == [(t, b, way) for t in (0.0, 0.8) for b, ways in ((1, list(SPEEDS)), (4, ours)) for way in ways]
    for each in results:
        assert each["texts"] == each["as_plain"] == 4
        assert each["tokens_per_second"] == pytest.approx(SPEEDS[each["way"]])
        assert each["speed_up"] == pytest.approx(SPEEDS[each["way"]] / SPEEDS["plain"])
    assert "1.50x" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out(contenders, monkeypatch, tmp_path, capsys):
    clock = SimpleNamespace(perf_counter=iter([0, 1, 2, *[1000] * 50]).__next__)
    monkeypatch.setattr(integrations, "time", clock)
    results = measured(tmp_path)
    assert [(each["way"], each["texts"]) for each in results] == [(way, 2) for way in SPEEDS]
    assert "temperature 0.0, batch 1 has 2 of 4" in capsys.readouterr().err


def test_the_assistant_is_the_model_without_some_layers(monkeypatch):
    monkeypatch.setattr(integrations, "LEFT_OUT", range(1, 3))
    model, ids = tiny(1, layers=4), torch.tensor([[1, 2, 3, 4]])
    assistant = integrations.shortened(model)
    with torch.no_grad():
        whole = assistant(ids).logits
        model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[3]])
        torch.testing.assert_close(whole, model(ids, use_cache=False).logits)
    target = tiny(1, layers=4)
    expected = slow_greedy(target, ids[0].tolist(), 8)
    for way in ({}, {"custom_generate": generate}):
        made = target.generate(ids, do_sample=False, max_new_tokens=8, assistant_model=assistant, **way)
        assert made[0, 4:].tolist() == expected
