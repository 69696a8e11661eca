"""The real model: the same text with any drafter, and what the command line prints."""

from __future__ import annotations

import pytest
import torch
from forms import some
from typer.testing import CliRunner

from specdec_kernels import selftest
from specdec_kernels.cli.models import load_drafter, load_target
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.decode import Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import CallableDrafter

TOKENS = some(11, 40)  # more than a window has
FIXED_ROWS = 8


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def session(request):
    model, tokenizer = load_target(dtype=getattr(torch, request.param))
    return model, tokenizer, {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def encode(tokenizer, prompt):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )


@pytest.mark.brief(kept=lambda parameters: (parameters["session"], parameters["kind"]) == ("float32", "edit"))
@pytest.mark.slow
@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy_text_depends_on_no_drafter(session, kind):
    """With a fixed number of rows the text is equal token for token, whatever drafted and however much."""
    model, tokenizer, stop = session
    prompt = encode(tokenizer, PROMPTS[kind][0])

    def decoded(drafter, num_draft):
        target = TransformersTarget(model, FIXED_ROWS)
        options = {
            "drafter": drafter,
            "num_draft": num_draft,
            "max_new_tokens": TOKENS,
            "stop_tokens": stop,
            "temperature": 0.0,
        }
        return generate(target, [prompt], **options)[0].tokens

    plain = decoded(None, 0)
    assert decoded(load_drafter("lookup", model), 7) == plain
    assert decoded(load_drafter("auto", model), 5) == plain
    nonsense = CallableDrafter(lambda tokens, count: [tokens[-1]] * count)
    assert decoded(nonsense, 3) == plain
    # Drafts that are all right, as many as fit: every accepted row was scored at another index.
    start = len(prompt)
    assert decoded(CallableDrafter(lambda tokens, count: plain[len(tokens) - start :][:count]), 7) == plain


@pytest.mark.brief(kept=lambda parameters: (parameters["session"], parameters["kind"]) == ("float32", "story"))
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["story", "edit"])
def test_coupled_text_depends_on_no_drafter(session, kind):
    """Case 25 on a real model: at temperature 0.8 too, under the rule that shares the noise."""
    model, tokenizer, stop = session
    prompt = encode(tokenizer, PROMPTS[kind][1])

    def decoded(drafter):
        target = TransformersTarget(model, FIXED_ROWS)
        options = {"max_new_tokens": TOKENS, "stop_tokens": stop, "seed": 2, "temperature": 0.8, "rule": "coupled"}
        return generate(target, [prompt], drafter=drafter, num_draft=6, **options)[0].tokens

    plain = decoded(None)
    for name in ("lookup", "model"):
        assert decoded(load_drafter(name, model)) == plain
    assert decoded(load_drafter("auto", model, adaptive=True)) == plain


@pytest.mark.brief(kept=lambda parameters: parameters["session"] == "float32")  # a CPU without bfloat16 takes longer
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "eagle3"])
def test_a_trained_drafter_drafts(session, kind):
    """It gets more than one token in three right on code, at temperature 0.8."""
    model, tokenizer, stop = session
    statistics = Statistics()
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS["code"]]
    options = {"num_draft": 3, "max_new_tokens": some(32, 64), "temperature": 0.8, "seed": 1, "stop_tokens": stop}
    generate(TransformersTarget(model), prompts, drafter=load_drafter(kind, model), statistics=statistics, **options)
    assert statistics.accepted_at[0] / statistics.proposed_at[0] > 1 / 3
    assert statistics.invalid == 0


@pytest.mark.slow
def test_generate_and_doctor(monkeypatch):
    from specdec_kernels.cli.main import app

    runner = CliRunner()
    options = [
        "--rule",
        "coupled",
        "--temperature",
        "0.8",
        "--top-p",
        "0.9",
        "--num-draft",
        "3",
        "--precision",
        "float32",
    ]
    result = runner.invoke(app, ["generate", "Say hello.", "--max-new-tokens", "8", "--compare", *options])
    assert result.exit_code == 0, result.output
    assert "Compared with plain decoding" in result.output
    run = selftest.run
    monkeypatch.setattr(selftest, "run", lambda *given, count: run(*given, count=1))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "known answers" in result.output
    result = runner.invoke(app, ["generate", "x", "--target", "/nowhere", "--drafter", "lookup"])
    assert result.exit_code == 2
    assert "a model must be 'smollm2' or the path" in result.output.replace("\n", " ")
