"""`specdec bench methods` and `batching`, on tiny models and a few requests."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from decoding import feature_drafter, medusa_drafter
from tiny import VOCAB, steady, tiny
from typer.testing import CliRunner

from specdec_kernels.bench import batching, methods, serving
from specdec_kernels.bench.methods import DrafterAlone, Recorded, disagreement
from specdec_kernels.bench.serving import Request, Served, Service
from specdec_kernels.cli import main
from specdec_kernels.decode import Sampling, TransformersTarget
from specdec_kernels.decode.drafters import (
    AdaptiveDrafter,
    FallbackDrafter,
    Growth,
    ModelDrafter,
    NGramDrafter,
    TreeDrafter,
)
from specdec_kernels.decode.drafts import Step

REQUESTS = [Request([1, 2, 3, 1, 2], 9, seed=1), Request([4, 4], 3, seed=2), Request([5, 6], 12, seed=3)]


class Tiny(methods.Models):
    """A tiny model in SmolLM2's place."""

    def __init__(self):
        self.model = steady(tiny(1, layers=2))
        self.target = TransformersTarget(self.model)
        self.exact = self.model

    def drafter(self, kind, adaptive=False):
        model = feature_drafter(self.model)
        made = {
            "model": lambda: model, "medusa": lambda: medusa_drafter(self.model),
            "tree": lambda: TreeDrafter(model, Growth(depth=2, width=2, children=2)),
            "auto": lambda: FallbackDrafter(AdaptiveDrafter(NGramDrafter(2)), AdaptiveDrafter(model)),
        }  # fmt: skip
        return made[kind]()

    def requests(self, seed):
        return REQUESTS


@pytest.fixture(scope="module")
def models():
    return Tiny()


def run(*arguments):
    result = CliRunner().invoke(main.app, ["bench", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", [name for name in methods.WAYS if name != "drafter alone"])
def test_tokens_are_drawn_from_the_targets_distribution(models, name):
    """Every row that one was drawn from is that of a plain pass; of another model they are not."""
    way = methods.WAYS[name](models)
    recorded = Recorded(way.target)
    Service(recorded, way.drafter, way.num_draft, way.rule, Sampling(), way.most, way.dynamic).serve(REQUESTS)
    assert len(recorded.histories) == len(REQUESTS)
    for history, request in zip(sorted(recorded.histories, key=lambda own: own.tokens), REQUESTS, strict=False):
        assert history.tokens[: len(request.prompt)] == request.prompt
        assert len(history.rows) == len(history.tokens) - history.unscored >= request.max_new_tokens
    assert disagreement(models.exact, recorded.histories, 1.0) < 1e-6
    assert disagreement(steady(tiny(2)), recorded.histories, 1.0) > 0.1


def test_how_far_apart_is_exact(models):
    """Half the sum of differences, at the temperature, in the mean over rows."""
    recorded = Recorded(TransformersTarget(models.model))
    Service(recorded, sampling=Sampling()).serve(REQUESTS[:1])
    (history,) = recorded.histories
    other = [torch.zeros(VOCAB) for _ in history.rows]
    uniform = methods.History(history.tokens, history.unscored, other)
    for temperature in (0.5, 1.0):
        distributions = [(row.double() / temperature).softmax(-1) for row in history.rows]
        expected = sum(0.5 * float((distribution - 1 / VOCAB).abs().sum()) for distribution in distributions) / len(
            distributions
        )
        assert disagreement(models.exact, [uniform], temperature) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("repeats", "count"), [(0.0, 9), (3.0, 1)])
def test_a_drafter_alone_goes_on_as_it_drafts(models, repeats, count):
    """Greedy, its text is one long draft, of the same rows; but that its own tokens are history, whose repetitions it
    favours."""
    drafter, prompt = feature_drafter(models.model, repeats=repeats), [1, 2, 3, 1, 2]
    target = TransformersTarget(models.model)
    recorded = Recorded(DrafterAlone(target, drafter))
    (served,) = Service(recorded, sampling=Sampling(temperature=0.0)).serve([Request(prompt, count)])
    features = target.begin([prompt], [count], drafter.feature_layers).features
    step = Step([count], torch.tensor([0]), torch.tensor([5]), 0.0, greedy=True)
    draft = drafter.begin([prompt], features).propose(step)
    assert served.tokens == draft.tokens[0].tolist()
    rows = torch.stack(recorded.histories[0].rows)
    assert torch.equal(rows[:, drafter.vocabulary.draft_to_target], draft.logits[0])
    assert rows.isfinite().sum() == draft.logits[0].numel()
    with pytest.raises(ValueError, match="prompts must be one of two tokens or more"):
        Service(DrafterAlone(target, drafter)).serve([Request([1], 2)])


def test_methods_side_by_side(models, monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "Models", lambda: models)
    monkeypatch.setattr(methods, "memory", lambda name: 123_000_000)
    head, *lines = run("methods", "--seeds", 2, "--out", tmp_path).splitlines()
    assert [line.split("  ")[0] for line in lines[: len(methods.WAYS)]] == list(methods.WAYS)
    assert max(map(len, [head, *lines[: len(methods.WAYS)]])) <= 80
    results = {row["way"]: row for row in json.loads((tmp_path / "methods.json").read_text())["results"]}
    assert all(row["tokens_per_second"] > 0 and row["memory"] == 123_000_000 for row in results.values())
    assert all((row["disagreement"] > 0.01) == (name == "drafter alone") for name, row in results.items())
    assert results["plain"]["tokens_per_step"] == results["dynamic batches"]["tokens_per_step"] == 1
    assert results["tree of drafts"]["tokens_per_step"] > 1
    assert (tmp_path / "methods.png").stat().st_size > 0


def test_the_memory_of_this_process(models):
    """At least what its weights take."""
    weights = sum(x.numel() * x.element_size() for x in models.model.parameters())
    assert methods.peak_memory(methods.WAYS["plain"](models), REQUESTS) > weights


class Tokenizer:
    """A token for a question, of few that there are."""

    def apply_chat_template(self, message, **_):
        return [ord(letter) % VOCAB for letter in message[0]["content"][:9]]


def test_requests_that_come_at_random_times(models, monkeypatch, tmp_path):
    drafter = AdaptiveDrafter(FallbackDrafter(NGramDrafter(2), ModelDrafter(models.model)))
    monkeypatch.setattr(batching, "load_target", lambda *_: (models.model, Tokenizer()))
    monkeypatch.setattr(batching, "load_drafter", lambda *_, **__: drafter)
    head, *lines = run("batching", "--requests", 6, "--out", tmp_path).splitlines()
    assert len(lines) == 2 * len(batching.WAYS) + 1
    assert max(map(len, [head, *lines[:-1]])) <= 80
    assert lines[-1] == "36 of 36 texts are those of their requests alone"
    results = json.loads((tmp_path / "batching.json").read_text())["results"]
    assert [(row["way"], row["drafts"]) for row in results] == [
        (way, drafts) for drafts in ("none", "adaptive") for way in batching.WAYS
    ]
    assert all(row["ended"] == row["requests"] == 6 and row["parted"] == [] for row in results)
    assert len({row["tokens"] for row in results}) == 1
    assert all(row["tokens_per_step"] == 1 for row in results[:3])


def test_what_does_not_fit_the_time_is_told(models, monkeypatch):
    """On a clock on which every look takes a second."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)), sleep=lambda seconds: None)
    target, many = TransformersTarget(models.model), batching.questions(Tokenizer(), 50)
    for module in (batching, serving):
        monkeypatch.setattr(module, "time", clock)
    rows = batching.measure(target, {"none": None}, many, 2000.0, None)
    assert [row["requests"] for row in rows] == [50] * 3
    assert 0 < rows[0]["ended"] < 50
    assert all(0 < row["compared"] <= min(row["ended"], rows[0]["ended"]) for row in rows)
    served = []
    monkeypatch.setattr(batching, "arriving", lambda requests, rate: served.append(rate) or requests)
    for seconds in (10.0, 60.0):  # not even warm; how fast requests are served is known of a few
        with pytest.raises(
            RuntimeError, match=f"no request could be served in {seconds:g} s, which trying took: allow"
        ):
            batching.measure(target, {"none": None}, many, seconds, None)
    assert not served


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("host", "--quick"), "quick must be left out for 'host': it is for kernels, got True"),
        (("trees", "--seeds", 9), "seeds must be left out for 'trees': it is for text, adaptive, methods, got 9"),
        (("kernels", "--requests", 3), "requests must be left out for 'kernels': it is for batching, got 3"),
        (("methods", "--seconds", 2), "seconds must be left out for 'methods': it is for batching, got 2.0"),
    ],
)
def test_options_of_other_subjects_are_refused(tmp_path, arguments, said):
    result = CliRunner().invoke(main.app, ["bench", *map(str, arguments), "--out", str(tmp_path / "new")])
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {said}\n")
    assert not list(tmp_path.iterdir())


def test_arrivals():
    """As many a second as wanted in the mean, one after the other, with the spread of exponential times."""
    coming = batching.arriving([Request([1], 1)] * 2000, 4.0)
    gaps = torch.tensor([own.arrives for own in coming]).diff()
    assert gaps.min() > 0
    assert float(gaps.mean()) == pytest.approx(0.25, rel=0.1)
    assert float(gaps.std()) == pytest.approx(0.25, rel=0.1)


def test_questions_are_different():
    texts = batching.questions(SimpleNamespace(apply_chat_template=lambda message, **_: message[0]["content"]), 200)
    assert len({own.prompt for own in texts}) == 200
    assert {own.max_new_tokens for own in texts} == set(range(batching.LENGTHS[0], batching.LENGTHS[1] + 1))
    with pytest.raises(ValueError, match=r"requests must be in \[1, 200\], got 201"):
        batching.questions(Tokenizer(), 201)


@pytest.mark.parametrize(("apart", "fails"), [(0.001, False), (0.5, True)])
def test_texts_may_part_by_rounding_alone(apart, fails):
    request = Request([1, 2], 3)
    texts = [Served(request, tokens, [0.0] * 3, [False] * 3, True) for tokens in ([4, 5, 6], [4, 7, 6])]

    def margin(history, token, other):
        assert (history, token, other) == ([1, 2, 4], 7, 5)
        return apart

    if fails:
        with pytest.raises(RuntimeError, match="a text must be that of its request alone"):
            batching.parted([(texts[1], texts[0])], margin)
    else:
        assert batching.parted([(texts[1], texts[0])], margin) == [0.001]
        assert batching.parted([(texts[0], texts[0])], margin) == []
    short = Served(request, [4, 5], [0.0] * 2, [False] * 2, True)
    with pytest.raises(RuntimeError, match="a text must be"):
        batching.parted([(short, texts[0])], margin)
