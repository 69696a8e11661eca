"""``specdec doctor`` where a backend does not work."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from specdec_kernels import selftest
from specdec_kernels.cli import doctor
from specdec_kernels.ops import BACKENDS


def test_a_backend_that_fails_is_a_line(monkeypatch):
    def answers(backend, device):
        if backend != "reference":
            return True
        try:
            raise AttributeError("'NoneType' object has no attribute [type]")
        except AttributeError as error:
            raise RuntimeError("at 7:4:\n  pages\n  of source") from error

    monkeypatch.setattr(selftest, "known_answers", answers)
    monkeypatch.setattr(selftest, "run", lambda *_, count: selftest.Report(requests=count))
    console = Console(file=StringIO(), width=200)
    assert not doctor.report(console)
    said = console.file.getvalue()
    assert "FAILS: AttributeError: 'NoneType' object has no attribute [type]" in said
    assert said.count("agree") == sum(not b.reason for b in BACKENDS.values()) - 1, "the others are looked at"
    assert "pages" not in said


@pytest.mark.parametrize("name", ["triton", "specdec_kernels.triton_kernels"])
def test_a_triton_that_does_not_load_is_a_reason(monkeypatch, name):
    import sys

    from specdec_kernels.ops import backends

    monkeypatch.setitem(sys.modules, name, None)
    made = backends._triton()
    assert "not load" in made.reason
    assert not made.functions
