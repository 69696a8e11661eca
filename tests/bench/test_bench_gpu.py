"""What is around the timing of a GPU, on the CPU: cases, checks, results, files. No time is looked at."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch._dynamo.testing import CompileCounter
from typer.testing import CliRunner

from specdec_kernels import selftest
from specdec_kernels.bench import gpu
from specdec_kernels.bench.cases import TEMPERATURE, Inputs, inputs
from specdec_kernels.bench.clocks import WallClock, waits
from specdec_kernels.bench.contenders import fused
from specdec_kernels.cli import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real one runs there")


def test_the_grid_is_the_one_asked_for():
    grid = list(gpu.cases(quick=False))
    assert len(set(grid)) == len(grid) == 4 * 4 * 4 * 2 * 2
    assert {case.vocab for case in grid} == {32_000, 128_256, 151_936, 262_144}
    assert {case.num_draft for case in grid} == {1, 4, 8, 16}
    assert Counter(case.batch for case in grid) == dict.fromkeys((1, 8, 64, 256), 64)
    assert set(gpu.cases(quick=True)) < set(grid)
    # At B = 64, K = 4, V = 151,936: the case of the targets, and the others take part in it.
    named = [case for case in gpu.cases(quick=True) if case.batch == 64 and not case.filtered]
    ways = ["PyTorch", "lean PyTorch", "lean PyTorch, searched"]
    assert list(gpu.others(named[0])) == ways + [f"{way}, compiled" for way in ways]


def test_results_are_written(tmp_path, monkeypatch):
    small = [replace(case, vocab=300, batch=min(case.batch, 6)) for case in gpu.cases(quick=True)][:6]
    monkeypatch.setattr(gpu, "cases", lambda quick: iter(small))
    monkeypatch.setattr(gpu, "OTHERS_VOCAB", 300)
    monkeypatch.setattr(gpu, "vllm", None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    gpu.main(tmp_path, True, Console(quiet=True), WallClock())
    assert (tmp_path / "none.png").stat().st_size > 1000
    results = json.loads((tmp_path / "none.json").read_text())["results"]
    assert [row["case"] for row in results] == [case.name for case in small]
    for row, case in zip(results, small, strict=True):
        assert set(row["microseconds"]) == {*gpu.OURS, *gpu.others(case)}, row["failed"]
        assert row["failed"] == {}
        assert row["called_eagerly"] == {}
        rows = case.batch * (row["accepted"] + 1)
        size = 2 if case.dtype == "bfloat16" else 4
        assert row["bytes"] == pytest.approx(rows * case.vocab * size)
        assert row["bytes_of_inputs"] == case.batch * (2 * case.num_draft + 1) * case.vocab * size


def test_what_is_called_compiled_is(monkeypatch):
    """In every case, by a compiler that only counts: Dynamo runs a function as it is that it compiled too often."""
    counters = []

    def counted(function, **options):
        counters.append(CompileCounter())
        return compile_(function, backend=counters[-1], **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(gpu, "OTHERS_VOCAB", 64)
    for case in [replace(case, vocab=64, batch=2 + case.batch // 8) for case in gpu.cases(quick=True)][:12]:
        counters.clear()
        batch, drafts, dtype = case.batch, case.num_draft, getattr(torch, case.dtype)
        none = torch.zeros(batch, dtype=torch.int64)
        target, draft = torch.randn(batch, drafts + 1, 64), torch.randn(batch, drafts, 64)
        tokens, stats = torch.zeros(batch, drafts, dtype=torch.int64), torch.rand(batch, drafts, 3)
        x = Inputs(target.to(dtype), tokens, draft.to(dtype), stats, none, none, none, none)
        for contender in gpu.others(case).values():
            contender(case, x)
        assert [counter.frame_count for counter in counters] == [1] * (1 if case.filtered else 3), case.name


def test_compiling_too_often_fails(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    case = next(gpu.cases(quick=True))
    function = gpu.compiled(lambda case, x: x.target + 1, case)
    shapes = [Inputs(*[torch.zeros(batch)] * 8) for batch in range(2, 4 + torch._dynamo.config.recompile_limit)]
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        list(map(partial(function, case), shapes))


def test_others_are_replayed_where_they_can_be_captured(monkeypatch):
    """Else called, and marked."""

    def fails(call, buffers):
        raise RuntimeError("operation not permitted when stream is capturing")

    def full_memory(call, buffers):
        raise torch.OutOfMemoryError

    replays = SimpleNamespace(replayed=lambda call, buffers: [1.0], called=lambda call, buffers: [2.0])
    assert gpu.timed(replays, abs, [1]) == ([1.0], "")
    reason = "operation not permitted when stream is capturing"
    assert gpu.timed(SimpleNamespace(replayed=fails, called=replays.called), abs, [1]) == ([2.0], reason)
    full = SimpleNamespace(replayed=full_memory, called=replays.called)
    with pytest.raises(torch.OutOfMemoryError):  # a failure of this contender, not a reason to time it otherwise
        gpu.timed(full, abs, [1])
    monkeypatch.setattr(gpu, "waits", lambda call: 1)  # nothing that waits can be captured, nor should be tried
    assert gpu.timed(replays, abs, [1]) == ([2.0], "the host waits 1 times")
    monkeypatch.setattr(gpu, "OTHERS_VOCAB", 300)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    row = gpu.measure(replace(next(gpu.cases(quick=True)), vocab=300, batch=3), WallClock(), 1.0)
    assert list(row["called_eagerly"]) == [name for name in row["microseconds"] if name not in gpu.OURS]
    assert gpu.cells(row)[-1].endswith(" (eager)")


def test_waits_are_counted(monkeypatch):
    """And not PyTorch's own warning of the mode that tells of them."""

    def mode(_):
        warnings.warn("the mode is a prototype and does not yet detect all synchronizing operations", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode)
    assert waits(lambda: None) == 0
    assert waits(lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1)) == 1


def test_memsets_and_copies_are_counted_apart(monkeypatch):
    """By the names that the profiler gives them."""
    named = ["verify", "Memset (Device)", "MemoryBound", "Memcpy DtoD (Device -> Device)"]
    events = [SimpleNamespace(name=name, device_type=SimpleNamespace(name="CUDA")) for name in named]
    seen = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(selftest.gpu, "profile", lambda **_: seen)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert selftest.gpu.launches(lambda: None) == (["verify", "MemoryBound"], [named[1], named[3]])


def test_a_wrong_answer_is_not_timed(monkeypatch):
    case = replace(next(gpu.cases(quick=True)), vocab=300, batch=3)
    real = gpu.ours

    def wrong(name, *given):
        verified = real(name, *given)
        return verified._replace(tokens=verified.tokens + (name == "triton"))

    monkeypatch.setattr(gpu, "ours", wrong)
    with pytest.raises(RuntimeError, match="triton: the reference disagrees"):
        gpu.measure(case, WallClock(), 1.0)


def test_vllm_is_given_what_it_takes(monkeypatch):
    """By the names of vLLM 0.33, whose own softmax is to give the distribution of the target."""
    given = {}

    def rejection_sample(
        draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits,
        bonus_token_ids, sampling_metadata,
    ):  # fmt: skip
        given.update(locals())

    for name in ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.rejection_sampler"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.v1.sample.rejection_sampler"].rejection_sample = rejection_sample
    case = replace(next(gpu.cases(quick=True)), vocab=300, batch=3)
    x = inputs(case, lambda x: fused(case, x).num_accepted.long(), cold_bytes=1)[0]
    gpu.vllm(case, x)
    flat = (case.batch * case.num_draft, case.vocab)
    for probs, logits in ((given["target_logits"].softmax(-1), x.target[:, :-1]), (given["draft_probs"], x.draft)):
        torch.testing.assert_close(probs, torch.softmax(logits.float() / TEMPERATURE, -1).reshape(flat))
    assert given["cu_num_draft_tokens"].tolist() == [case.num_draft * (i + 1) for i in range(case.batch)]
    assert given["draft_token_ids"].tolist() == x.tokens.flatten().tolist()


def test_without_a_gpu_the_command_says_so():
    result = CliRunner().invoke(main.app, ["bench", "--device", "cuda"])
    assert (result.exit_code, result.stderr) == (2, "error: there is no GPU to time: torch sees none\n")
    result = CliRunner().invoke(main.app, ["bench", "trees", "--device", "cuda"])
    assert result.exit_code == 2
    assert "device must be cpu for 'trees'" in result.stderr
