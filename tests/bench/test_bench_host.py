"""What a call takes the host: the stand-in is called, and times come of it. Which, no test says."""

from __future__ import annotations

import subprocess

import pytest

from specdec_kernels.bench import host


def test_calls_of_cuda_are_timed():
    rows = host.times("cuda")
    assert [row["call"].split(",")[0] for row in rows] == ["verify_chain"] * 3 + ["verify_tree", "sample"]
    assert all(row["backend"] == "cuda" and 0 < row["least"] <= row["median"] for row in rows)


def test_a_stand_in_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(host, "STAND_IN", host.STAND_IN | {"SPECDEC_EMULATE_CUDA": "2"})
    with pytest.raises(RuntimeError, match="must be 1 or threads, got '2'"):
        host.times("cuda")


def test_a_stand_in_that_dies_without_a_word_is_an_error_too(monkeypatch):
    dead = subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: dead)
    with pytest.raises(RuntimeError, match="the stand-in for triton failed: exit code -11"):
        host.times("triton")
